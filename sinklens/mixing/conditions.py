"""What mixing is compared under beside the model as it is: each kind of sink gone, and other damage of that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.ablate import ablate_sinks
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.experiment.matched_damage import matched_damage
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.metrics import token_loss

KINDS = ("primary", "secondary", "undetermined")


@dataclass(frozen=True, eq=False)
class MixingConditions:
    """Hook lists by label for :func:`sinklens.compare_mixing`, and what each costs.

    Attributes:
        edits: the hook lists.
        losses: mean loss in nats of the model as it is ("base") and under each; empty where it predicts no tokens.
    """

    edits: dict[str, Sequence[Any]]
    losses: dict[str, float]


@public
def mixing_conditions(
    model: TransformerBridge,
    sinks: SinkMap,
    *,
    doses: Sequence[float] = (),
    control: bool = True,
    seed: int = 0,
) -> MixingConditions:
    """The conditions under which mixing is compared on the tokens of a sink map.

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: the map, on the very tokens that are measured (cut it with :meth:`sinklens.SinkMap.cut`).
        doses: also the primary's attention scaled by these factors.
        control: for each "without" that costs loss, noise of the same loss (:func:`sinklens.matched_damage`).
        seed: of the noise.

    Raises:
        UnsupportedModelError: a model without a bridge.
        BadInputError: doses, and no primary sink to scale.
    """
    capabilities(model)
    edits: dict[str, Sequence[Any]] = {}
    for kind in KINDS:
        chosen = sinks.where(kind=kind)
        if len(chosen):
            edits[f"without {kind} sinks"] = ablate_sinks(model, chosen)
    if len(sinks.primary):
        edits |= {f"primary x {g:g}": ablate_sinks(model, sinks.primary, "scale", g=g) for g in doses}
    elif doses:
        raise BadInputError("doses scale the primary sink, and this text has none")
    losses: dict[str, float] = {}
    try:
        for label, hooks in {"base": [], **edits}.items():
            losses[label] = float(token_loss(model, sinks.tokens, hooks=hooks).double().nanmean())
    except UnsupportedModelError:
        return MixingConditions(edits, {})
    for label in list(edits) if control else ():
        if label.startswith("without"):
            try:
                matched = matched_damage(model, sinks.tokens, edits[label], seed=seed, progress=False)
            except BadInputError:
                continue  # it costs nothing, or nothing reaches it
            edits[f"noise, same loss as {label}"] = matched.hooks
            losses[f"noise, same loss as {label}"] = matched.loss
    return MixingConditions(edits, losses)
