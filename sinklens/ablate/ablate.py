"""``ablate_sinks``: edits of what heads do with sinks, as TransformerLens hooks (docs/definitions.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.edit_hooks import edit_hooks, refuse_unless_editable
from sinklens.ablate.hooks import Hooks
from sinklens.ablate.partition import Mode, Value
from sinklens.ablate.reference import Reference, gather_reference
from sinklens.ablate.selection import Heads, Layers, select
from sinklens.ablate.sink_edit import Ablation, SinkEdit
from sinklens.attention.backend import Backend
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.find.locations import Places, Sinks, find_places
from sinklens.forward.follow import Forward
from sinklens.inputs.tokens import Tokens

WITHOUT_LEARNED = ("zero", "value_only", "mean_value", "fixed_key")


@public
def ablate_sinks(
    model: TransformerBridge,
    sinks: Sinks,
    mode: Mode = "renormalize",
    *,
    layers: Layers = None,
    heads: Heads = None,
    to: Literal["all", "ordinary"] = "all",
    neutral: Literal["bias", "zero"] = "bias",
    value: Value = "kept",
    g: float | None = None,
    target: int | None = None,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    allow_identity: bool = False,
    backend: Backend = "auto",
    progress: bool | None = None,
) -> Hooks:
    """Hooks that change what heads do with sinks, and nothing else.

    With ``o = (1 - sigma) o_R + sigma o_S`` (S: the sinks, R: every other key that the query may see):

    ================  =============================================  ==================================================
    ``renormalize``   ``o_R``                                        the sink never existed for this head
    ``zero``          ``(1 - sigma) o_R (+ sigma b_V)``              the mass is parked, nothing is written
    ``value_only``    ``o_R + sigma (o_S - b_V)``                    what it writes, without taking mass
    ``scale``         ``lse_S += log g``                             dose-response; g = 0 is ``renormalize``
    ``mean_value``    ``o_S`` from its mean over other sequences     is what it writes the same everywhere?
    ``fixed_key``     key: mean over other sequences                 a key bias in Gu's sense
    ``fixed_logit``   margin: corpus mean per head                   a constant offset
    ``null``          ``lse_S := 0, o_S := 0``                       StreamingLLM's zero sink in the sink's place
    ``move``          ``o_S = v_target``                             the mass lands on another token
    ``uniform``       ``(1 - sigma) o_R + sigma mean_R v``           the mass is spread evenly over the rest
    ================  =============================================  ==================================================

    A query whose only visible keys are sinks keeps what it had, as does one that sees no sink (or, for ``move``, not
    the target). Elements that an edit leaves alone stay the kernel's own, bit for bit.

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: a SinkMap (each sink is edited in the layers of its lives, on the map's own tokens), positions (in every
            sequence and layer), a predicate ``ids -> bool mask``, or "learned" (gpt-oss's logit), also in a list.
        mode: see above.
        layers, heads: where; heads as numbers, or (layer, head) pairs. Default: everywhere.
        to: "all", or "ordinary": the other sinks of the SinkMap, and a learned logit, keep exactly the mass they had,
            and S and the ordinary keys share the rest.
        neutral: "bias" (writing nothing means writing ``sigma b_V``) or "zero".
        value: of ``fixed_key`` and ``fixed_logit``: "kept", "neutral" or "mean".
        g: for ``scale``, at least 0.
        target: for ``move``, a position.
        reference: where the means come from; default: the other documents of the SinkMap, else 16 of python-docs.
        allow_identity: run an edit whose source equals its target instead of refusing it.
        backend: "auto": hooks that edit the pattern in plain forwards and work inside :func:`sinklens.flash` too;
            "hooks" and "flash" refuse the other.
        progress: show a bar while the reference is read.

    Raises:
        BadInputError: bad options or places; while running: sequences that are not the SinkMap's, positions out of
            range, a predicate that chooses nothing, a mean that equals what it replaces (to 1e-6).
        UnsupportedModelError: the host's attention cannot be edited by hooks (OPT, BERT, ViT), or lacks what the mode
            needs.

    Cost: a few pattern-sized temporaries in each edited layer; for the modes with a mean one forward per reference
    sequence when the hooks are built. Source: docs/definitions.md, section 3.
    """
    options = Ablation(mode, to, neutral, value, g, target, allow_identity)
    places = find_places(sinks)
    _check(options, places, model, backend)
    chosen = select(capabilities(model), places, layers, heads)
    found = None
    if options.needs:
        found = gather_reference(model, places, reference, chosen.layers, needs=options.needs, progress=progress)
        _check_counterparts(mode, places, found, chosen.layers)

    def build(other: TransformerBridge | None, elsewhere: Places | None) -> Hooks:
        arguments: dict[str, Any] = {"layers": layers, "heads": heads, "to": to, "neutral": neutral, "value": value}
        arguments |= {"g": g, "target": target, "reference": reference, "allow_identity": allow_identity}
        there = places if elsewhere is None else elsewhere
        return ablate_sinks(other or model, there, mode, **arguments, backend=backend, progress=False)

    name = f"{mode}({g:g})" if mode == "scale" and g is not None else mode
    forward = Forward(model, places.tokens)
    hooks = Hooks((), name=name, build=build, places=places, layers=chosen.layers, backend=backend)
    edit = SinkEdit(model, options, places, chosen, found, forward, hooks)
    if not (mode == "scale" and g == 1):
        hooks.extend(
            edit_hooks(
                model,
                forward,
                edit,
                chosen.layers,
                values=options.replaces_value,
                keys=mode == "fixed_key",
                bias=options.writes_bias,
                backend=backend,
            )
        )
    return hooks


def _check(options: Ablation, places: Places, model: TransformerBridge, backend: Backend) -> None:
    facts = capabilities(model)
    mode = options.mode
    if (options.g is not None) != (mode == "scale") or (options.g is not None and not 0 <= options.g < math.inf):
        raise BadInputError(f"mode 'scale' needs g >= 0 and only it takes g; got mode {mode!r}, g={options.g}")
    if (options.target is not None) != (mode == "move") or (options.target or 0) < 0:
        raise BadInputError(
            f"mode 'move' needs a target position and only it takes one; got {mode!r}, {options.target}"
        )
    if options.value != "kept" and mode not in ("fixed_key", "fixed_logit"):
        raise BadInputError(f"value= belongs to fixed_key and fixed_logit, not to {mode!r}")
    if options.target in places.positions:
        raise BadInputError(f"the target {options.target} is one of the sinks; mass cannot be moved to where it is")
    if options.to == "ordinary" and places.tokens is None:
        raise BadInputError("to='ordinary' needs a SinkMap: it says which other sinks may not gain")
    if places.recent and options.needs:
        raise BadInputError(f"{mode!r} takes means over other sequences; the most recent tokens have none")
    if places.learned and not facts.learned_sinks:
        raise BadInputError(f"{facts.model} has no learned sink; name positions instead")
    if places.learned and (mode in WITHOUT_LEARNED or options.replaces_value):
        raise BadInputError(f"the learned sink is a logit without key or value, so {mode!r} has no meaning for it")
    refuse_unless_editable(model, backend, values=options.replaces_value or options.writes_bias)


def _check_counterparts(mode: str, places: Places, found: Reference, layers: Sequence[int]) -> None:
    """Refuse a SinkMap none of whose sinks has a counterpart in another document: nothing would change."""
    if places.tokens is None:
        return
    own = found.tokens.digest == places.tokens.digest
    for entry in places.entries:
        without = places.tokens.documents[entry.sequence] if own else None
        for layer in layers:
            if mode == "fixed_logit" and found.has_margin(layer, without):
                return
            if mode != "fixed_logit" and found.has(layer, entry.group, without):
                return
    raise BadInputError(
        f"{mode} needs other documents with such sinks alive in these layers, and there are none; give reference= more "
        f"sequences, or other layers="
    )
