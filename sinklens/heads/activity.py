"""``head_activity``: what heads put out, and how much of it comes from each token: the measures of two papers.

====================  ================================================================================================
``first_token``       AWFT: mean over queries of ``A_i0``
``ahon``              AHON: mean over queries of ``|(A V)_i|``, before W_O
``ahon_ln``           AHON-LN: AHON over its mean over the heads of the layer; a head is **dormant** below a threshold
``contribution``      mean over the queries that see k of ``|A_ik f(x_k)|``, ``f(x) = (x W_V + b_V) W_O``
====================  ================================================================================================

Sources: AWFT, AHON and AHON-LN: Sandoval-Segura et al. 2025 (2504.03889), as in their code; contributions:
Kobayashi et al. 2020 (2004.10102), whose f contains b_V (elsewhere in this package b_V is taken out).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, by_head, output_weights
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.bridge.requirements import refuse_unless_softmax
from sinklens.core.errors import BadInputError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.core.visibility import allowed_keys
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

KIND = "HeadActivity"


@public_methods
@dataclass(frozen=True, eq=False)
class HeadActivity(ShownInJupyter):
    """What :func:`head_activity` measured; positions count from each sequence's first unpadded token.

    Attributes:
        first_token, ahon, ahon_ln: see the module.
        contribution: of every token; NaN beyond a sequence's end, and where the host does not show W_O by head.
        tokens, info: what was measured.
    """

    first_token: Float[Tensor, "batch layer head"]
    ahon: Float[Tensor, "batch layer head"]
    ahon_ln: Float[Tensor, "batch layer head"]
    contribution: Float[Tensor, "batch layer head pos"]
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        batch, layers, heads = self.ahon.shape
        dormant = int(self.dormant().sum())
        return f"HeadActivity: {batch} sequence(s), {layers} layers of {heads} heads, {dormant} dormant"

    def dormant(self, threshold: float = 0.5) -> Bool[Tensor, "layer head"]:
        """Heads whose AHON-LN, averaged over sequences, is below the threshold.

        The paper takes thresholds from the distribution over heads, so that 0, 5, ..., 30 % of them fall below.

        Raises:
            BadInputError: a threshold that is not positive.
        """
        if not threshold > 0:
            raise BadInputError(f"threshold must be positive, got {threshold}: no head has an AHON-LN below 0")
        return self.ahon_ln.double().mean(0) < threshold

    def to_dataframe(self) -> pd.DataFrame:
        """Per (sequence, layer, head): ``first_token, ahon, ahon_ln``, and the first token's ``contribution`` with
        ``contribution_rest``, its mean over all other tokens.
        """
        index = pd.MultiIndex.from_product([range(n) for n in self.ahon.shape], names=["sequence", "layer", "head"])
        parts = {name: getattr(self, name) for name in ("first_token", "ahon", "ahon_ln")}
        parts["contribution"] = self.contribution[..., 0]
        parts["contribution_rest"] = self.contribution[..., 1:].nanmean(-1)
        return pd.DataFrame({name: t.flatten().tolist() for name, t in parts.items()}, index=index).reset_index()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("first_token", "ahon", "ahon_ln", "contribution")}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        return save_tensors(path, KIND, tensors, {"tokens": self.tokens.meta(), "info": self.info})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadActivity:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, KIND)
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        own = {n: t for n, t in tensors.items() if not n.startswith("tokens.")}
        return cls(**own, tokens=Tokens.from_parts(batch, meta["tokens"]), info=meta["info"])


@public
def head_activity(
    model: TransformerBridge, tokens: str | Sequence[str] | Tensor | Tokens, *, progress: bool | None = None
) -> HeadActivity:
    """First-token weight, output norms and per-token contributions of every head (formulas: the module's text).

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; each runs without padding.
        progress: show a bar.

    Cost: one forward per sequence; memory: one layer's pattern at a time, and ``batch x layers x heads x T`` numbers.

    Raises:
        BadInputError: unusable input.
        UnsupportedModelError: attention whose weights are no shares.
    """
    facts = capabilities(model)
    refuse_unless_softmax(model, "head_activity")
    batch = as_tokens(model, tokens).to("cpu")
    shape = (len(batch), facts.n_layers, facts.n_heads)
    first, output = torch.zeros(shape), torch.zeros(shape)
    contribution = torch.full((*shape, int(batch.lengths.max())), torch.nan)
    with progress_bar("head activity", len(batch), progress) as advance:
        for b in range(len(batch)):
            one = batch[b].trim().to(str(model.cfg.device))
            for layer, (weight, norm, parts) in enumerate(_sequence(model, facts, one)):
                first[b, layer], output[b, layer] = weight.cpu(), norm.cpu()
                contribution[b, layer, :, : parts.shape[-1]] = parts.cpu()
            advance()
    info = {"capabilities": asdict(facts), "dtype": str(model.cfg.dtype)}
    return HeadActivity(first, output, output / output.mean(-1, keepdim=True), contribution, batch, info)


def _sequence(model: TransformerBridge, facts: Capabilities, one: Tokens) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer: first-token weight [head], output norm [head], contribution [head, pos]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    seen: dict[str, Tensor] = {}
    hooks: list[tuple[str, Any]] = []

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach()

        return hook

    def reduce(layer: int) -> Any:
        def hook(_: Tensor, hook: Any) -> None:
            pattern = seen["hook_pattern"][0].float()
            v = by_head(seen["hook_v"], facts.heads_first, facts.n_heads).float()
            z = pattern @ v
            w_o = output_weights(model, layer)
            length = pattern.shape[-1]
            allowed = allowed_keys(one.mask, slice(0, length), causal=facts.causal, window=facts.windows[layer])[0]
            parts = pattern.new_full((facts.n_heads, length), torch.nan)
            if w_o is not None:
                size = (v @ w_o.float()).norm(dim=-1)
                parts = (pattern * allowed).sum(1) / allowed.sum(0) * size  # |a f| = a |f|: weights are not negative
            found.append((pattern[:, :, 0].mean(-1), z.norm(dim=-1).mean(-1), parts))
            seen.clear()

        return hook

    for layer in range(facts.n_layers):
        hooks += [(attention_hook(layer, point), keep(point)) for point in ("hook_pattern", "hook_v")]
        hooks.append((f"blocks.{layer}.hook_out", reduce(layer)))
    run_blocks(model, one.ids, hooks)
    return found
