"""What every check of the self-test works on, and how it reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.check.reference_forward import Edit, Written, plain, write_out
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.find.lifetimes import Thresholds
from sinklens.find.scores import SinkScores, sink_scores
from sinklens.find.sinkmap import Sink, SinkMap
from sinklens.find.sinks import from_scores
from sinklens.forward.predictions import predictions
from sinklens.inputs.tokens import Tokens

LENGTH = 56  # tokens: position 8 still has 32 far queries
SHORT = 8  # for Jacobians
SINKS = (0, 7)


@dataclass(eq=False)
class Parts:
    """The measured errors of one function by part, and the parts that were refused, with the reason."""

    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, measure: Callable[[], float]) -> None:
        """Measure one part; a refusal is kept, any other exception is the caller's."""
        try:
            self.errors[name] = float(measure())
        except UnsupportedModelError as error:
            self.refused[name] = str(error)


@dataclass(eq=False)
class Subject:
    """A model, two sequences of 56 tokens, two more as a reference, and two sinks at known places.

    The sinks are declared, not found: what is checked is what functions make of given sinks.
    """

    model: Any  # a TransformerBridge, or a PlainModel, on which most functions raise
    tokens: Tokens
    reference: Tokens
    mask_id: int | None = None

    @cached_property
    def facts(self) -> Capabilities:
        """The capability record."""
        return capabilities(self.model)

    @cached_property
    def ids(self) -> Tensor:
        """[2, 56]."""
        return self.tokens.ids.to(self.model.cfg.device)

    @cached_property
    def base(self) -> Written:
        """The model with attention written out."""
        return write_out(self.model, self.ids, logits=True)

    def written(self, edit: Edit = plain, hooks: Sequence[Any] = (), *, logits: bool = False) -> Written:
        """The same with an edit."""
        return write_out(self.model, self.ids, edit, hooks=hooks, logits=logits)

    @cached_property
    def scores(self) -> SinkScores:
        """By the hooks backend."""
        return sink_scores(self.model, self.tokens, backend="hooks", progress=False)

    @cached_property
    def sinks(self) -> SinkMap:
        """Position 0 as a primary sink in every layer, position 7 as a secondary one from layer 1 on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            found = from_scores(self.scores, Thresholds())
        sinks = []
        for b in range(len(self.tokens)):
            for position, kind, onset in zip(SINKS, ("primary", "secondary"), (0, 1), strict=True):
                sinks.append(_declared(found, b, position, kind, onset))
        places = tuple((s.sequence, s.position) for s in sinks)
        first = (SINKS[0],) * len(self.tokens)
        return replace(found, sinks=tuple(sinks), strongest=first, unattended=(), places=places, notes=())

    def states(self, hooks: Sequence[Any] = ()) -> Float[Tensor, "layer batch pos d_model"]:
        """Block outputs of the host, with hooks."""
        kept: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            kept.append(tensor.detach().double().cpu())

        ends = [(block_output(n), keep) for n in range(self.facts.n_layers)]
        with torch.no_grad():
            self.model.run_with_hooks(self.ids, fwd_hooks=[*hooks, *ends], return_type=None)
        return torch.stack(kept)

    def edited(self, hooks: Sequence[Any], edit: Edit = plain, plain_hooks: Sequence[Any] = ()) -> float:
        """How far hooks of the package are from the written-out edit, as a share of what the edit changes.

        Per token ``|ours - reference| / |reference|``, the largest over tokens of the last block, over the largest
        ``|reference - base| / |reference|``.

        Raises:
            BadInputError: the edit changes nothing, so there is nothing to compare.
        """
        ours, theirs = self.states(hooks)[-1], self.written(edit, plain_hooks).states[-1]
        effect = apart(theirs, self.base.states[-1])
        if not effect > 1e-5:
            raise BadInputError("this edit changes nothing on these tokens, so nothing can be compared")
        return apart(ours, theirs) / effect

    def logits(
        self, ids: Tensor, edit: Edit = plain, hooks: Sequence[Any] = ()
    ) -> Float[Tensor, "batch pos vocabulary"]:
        """The logits that predict: entry p is of token p + 1, in encoders of token p, masked there.

        Encoders with an edit must have the same ids of each masked copy, so the edit may look at positions only.
        """
        if self.facts.causal:
            found = write_out(self.model, ids, edit, hooks=hooks, logits=True).logits
            assert found is not None
            return found.double().cpu()
        known = predictions(self.model, self.mask_id)
        rows = []
        for row in ids:
            copies = row.expand(len(row), -1).clone()
            copies.fill_diagonal_(known.mask_id or 0)
            found = write_out(self.model, copies, edit, hooks=hooks, logits=True).logits
            assert found is not None
            rows.append(found.double().cpu().diagonal().T)
        return torch.stack(rows)

    def losses(self, ids: Tensor, edit: Edit = plain, hooks: Sequence[Any] = ()) -> Float[Tensor, "batch pos"]:
        """Losses in nats of those predictions; NaN where there is none."""
        shown = self.logits(ids, edit, hooks).log_softmax(-1)
        if not self.facts.causal:
            return -shown.gather(-1, ids.cpu()[..., None])[..., 0]
        loss = -shown[:, :-1].gather(-1, ids[:, 1:, None].cpu())[..., 0]
        return torch.nn.functional.pad(loss, (0, 1), value=torch.nan)


def apart(ours: Float[Tensor, "*any d"], theirs: Float[Tensor, "*any d"]) -> float:
    """The largest ``|ours - theirs| / |theirs|`` over vectors."""
    size = theirs.norm(dim=-1).clamp(min=1e-30)
    return float(((ours - theirs).norm(dim=-1) / size).max())


def gap(ours: Any, theirs: Any) -> float:
    """The largest difference of two tensors (equal NaNs are equal), over the largest entry of the second, or 1."""
    a, b = torch.as_tensor(ours).double().cpu(), torch.as_tensor(theirs).double().cpu()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not torch.equal(a.isinf(), b.isinf()) or bool((a[a.isinf()] != b[b.isinf()]).any()):
        return float("inf")
    known = b.isfinite()
    if not bool(known.any()):
        return 0.0
    return float((a - b)[known].abs().max() / max(1.0, float(b[known].abs().max())))


def _declared(found: SinkMap, b: int, position: int, kind: str, onset: int) -> Sink:
    masses = tuple(found.mass[b, :, position].tolist())
    end = found.n_layers - 1
    onset = min(onset, end)
    mass = sum(masses[onset:]) / len(masses[onset:])
    token_id = int(found.tokens.row(b)[position])
    return Sink(
        sequence=b, position=position, token=found.tokens.labels[b][position], token_id=token_id, kind=kind,
        reason="" if kind == "primary" else "late_onset", onset=onset, end=end, lifetime=end - onset + 1, mass=mass,
        bridged=0, episodes=((onset, end, mass),), masses=masses, heads=((end, 0),), attended=True,
    )  # fmt: skip
