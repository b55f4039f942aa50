"""What a sink writes in the late layers, straight to the logits: through the final norm, its scale frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import block_output, logit_factor, original
from sinklens.bridge.capabilities import Capabilities, has_hook
from sinklens.bridge.offload import real_weights
from sinklens.decompose.result import NUMBERS
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import has_trained_head
from sinklens.residual.linear_maps import FrozenNorm, frozen_norm

LATE = 0.75  # from this share of the layers on


@dataclass(eq=False)
class _Kept:
    sink: int
    row: int
    attention: Float[Tensor, "head query"]
    vectors: Float[Tensor, "head d_model"]
    norm: FrozenNorm | None
    queries: Int[Tensor, " query"]


class LogitEffects:
    """Collects the late layers' writes during one forward, and turns them into logits at its end.

    A head's write at query i, ``p_i u W_O``, goes through the attention's post-norm (where there is one) and the final
    norm, both with their scale frozen, and through W_U. Encoders and models without a trained head have none: NaN. A
    softcap on the logits is left out.
    """

    def __init__(self, model: TransformerBridge, facts: Capabilities) -> None:
        self.model = model
        names = ("ln_final.hook_in", "ln_final.hook_out")
        self.wanted = facts.causal and has_trained_head(model) and all(has_hook(model, n) for n in names)
        self.first = math.floor(LATE * facts.n_layers)
        self.until = names[1] if self.wanted else block_output(facts.n_layers - 1)
        self._kept: list[_Kept] = []
        self._seen: dict[str, Tensor] = {}
        self._ids = torch.zeros(0, dtype=torch.long)
        self._unembedding: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, one: Tokens) -> None:
        """A new sequence."""
        self._kept.clear()
        self._ids = one.ids[0]

    def hooks(self) -> list[Any]:
        """What the forward has to show."""
        if not self.wanted:
            return []

        def keep(name: str) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                self._seen[name] = tensor[0].detach().to(torch.promote_types(tensor.dtype, torch.float32))

            return hook

        return [("ln_final.hook_in", keep("in")), ("ln_final.hook_out", keep("out"))]

    def keep(
        self,
        sink: int,
        row: int,
        layer: int,
        attention: Float[Tensor, "head query"],
        vectors: Float[Tensor, "head d_model"],
        norm: FrozenNorm | None,
        queries: Int[Tensor, " query"],
    ) -> None:
        """One sink's writes in one layer."""
        if self.wanted and layer >= self.first:
            self._kept.append(_Kept(sink, row, attention, vectors, norm, queries))

    def end(self, values: Float[Tensor, "sink layer head number"]) -> None:
        """Fill in ``logit_target`` and ``logit_rms``."""
        if not self._kept:
            return
        weight, mean, covariance = self._vocabulary()
        final = frozen_norm(original(self.model.ln_final), self._seen["in"], self._seen["out"])
        for kept in self._kept:
            known = kept.queries[kept.queries < len(self._ids) - 1]
            if not len(known):
                continue
            attention = kept.attention[:, : len(known)] if len(known) < len(kept.queries) else kept.attention
            towards = weight[:, self._ids[known + 1]].mT - mean
            towards = final.at(known).adjoint(towards)
            written, scale = kept.vectors, torch.ones_like(attention[0])
            if kept.norm is not None:
                towards = kept.norm.at(known).adjoint(towards)
                written, scale = kept.norm.without_scale().linear(written), kept.norm.scale[known]
            target = attention * (kept.vectors @ towards.mT)
            spread = final.without_scale().linear(written)
            size = torch.einsum("hd,de,he->h", spread, covariance, spread).clamp(min=0).sqrt()
            rms = (attention * scale * final.scale[known]).mean(-1) * size
            for name, value in (("logit_target", target.mean(-1)), ("logit_rms", rms)):
                values[kept.sink, kept.row, :, NUMBERS.index(name)] = value.to(values)

    def _vocabulary(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_U [d_model, vocabulary], its mean column, its columns' covariance."""
        if self._unembedding is None:
            with real_weights(self.model.unembed):
                weight = self.model.W_U.detach().to(self._seen["in"]) * logit_factor(self.model)
            mean = weight.mean(1)
            covariance = weight @ weight.mT / weight.shape[1] - torch.outer(mean, mean)
            self._unembedding = weight, mean, covariance
        return self._unembedding
