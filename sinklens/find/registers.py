"""``register_tokens``: patches that an image model uses as registers, told by the norm of the residual stream.

Darcet et al. 2024 (2309.16588): large, long-trained vision transformers turn a few patches of empty background into
scratch paper; their output tokens have norms that stand apart (DINOv2-g: above 150, the others below 100), and they
hold global instead of local information. Jiang et al. 2025 (2506.08010) take mean + 3 standard deviations of the
patches' norms. Both numbers are in the table; the default rule here is the one of the direction method
(docs/definitions.md, 2): at least 3 times the median of the picture's patches at that layer, since an absolute norm
belongs to one model and mean + 3 sd flags some patch of nearly every picture.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.bridge.capabilities import capabilities
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.forward.states import stream
from sinklens.inputs.images import Images, as_images
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from sinklens.find.scores import SinkScores

AT_ONCE = 4  # pictures in one forward


@public_methods
@dataclass(frozen=True, eq=False)
class Registers(ShownInJupyter):
    """Norms of every token after every block, and the rules that they are judged by.

    Attributes:
        norms: Euclidean norm of the stream after block l, before any final norm.
        tokens: the pictures.
        ratio: a patch is high where its norm is at least ``ratio`` times the median of the picture's patches.
        norm: absolute threshold of Darcet et al., or None.
        sigmas: Jiang et al.: ``mean + sigmas * sd`` over the picture's patches.
        layer: the block after which patches are judged.
        model: its name.
    """

    norms: Float[Tensor, "batch layer pos"]
    tokens: Images
    ratio: float
    norm: float | None
    sigmas: float
    layer: int
    model: str

    @property
    def relative(self) -> Float[Tensor, "batch layer pos"]:
        """Norms divided by the median of the picture's patches at that layer."""
        return self.norms / self._patches.median(-1, keepdim=True).values

    @property
    def _patches(self) -> Float[Tensor, "batch layer patch"]:
        return self.norms[..., self.tokens.prefix :]

    @property
    def high(self) -> Bool[Tensor, "batch layer pos"]:
        """By the rule in force: ``norm`` where it is given, else ``ratio``. Only patches."""
        found = self.relative >= self.ratio if self.norm is None else self.norms > self.norm
        found[..., : self.tokens.prefix] = False
        return found

    @property
    def unusual(self) -> Bool[Tensor, "batch layer pos"]:
        """Patches above mean + sigmas x sd of the picture's patches (Jiang et al.)."""
        mean, sd = self._patches.mean(-1, keepdim=True), self._patches.std(-1, keepdim=True)
        found = self.norms > mean + self.sigmas * sd
        found[..., : self.tokens.prefix] = False
        return found

    def positions(self, image: int = 0) -> list[int]:
        """The register patches of one picture, judged after block ``layer``; positions as in SinkScores."""
        if not 0 <= image < len(self.tokens):
            raise BadInputError(f"image {image} is out of range: there are {len(self.tokens)}")
        return self.high[image, self.layer].nonzero().flatten().tolist()

    def __repr__(self) -> str:
        found = int(self.high[:, self.layer].sum())
        top = float(self.relative[:, :, self.tokens.prefix :].max())
        return (
            f"Registers of {self.model}: {found} of {self._patches[:, 0].numel()} patches in {len(self.tokens)} "
            f"picture(s) after block {self.layer} ({self.rule}); the largest norm of a patch anywhere is {top:.2f} "
            f"times its layer's median"
        )

    @property
    def rule(self) -> str:
        """The rule in force, in words."""
        return f"norm > {self.norm:g}" if self.norm is not None else f"norm >= {self.ratio:g} x the patches' median"

    def to_dataframe(self, scores: SinkScores | None = None) -> pd.DataFrame:
        """One row per token that is high in any layer, and per [CLS] and register of the model's own.

        Columns: ``sequence, position, token, patch`` (whether it is one), ``row, column``; ``onset, layers`` (the
        first block after which it is high, and how many); ``largest`` (norm over median, over layers); ``norm,
        relative, high, unusual`` after block ``layer``; with ``scores`` of the same pictures ``alpha``, the attention
        that it gets, and ``share``, alpha over the uniform share (mean over layers and heads).
        """
        if scores is not None and scores.tokens.digest != self.tokens.digest:
            raise BadInputError("scores= belong to other pictures; score these")
        rows: list[dict[str, Any]] = []
        high, relative, unusual = self.high, self.relative, self.unusual
        prefix, (_, columns) = self.tokens.prefix, self.tokens.grid
        for b, p in (high.any(1) | self.tokens.special.cpu()).nonzero().tolist():
            at = high[b, :, p].nonzero().flatten().tolist()
            row: dict[str, Any] = {
                "sequence": b,
                "position": p,
                "token": self.tokens.labels[b][p],
                "patch": p >= prefix,
                "row": (p - prefix) // columns if p >= prefix else math.nan,
                "column": (p - prefix) % columns if p >= prefix else math.nan,
                "onset": at[0] if at else math.nan,
                "layers": len(at),
                "largest": float(relative[b, :, p].max()),
                "norm": float(self.norms[b, self.layer, p]),
                "relative": float(relative[b, self.layer, p]),
                "high": bool(high[b, self.layer, p]),
                "unusual": bool(unusual[b, self.layer, p]),
            }
            if scores is not None:
                row["alpha"] = float(scores.alpha[b, ..., p].double().mean())
                row["share"] = row["alpha"] * self.norms.shape[-1]
            rows.append(row)
        names = ["sequence", "position", "token", "patch", "row", "column", "onset", "layers", "largest", "norm"]
        names += ["relative", "high", "unusual", *(("alpha", "share") if scores is not None else ())]
        return pd.DataFrame(rows, columns=pd.Index(names))

    def by_layer(self) -> pd.DataFrame:
        """Per block: the patches' median norm, the largest and [CLS]'s relative norm, and the patches per rule."""
        patches, relative = self._patches, self.relative
        prefix = self.tokens.prefix
        return pd.DataFrame(
            {
                "layer": range(self.norms.shape[1]),
                "median": patches.median(-1).values.mean(0).tolist(),
                "largest": relative[..., prefix:].amax((0, 2)).tolist(),
                "first": relative[..., 0].mean(0).tolist() if prefix else [math.nan] * self.norms.shape[1],
                "high": self.high.sum((0, 2)).tolist(),
                "unusual": self.unusual.sum((0, 2)).tolist(),
            }
        )

    def plot(self) -> Figure:
        """Norms over layers: the patches' spread, the largest patch, [CLS], and the rule."""
        from sinklens.find.image_figures import register_figure  # plotly is slow to load

        return register_figure(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file with a JSON header, whole or not at all."""
        tensors = {"norms": self.norms, **{f"tokens.{name}": t for name, t in self.tokens.tensors().items()}}
        rules = {"ratio": self.ratio, "norm": self.norm, "sigmas": self.sigmas, "layer": self.layer}
        return save_tensors(
            path, "Registers", tensors, {"tokens": self.tokens.meta(), "rules": rules, "model": self.model}
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Registers:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Registers")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        tokens = Images.from_parts(batch, meta["tokens"])
        assert isinstance(tokens, Images)
        return cls(norms=tensors["norms"], tokens=tokens, model=meta["model"], **meta["rules"])


@public
def register_tokens(
    model: PlainModel | TransformerBridge,
    images: Images | Tokens,
    *,
    ratio: float = 3.0,
    norm: float | None = None,
    sigmas: float = 3.0,
    layer: int = -1,
    progress: bool | None = None,
) -> Registers:
    """Patches with norms that stand apart, as registers have (Darcet et al. 2024; see the module's first lines).

    Args:
        model: an image model of :func:`sinklens.load_model`.
        images: of :func:`sinklens.load_images`.
        ratio: times the median norm of the picture's patches, at the same layer.
        norm: an absolute threshold instead, such as 150 for DINOv2's large models.
        sigmas: of the second published rule, reported beside the first.
        layer: the block after which patches are judged; default the last, as published. ``by_layer`` has all.
        progress: show a bar; default in terminals and notebooks.

    Cost: one forward per picture.

    Raises:
        BadInputError: thresholds that are no positive numbers, a layer out of range, no images.
        UnsupportedModelError: the model reads text, or its blocks form no stream.
    """
    if not isinstance(model, PlainModel):
        capabilities(model)
        raise UnsupportedModelError("register_tokens needs a model that reads images; find_sinks works on text")
    facts = model.capabilities
    if facts.reads != "images":
        raise UnsupportedModelError(
            f"{facts.model} reads text; register_tokens is about pictures' patches, use find_sinks"
        )
    for name, value in (("ratio", ratio), ("norm", 1.0 if norm is None else norm), ("sigmas", sigmas)):
        if not (math.isfinite(value) and value > 0):
            raise BadInputError(f"{name} must be a positive number, got {value}")
    if not -facts.n_layers <= layer < facts.n_layers:
        raise BadInputError(f"layer {layer} is out of range: the model has {facts.n_layers}")
    batch = as_images(model, images)
    found: list[Tensor] = []
    with progress_bar("token norms", len(batch), progress) as advance:
        for start in range(0, len(batch), AT_ONCE):
            part = batch[start : start + AT_ONCE]
            norms: list[Tensor] = []
            stream(model, part, lambda _, state, norms=norms: norms.append(state.float().norm(dim=-1).cpu()))
            found.append(torch.stack(norms[1:], 1))
            for _ in range(len(part)):
                advance()
    return Registers(torch.cat(found), batch.to("cpu"), ratio, norm, sigmas, layer % facts.n_layers, facts.model)
