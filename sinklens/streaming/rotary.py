"""How a host's rotary embedding turns queries and keys: read off the host, proven on it, layer by layer.

Moving a query or key from position p to position p + n is the rotation ``R(n)``, whatever p is. Its frequencies are
the host's own (``inv_freq``, of which some hosts have several); which of them a layer uses, on which dimensions, and in
pairs of neighbours or of halves, is decided by the host: the same text runs at other ``position_ids``, and ``R(n)``
must take every layer's queries and keys of the one run to those of the other. With relative positions the hidden
states of the two runs are the same, so learned positions are noticed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sinklens.attention.backend import Flash, plain, switched
from sinklens.attention.flash_proof import unsupported
from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import PROBE_LENGTH, capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.residual.linear_maps import Rotation

SHIFTS = (1, 499)  # one for the fast frequencies, one for the slow ones
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Turn:
    """A layer's rotation by n positions.

    Attributes:
        frequencies: radians per position, one for each pair of dimensions; None in a layer without rotary embedding.
        start: the first rotated dimension.
        interleaved: pairs are neighbours, not halves.
    """

    frequencies: Float[Tensor, " pair"] | None = None
    start: int = 0
    interleaved: bool = False

    def __call__(self, x: Float[Tensor, "*any pos d"], by: Int[Tensor, "*some pos"]) -> Float[Tensor, "*any pos d"]:
        """``R(by) x``, in float32 at least; ``by`` has an entry per position."""
        if self.frequencies is None:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = by.to(self.frequencies)[..., None] * self.frequencies
        pairs = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
        turned = Rotation(pairs.cos().to(x.device, wide), pairs.sin().to(x.device, wide), self.interleaved)
        return torch.cat([x[..., : self.start].to(wide), turned(x[..., self.start :].to(wide))], -1).to(x)


_turns: WeakKeyDictionary[TransformerBridge, tuple[Turn, ...]] = WeakKeyDictionary()


def turns(model: TransformerBridge) -> tuple[Turn, ...]:
    """Every layer's rotation, proven on the host at the first call and kept.

    Raises:
        UnsupportedModelError: an encoder; attention that the flash backend does not reach; positions that are not
            relative (learned ones), or a rotation that cannot be read off.

    Cost: three forwards of 29 tokens, once per model.
    """
    if model not in _turns:
        _turns[model] = _proven(model)
    return _turns[model]


def _proven(model: TransformerBridge) -> tuple[Turn, ...]:
    facts = capabilities(model)
    if not facts.causal:
        raise UnsupportedModelError(f"{facts.model} is an encoder: every token sees later ones, so no cache can roll")
    reason = unsupported(model)
    if reason:
        raise UnsupportedModelError(
            f"{facts.model}: streaming needs the flash backend, which cannot run it: {reason}. "
            f"restrict_attention gives the same mask with positions as in the text"
        )
    kinds = {kind for module in model.original_model.modules() for kind in _kinds(module)}
    if kinds & set(LENGTH_DEPENDENT):
        raise UnsupportedModelError(
            f"{facts.model}: its rotary embedding ({', '.join(sorted(kinds))}) changes with the length of the "
            f"input, so positions in a cache have no one rotation; restrict_attention keeps positions as in the text"
        )
    room = SHIFTS[-1] if facts.context is None else min(SHIFTS[-1], facts.context - PROBE_LENGTH)
    base = _seen(model, 0)
    moved = {shift: _seen(model, shift) for shift in sorted({1, room}) if shift >= 1}
    found = []
    for layer in range(facts.n_layers):
        best, error = _best(model, base[layer], {shift: seen[layer] for shift, seen in moved.items()})
        tolerance = 5e-3 if model.cfg.dtype in (torch.float32, torch.float64) else 5e-2
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{facts.model}: moving a text by some positions does not rotate the queries and keys of layer {layer} "
                f"by any of its rotary frequencies (off by {error:.2g} of their size). Positions that are learned, and "
                f"added before attention, cannot be counted in a cache afterwards; restrict_attention gives the same "
                f"mask with positions as in the text"
            )
        found.append(best)
    return tuple(found)


def _kinds(module: Any) -> Iterator[str]:
    """The rope types that a rotary module names."""
    named = getattr(module, "rope_type", None)
    if isinstance(named, dict):
        yield from (str(kind) for kind in named.values())
    elif isinstance(named, str):
        yield named


Seen = list[tuple[Tensor, Tensor]]


def _seen(model: TransformerBridge, shift: int) -> Seen:
    """Queries and keys of every layer, as scored, of one text whose first token stands at position ``shift``."""
    facts = capabilities(model)
    kept: Seen = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, view: Any) -> tuple[Tensor, str]:
        kept.append((q.detach(), k.detach()))
        return plain(layer, q, k, v, view)

    def stop(tensor: Tensor, hook: Any) -> None:
        raise StopAtLayerException(tensor[:, :0])

    ids = torch.randint(0, facts.vocabulary, (1, PROBE_LENGTH), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(shift, shift + PROBE_LENGTH)[None].to(model.cfg.device)
    end = (block_output(facts.n_layers - 1), stop)
    try:
        with switched(model, Flash(model, collect=keep)), torch.no_grad():
            model.run_with_hooks(ids.to(model.cfg.device), position_ids=positions, fwd_hooks=[end], return_type=None)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{facts.model}: it does not run at other position_ids ({type(error).__name__}: {str(error)[:200]}), so "
            f"how it counts positions cannot be read off"
        ) from error
    return kept


def _best(model: TransformerBridge, base: tuple[Tensor, Tensor], moved: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The candidate that takes the one run's queries and keys to the others', and what it misses of their size."""
    scored = []
    for turn in _candidates(model, base[0].shape[-1]):
        error = 0.0
        for shift, there in moved.items():
            by = torch.full((PROBE_LENGTH,), shift)
            for x, y in zip(base, there, strict=True):
                gap = (turn(x, by.to(x.device)) - y).abs().max() / y.abs().max().clamp(min=1e-30)
                error = max(error, float(gap))
        scored.append((error, len(scored), turn))
    if not moved:
        raise BadInputError("the context window leaves no room to move a text of 29 tokens")
    error, _, turn = min(scored, key=lambda one: one[:2])
    return turn, error


def _candidates(model: TransformerBridge, size: int) -> Iterator[Turn]:
    """No rotation, and every table of the host in every layout."""
    yield Turn()
    tables: list[Tensor] = []
    for name, buffer in model.original_model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name.rpartition(".")[2] and 0 < 2 * len(buffer) <= size:
            table = buffer.detach().to("cpu", torch.float64)
            if not any(torch.equal(table, other) for other in tables):
                tables.append(table)
    for table in tables:
        for start in sorted({0, size - 2 * len(table)}):
            yield from (Turn(table, start, interleaved) for interleaved in (False, True))
