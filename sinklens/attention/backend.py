"""The flash backend: the bridge's own attention modules, run through a function of ours in O(T) memory.

``with flash(model):`` every attention layer of the bridge calls Hugging Face's module again (its projections keep
their TransformerLens hooks), and that module calls the function that is registered here with transformers'
``AttentionInterface``. The function gets queries and keys as they are scored, after QK norm and rotary embedding, with
KV heads as they are, and never builds a pattern of the whole sequence. Everything is put back at the end, also after an
exception. Which kernel ran in which layer is in ``Flash.paths``.

Edits of attention arm themselves by a hook on ``blocks.i.attn.hook_in`` and are consumed by the function in the same
call. Hooks that cannot fire here (``hook_pattern``, ``hook_attn_scores``, rotated queries and keys) are refused: none
is passed over in silence. :mod:`sinklens.attention.flash_proof` compares every layer with the hooks backend before the
first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from sinklens.attention.interface import NAME, owners, put_forward
from sinklens.attention.kernels import View, blocked, fused, fused_takes
from sinklens.bridge.adapters import attention_hook
from sinklens.bridge.capabilities import capabilities, record
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import SinklensError, UnsupportedModelError
from sinklens.core.validation import turn

Attend = Callable[[int, Tensor, Tensor, Tensor, View], tuple[Tensor, str]]
Backend = Literal["auto", "hooks", "flash"]
SILENT = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k", "hook_result")


@dataclass(frozen=True, eq=False)
class Armed:
    """An edit that waits for its layer's attention, and the hook that armed it."""

    run: Any
    hook: HookPoint
    by: Callable[..., Any]

    def stands(self) -> bool:
        """Whether that hook is still there; it is not where an earlier forward raised in between."""
        return any(handle.user_hook is self.by for handle in self.hook.fwd_hooks)


@dataclass(eq=False)
class Flash:
    """A model's flash backend while its context is open.

    Attributes:
        model: the bridge, or the model without one.
        paths: by the name of the attention module, which kernel ran last: "fused", "compressed", "blocked" or
            "pattern".
        collect: stands in for unedited attention in a layer where statistics are taken.
        alone: no other backend may open inside, because what it measures would be another model.
        watch: looks at every layer's pattern, in blocks of query rows, before and after edits.
        edited: runs a layer's attention with edits; brought by whoever arms one or watches.
        names: of the attention modules of a model without a bridge.
    """

    model: TransformerBridge | PlainModel
    paths: dict[str, str] = field(default_factory=dict)
    collect: Attend | None = None
    alone: str = ""
    watch: Any = None
    edited: Callable[..., tuple[Tensor, str]] | None = None
    names: tuple[str, ...] = ()
    _armed: dict[int, list[Armed]] = field(default_factory=dict)
    _silent: dict[int, list[tuple[str, HookPoint]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, PlainModel):
            return  # nothing can be hooked there
        silent = unheard(self.model)
        points = hook_points(self.model)
        for layer in range(capabilities(self.model).n_layers):
            names = [attention_hook(layer, point) for point in silent]
            self._silent[layer] = [(n, points[n]) for n in names if n in points]

    def arm(self, layer: int, armed: Armed) -> None:
        """Let an edit wait for this layer's attention."""
        self._armed.setdefault(layer, []).append(armed)

    def clear(self, layer: int) -> None:
        """A layer's attention begins: nothing waits for it yet (an earlier forward may have raised in between)."""
        self._armed.pop(layer, None)

    def hooked(self) -> bool:
        """Whether any hook, ours or not, stands where patterns are read or edited."""
        return any(point.fwd_hooks for points in self._silent.values() for _, point in points)

    def deaf(self) -> list[str]:
        """The hooks that are installed now and would never fire."""
        return [name for points in self._silent.values() for name, point in points if _foreign(point)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        """One layer's attention: [batch, head, query, d_v]."""
        for name, point in self._silent.get(layer, ()):
            if _foreign(point):
                raise UnsupportedModelError(
                    f"a hook on {name} cannot fire under the flash backend, which never builds what it reads; run it "
                    f"outside sinklens.flash(model) (backend='hooks'), where it does"
                )
        facts = record(self.model)
        if view.window not in (None, facts.windows[layer]):
            raise UnsupportedModelError(
                f"{facts.model}: layer {layer} runs with a window of {view.window} and its configuration declares "
                f"{facts.windows[layer]}. Please report this architecture"
            )
        view = replace(view, causal=facts.causal, window=facts.windows[layer])
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise UnsupportedModelError("the flash backend has no gradients: use torch.no_grad(), or backend='hooks'")
        waiting = [armed.run for armed in self._armed.pop(layer, ())]
        edits = told(waiting, q, k, view)
        if edits or self.watch is not None:
            if self.alone:
                raise UnsupportedModelError(f"edits of attention do not run inside {self.alone}; run them outside")
            if self.collect is not None:
                raise UnsupportedModelError("statistics of edited attention need backend='hooks'")
            assert self.edited is not None  # whoever arms an edit, or watches, brings it
            out, path = self.edited(self, layer, edits, q, k, v, view)
        else:
            attend = self.collect or plain
            out, path = attend(layer, q, k, v, view)
        self.paths[self.names[layer] if self.names else f"blocks.{layer}.attn"] = path
        return out


def hook_points(model: TransformerBridge) -> dict[str, HookPoint]:
    """The model's hook points by name (the host's own table is built anew at every look)."""
    if model not in _points:
        _points[model] = dict(model.hook_dict)
    return _points[model]


def unheard(model: TransformerBridge) -> tuple[str, ...]:
    """The points of attention where a hook cannot fire under flash; before the proof has run, those of every host."""
    return _unheard.get(model, SILENT)


def note_unheard(model: TransformerBridge, points: Sequence[str]) -> None:
    """Keep what the proof found to be silent under flash beside what is everywhere."""
    _unheard[model] = tuple(dict.fromkeys([*SILENT, *points]))


def told(waiting: Sequence[Any], q: Tensor, k: Tensor, view: View) -> list[Any]:
    """Tell those who follow the forward which keys are real; what is left are the edits."""
    real = view.mask if view.mask is not None else torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    for follower in waiting:
        if hasattr(follower, "see"):
            follower.see(real, q.shape[2], k.shape[2])
    return [one for one in waiting if not hasattr(one, "see")]


def plain(
    layer: int,  # noqa: ARG001
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d_v"],
    view: View,
) -> tuple[Float[Tensor, "batch head query d_v"], str]:
    """Unedited attention and which kernel ran."""
    if fused_takes(q, k, v, view):
        return fused(q, k, v, view)[0], "fused"
    return blocked(q, k, v, view)[0], "blocked"


def _foreign(point: HookPoint) -> bool:
    return any(not getattr(handle.user_hook, "either_backend", False) for handle in point.fwd_hooks)


@dataclass(eq=False)
class _Host:
    """How the host had a model's attention before the first context, and the contexts that are open now."""

    attentions: list[nn.Module]
    components: list[list[nn.Module]]
    implementations: list[tuple[Any, str]]
    forwards: list[Any]
    states: list[Flash | None] = field(default_factory=list)

    def apply(self, state: Flash | None) -> None:
        """Put a state in force; None is the host itself."""
        for config, before in self.implementations:
            config._attn_implementation = before if state is None else NAME
        for layer, (attention, component) in enumerate(zip(self.attentions, self.components, strict=True)):
            ours = None if state is None else partial(_delegated, attention, state, layer)
            put_forward(attention, ours or self.forwards[layer])
            for module in component:
                owners.pop(module, None)
                if state is not None:
                    owners[module] = (state.attend, layer)


_hosts: WeakKeyDictionary[TransformerBridge, _Host] = WeakKeyDictionary()
_points: WeakKeyDictionary[TransformerBridge, dict[str, HookPoint]] = WeakKeyDictionary()
_unheard: WeakKeyDictionary[TransformerBridge, tuple[str, ...]] = WeakKeyDictionary()


def running(model: TransformerBridge) -> Flash | None:
    """The flash backend that is on for a model, if any."""
    host = _hosts.get(model)
    return None if host is None else host.states[-1]


def busy(model: TransformerBridge) -> bool:
    """Whether hooks stand where patterns are read or edited."""
    return Flash(model).hooked()


@contextlib.contextmanager
def hooked(model: TransformerBridge) -> Iterator[Flash | None]:
    """Run a bridge's attention by the host, as if no flash context were open."""
    if running(model) is None:
        yield None
        return
    with switched(model, None) as state:
        yield state


@contextlib.contextmanager
def switched(model: TransformerBridge, state: Flash | None) -> Iterator[Flash | None]:
    """Put a state in force, and restore what was there, whatever happens inside; other threads wait for their turn."""
    with turn(model):
        yield from _switched(model, state)


def _switched(model: TransformerBridge, state: Flash | None) -> Iterator[Flash | None]:
    if model not in _hosts:
        _hosts[model] = _found(model)
    host = _hosts[model]
    if host.states and host.states[-1] is not None and host.states[-1].alone:
        raise UnsupportedModelError(
            f"this function chooses how attention runs, so it would measure the model without {host.states[-1].alone}; "
            f"call it outside"
        )
    host.states.append(state)
    try:
        host.apply(state)
        yield state
    finally:
        host.states.pop()
        outer = host.states[-1] if host.states else None
        try:
            host.apply(outer)
        except BaseException:  # Ctrl-C in the middle of it
            host.apply(outer)
            raise
        finally:
            if not host.states:
                del _hosts[model]


def _delegated(attention: Any, state: Flash, layer: int, *args: Any, **kwargs: Any) -> Any:
    """A layer's attention as the host's delegating adapters run it."""
    state.clear(layer)
    return AttentionBridge.forward(attention, *args, **kwargs)


def _found(model: TransformerBridge) -> _Host:
    attentions: list[Any] = [block.attn for block in model.blocks]
    components = [list(attention.original_component.modules()) for attention in attentions]
    configs: list[Any] = [getattr(model.original_model, "config", None)]
    configs += [getattr(module, "config", None) for modules in components for module in modules]
    unique = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    return _Host(
        attentions,
        components,
        [(config, config._attn_implementation) for config in unique.values()],
        [attention.__dict__.get("forward") for attention in attentions],
    )


_pending: WeakKeyDictionary[nn.Module, list[Armed]] = WeakKeyDictionary()


def once(component: nn.Module, armed: Armed, attend: Callable[..., tuple[Tensor, Tensor]], layer: int) -> None:
    """Let a delegating host's attention module run its next call through the registered function, with an edit.

    The module's ``forward`` is wrapped for that call and put back by it, also when it raises. ``attend`` is called as
    ``attend(edits, layer, q, k, v, view)`` and returns the output and the pattern, which the host then shows.
    """
    if not armed.stands():
        raise SinklensError(
            "pass the hooks of sinklens as they are: wrapped in other functions they cannot edit this host"
        )
    waiting = [a for a in _pending.get(component, ()) if a.stands() and a.by is not armed.by]
    _pending[component] = [*waiting, armed]
    configs: list[Any] = [getattr(m, "config", None) for m in component.modules()]
    unique = list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
    installed = component.__dict__.get("forward")  # accelerate keeps the forward that brings offloaded weights there
    before_us = installed.keywords["own"] if isinstance(installed, partial) and installed.func is _once else installed

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        put_forward(component, before_us)
        edits = [a.run for a in _pending.pop(component, ()) if a.stands()]
        if not edits:  # an earlier forward raised before it came here
            return component.forward(*args, **kwargs)
        before = [config._attn_implementation for config in unique]
        for module in component.modules():
            owners[module] = (partial(attend, edits), layer)
        try:
            for config in unique:
                config._attn_implementation = NAME
            return component.forward(*args, **kwargs)
        finally:
            for config, implementation in zip(unique, before, strict=True):
                config._attn_implementation = implementation
            for module in component.modules():
                owners.pop(module, None)

    component.__dict__["forward"] = partial(_once, wrapped, own=before_us)


def _once(wrapped: Callable[..., Any], *args: Any, own: Any, **kwargs: Any) -> Any:  # noqa: ARG001
    """The forward of a module that waits for its edited call; ``own`` is what stood there before."""
    return wrapped(*args, **kwargs)
