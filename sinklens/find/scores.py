"""``sink_scores``: the attention that every position gets in every head, without ever storing a pattern."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Backend, busy
from sinklens.attention.importance import by_position, column_means, never_far, visibility
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook
from sinklens.bridge.capabilities import Capabilities, capabilities, record
from sinklens.bridge.unbridged import PlainCapabilities, PlainModel
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.intervals import interval
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.find.flash_scores import choose_backend, flash_scores, only
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens, check_positions
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import Advance, progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PATTERN_BYTES = 256 * 2**20  # what one layer's patterns may take per batch


@public_methods
@dataclass(frozen=True, eq=False)
class SinkScores(ShownInJupyter, table="position_table"):
    """Attention per position, layer and head.

    Attributes:
        alpha: importance (Gu et al.): mean attention on a position over the queries that may see it. Positions
            count from each sequence's first unpadded token; NaN beyond its end.
        beta: far importance: the same over queries at least 16 tokens away; NaN with fewer than 32 of them.
        uniform: beta under uniform attention over the allowed keys.
        learned_sink: mean attention that a learned sink takes, a logit or a key (1 minus the row's sum), or None.
        tokens: the sequences.
        info: model, dtype, versions, capability record.
    """

    alpha: Float[Tensor, "batch layer head pos"]
    beta: Float[Tensor, "batch layer head pos"]
    uniform: Float[Tensor, "batch layer pos"]
    learned_sink: Float[Tensor, "batch layer head"] | None
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shape = f"{len(self.tokens)} sequence(s), {self.n_layers} layers x {self.n_heads} heads"
        return f"SinkScores of {self.info.get('model')}: {shape}; sink rate of position 0: {self.sink_rate():.3f}"

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.alpha.shape[1]

    @property
    def n_heads(self) -> int:
        """The number of query heads per layer."""
        return self.alpha.shape[2]

    def _alpha_at(self, position: int) -> Float[Tensor, "batch layer head"]:
        """Alpha at one position, for the sequences that reach it."""
        longest = self.alpha.shape[-1]
        if not 0 <= position < longest:
            raise BadInputError(
                f"position {position} is out of range: positions count from 0 at each sequence's first unpadded token, "
                f"and the longest sequence has {longest}"
            )
        reached = (self.tokens.lengths > position).to(self.alpha.device)
        return self.alpha[reached, :, :, position]

    def _documents_at(self, position: int) -> list[int]:
        reached = (self.tokens.lengths > position).tolist()
        return [d for d, r in zip(self.tokens.documents, reached, strict=True) if r]

    def sink_rate(self, position: int = 0, epsilon: float = 0.3) -> float:
        """``Sink_k^eps``: the share of (sequence, layer, head) with alpha > epsilon at the position (Gu et al. 2025).

        The indicator is taken per sequence, then averaged, as in their released code; the inequality is strict.
        """
        return float((self._alpha_at(position) > epsilon).double().mean())

    def sink_rate_interval(
        self, position: int = 0, epsilon: float = 0.3, confidence: float = 0.95
    ) -> tuple[float, float] | None:
        """The bootstrap-t interval of :meth:`sink_rate` over documents; None with fewer than 16 documents."""
        per_sequence = (self._alpha_at(position) > epsilon).double().mean((1, 2))
        return interval(per_sequence, self._documents_at(position), confidence=confidence)

    def layer_table(self, position: int = 0, epsilon: float = 0.3) -> pd.DataFrame:
        """Per layer: sink rate, mean alpha and beta at the position, and the mean over heads of a uniform layer."""
        alpha = self._alpha_at(position)
        reached = (self.tokens.lengths > position).to(self.alpha.device)
        return pd.DataFrame(
            {
                "layer": range(self.n_layers),
                "sink_rate": (alpha > epsilon).double().mean((0, 2)).tolist(),
                "alpha": alpha.double().mean((0, 2)).tolist(),
                "beta": self.beta[reached, :, :, position].double().nanmean((0, 2)).tolist(),
                "uniform": self.uniform[reached, :, position].double().nanmean(0).tolist(),
            }
        )

    def head_table(self, position: int = 0, epsilon: float = 0.3) -> pd.DataFrame:
        """Per head: sink rate, mean alpha and beta at the position, and the learned sink's mass where there is one."""
        alpha = self._alpha_at(position)
        reached = (self.tokens.lengths > position).to(self.alpha.device)
        table = pd.DataFrame(
            {
                "layer": torch.arange(self.n_layers).repeat_interleave(self.n_heads).tolist(),
                "head": list(range(self.n_heads)) * self.n_layers,
                "sink_rate": (alpha > epsilon).double().mean(0).flatten().tolist(),
                "alpha": alpha.double().mean(0).flatten().tolist(),
                "beta": self.beta[reached, :, :, position].double().nanmean(0).flatten().tolist(),
            }
        )
        if self.learned_sink is not None:
            table["learned_sink"] = self.learned_sink[reached].double().mean(0).flatten().tolist()
        return table

    def position_table(self) -> pd.DataFrame:
        """Per token: text, mean alpha, mean beta and mean uniform share over all layers and heads, by beta.

        Where a sequence is too short for beta (fewer than 32 far queries), beta is NaN and the token sorts last.
        """
        rows = []
        alpha, beta = self.alpha.double().mean((1, 2)), self.beta.double().nanmean((1, 2))
        uniform = self.uniform.double().nanmean(1)
        for sequence, labels in enumerate(self.tokens.labels):
            ids = self.tokens.row(sequence).tolist()
            for position, label in enumerate(labels):
                where = (sequence, position)
                values = float(alpha[where]), float(beta[where]), float(uniform[where])
                rows.append((*where, ids[position], label, *values))
        columns = ["sequence", "position", "token_id", "token", "alpha", "beta", "uniform"]
        table = pd.DataFrame(rows, columns=pd.Index(columns))
        return table.sort_values(["beta", "alpha"], ascending=False, na_position="last", ignore_index=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per (sequence, layer, head, position) with alpha, beta and the uniform share."""
        present = ~self.alpha.isnan()
        sequence, layer, head, position = (index.numpy() for index in present.cpu().nonzero(as_tuple=True))
        uniform = self.uniform[:, :, None].expand_as(self.alpha)
        ids = torch.zeros(len(self.tokens), self.alpha.shape[-1], dtype=torch.long)
        for i in range(len(self.tokens)):
            row = self.tokens.row(i).cpu()
            ids[i, : len(row)] = row
        return pd.DataFrame(
            {
                "sequence": sequence.astype("int32"),
                "layer": layer.astype("int16"),
                "head": head.astype("int16"),
                "position": position.astype("int32"),
                "token_id": ids.numpy()[sequence, position].astype("int32"),
                "alpha": self.alpha[present].cpu().numpy(),
                "beta": self.beta[present].cpu().numpy(),
                "uniform": uniform[present].cpu().numpy(),
            }
        )

    def plot(self, position: int = 0, epsilon: float = 0.3) -> Figure:
        """Layer x head heat map of alpha at a position; hover shows alpha, beta and the sink rate."""
        from sinklens.find.score_figures import head_map  # plotly is slow to load

        return head_map(self, position, epsilon)

    def plot_image(
        self, image: int = 0, layers: Sequence[int] | None = None, *, heads: Sequence[int] | None = None
    ) -> Figure:
        """Attention on patches, drawn over the picture: :func:`sinklens.find.image_map`."""
        from sinklens.find.image_figures import image_map  # plotly is slow to load

        return image_map(self, image, layers, heads=heads)

    def plot_positions(self, sequence: int = 0, columns: int | None = None) -> Figure:
        """Layer x position heat map of one sequence, or of its first ``columns`` tokens: where the sinks are."""
        from sinklens.find.score_figures import position_map  # plotly is slow to load

        return position_map(self, sequence, columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file with a JSON header, whole or not at all."""
        tensors = {"alpha": self.alpha, "beta": self.beta, "uniform": self.uniform}
        if self.learned_sink is not None:
            tensors["learned_sink"] = self.learned_sink
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        return save_tensors(path, "SinkScores", tensors, {"tokens": self.tokens.meta(), "info": self.info})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkScores:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "SinkScores")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            alpha=tensors["alpha"],
            beta=tensors["beta"],
            uniform=tensors["uniform"],
            learned_sink=tensors.get("learned_sink"),
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            info=meta["info"],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[SinkScores]) -> SinkScores:
        """Scores of several batches, measured apart, as one: nothing is lost."""
        if not parts:
            raise BadInputError("there is nothing to concatenate")
        longest = max(part.alpha.shape[-1] for part in parts)

        def join(name: str) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            pads = [(0, longest - t.shape[-1]) for t in tensors]
            padded = [torch.nn.functional.pad(t, p, value=torch.nan) for t, p in zip(tensors, pads, strict=True)]
            return torch.cat(padded)

        rests = [part.learned_sink for part in parts if part.learned_sink is not None]
        return cls(
            alpha=join("alpha"),
            beta=join("beta"),
            uniform=join("uniform"),
            learned_sink=torch.cat(rests) if rests else None,
            tokens=Tokens.concatenate([part.tokens for part in parts]),
            info=parts[0].info,
        )


@public
def sink_scores(
    model: TransformerBridge | PlainModel,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    positions: int | Sequence[int] | None = None,
    backend: Backend = "auto",
    progress: bool | None = None,
) -> SinkScores:
    """Importance alpha and far importance beta of every position in every head (docs/definitions.md, section 1).

    ``alpha[b,l,h,k]`` is the mean of ``A[i,k]`` over the unpadded queries i that may see k, ``beta`` the same over
    those with ``|i - k| >= 16``. Sliding windows, padding on either side and bidirectional models are counted as
    the model sees them; a learned sink's mass is reported, never renormalised away.

    Args:
        model: from :func:`sinklens.load_model`, or any raw TransformerBridge.
        tokens: a text, a list of texts, token ids, Tokens, or Images.
        positions: only these; alpha and beta of all others are NaN (with ``"flash"`` the cheapest way there is).
        backend: ``"flash"`` runs one blocked pass in O(T) memory (:func:`sinklens.flash`); ``"hooks"`` reads
            ``hook_pattern``; ``"auto"`` takes flash where the model's proof allows it. ``info`` says which ran.
        progress: show a bar; default in terminals and notebooks.

    Cost: one forward without the unembedding. Memory: with flash O(T); with hooks one layer's pattern at a time, as in
    the plain forward, and blocks of 128 query rows. Sequences are taken in batches that keep a layer's patterns (with
    flash, what the pattern would be, shared by 8) below 256 MB.

    Raises:
        BadInputError: unusable input or backend.
        UnsupportedModelError: a layer attends outside what its configuration declares, or yields NaN.
    """
    batch = as_tokens(model, tokens)
    facts = record(model)
    way = choose_backend(model, backend)
    wanted = _positions(positions, batch)
    groups = _groups(batch, facts, way)
    with progress_bar("sink scores", len(groups) * facts.n_layers, progress) as advance:
        if way == "flash":
            found = [flash_scores(model, batch[rows].trim(), wanted, advance) for rows in groups]
        else:
            assert isinstance(model, TransformerBridge)  # choose_backend saw to it
            found = [(*_score_group(model, batch[rows].trim(), wanted, advance), {}) for rows in groups]
    longest = int(batch.lengths.max())
    alpha = torch.full((len(batch), facts.n_layers, facts.n_heads, longest), torch.nan)
    beta, uniform = alpha.clone(), alpha[:, :, 0].clone()
    rest = torch.zeros(len(batch), facts.n_layers, facts.n_heads)
    for rows, (a, b, u, r, _) in zip(groups, found, strict=True):
        alpha[rows, ..., : a.shape[-1]] = a
        beta[rows, ..., : b.shape[-1]] = b
        uniform[rows, ..., : u.shape[-1]] = u
        rest[rows] = r
    dtype = model.dtype if isinstance(model, PlainModel) else model.cfg.dtype
    info: dict[str, Any] = {"capabilities": asdict(facts), "dtype": str(dtype), "backend": way}
    if way == "flash":
        info["kernels"] = sorted({path for *_, paths in found for path in paths.values()})
    return SinkScores(
        alpha=alpha,
        beta=beta,
        uniform=uniform,
        learned_sink=rest if facts.learned_sinks or _has_slot(facts) else None,
        tokens=batch.to("cpu"),
        info=info,
    )


def _has_slot(facts: Capabilities | PlainCapabilities) -> bool:
    """Whether a learned key takes what is missing from each row (lab models with a K or KV bias)."""
    return isinstance(facts, Capabilities) and facts.shares and not facts.rows_sum_to_one


def _positions(given: int | Sequence[int] | None, batch: Tokens) -> tuple[int, ...] | None:
    if given is None:
        return None
    wanted = check_positions([given] if isinstance(given, int) else given)
    longest = int(batch.lengths.max())
    if not wanted or max(wanted) >= longest:
        raise BadInputError(f"positions must lie between 0 and {longest - 1}, the last of the longest sequence")
    return wanted


def _groups(batch: Tokens, facts: Capabilities | PlainCapabilities, way: str) -> list[list[int]]:
    """Sequences that run together: of similar length, a layer's patterns below the memory limit."""
    limit = PATTERN_BYTES * (8 if way == "flash" else 1)
    order = batch.lengths.argsort(descending=True, stable=True).tolist()
    groups: list[list[int]] = []
    for row in order:
        longest = int(batch.lengths[groups[-1][0]]) if groups else 0
        if groups and (len(groups[-1]) + 1) * facts.n_heads * longest**2 * 4 <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _score_group(
    model: TransformerBridge,
    batch: Tokens,
    positions: tuple[int, ...] | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alpha, beta, uniform and row rest of one group, by position, on the CPU."""
    facts = capabilities(model)
    seen_by = {w: visibility(batch.mask, causal=facts.causal, window=w) for w in set(facts.windows)}
    edited = busy(model)
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    rest: list[Tensor] = []

    def reduce(pattern: Tensor, hook: Any) -> None:
        layer = len(alpha)
        window = facts.windows[layer]
        found = column_means(pattern, batch.mask, seen_by[window], causal=facts.causal, window=window)
        if not found.outside <= 1e-3:  # also catches NaN
            raise UnsupportedModelError(
                f"{facts.model}: layer {layer} puts {found.outside:.2g} of a query's attention outside what its "
                f"configuration declares (window={window}, causal={facts.causal}), or yields NaN; alpha would be wrong"
            )
        if window is None and never_far(pattern, batch.mask):
            if edited:
                raise BadInputError(
                    f"the hooks now on the model leave distant keys no attention in layer {layer} (restrict_attention "
                    f"does), and alpha counts every query that the model's own mask lets see a key; score the model "
                    f"without them, and measure what they change with run_experiment"
                )
            raise UnsupportedModelError(
                f"{facts.model}: layer {layer} gives exactly no attention to distant keys although its configuration "
                f"declares no window; alpha would have a wrong denominator. Please report this architecture"
            )
        alpha.append(only(by_position(found.alpha, batch.mask).cpu(), positions))
        beta.append(only(by_position(found.beta, batch.mask).cpu(), positions))
        rest.append(found.row_rest.cpu())
        advance()

    hooks: list[Any] = [(attention_hook(layer, "hook_pattern"), reduce) for layer in range(facts.n_layers)]
    run_blocks(model, batch.ids, hooks, mask=batch.mask)
    uniform = [by_position(seen_by[window].uniform, batch.mask).cpu() for window in facts.windows]
    return torch.stack(alpha, 1), torch.stack(beta, 1), torch.stack(uniform, 1), torch.stack(rest, 1)
