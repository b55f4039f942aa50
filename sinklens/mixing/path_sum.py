"""The local path-sum bound on Jacobian blocks, beside their measured spectral norms (docs/definitions.md, section 6).

With attention frozen, ``|J_ij|_2 <= [prod_l D^l M^l]_ij``::

    M = I + sum_h c_hj A^h              c_hj = |W_V W_O diag(g)|_2 / rms(x_j); post-norms: times max|g| / rms
    D = diag(|I + dMLP_i / dx_i|_2)     by power iteration
    parallel blocks: I + sum_h c_hj A^h + diag(|dMLP_i / dx_i|_2)

A path of length l from j to i pays the attention weight and the value gain of every hop, and an MLP's gain at every
stop. It is the form of Barbero et al. 2025, Theorem 3.2, which as usually quoted drops the MLP and is then false here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import (
    block_input,
    block_output,
    by_head,
    mlp_of,
    original,
    output_weights,
    score_projection,
)
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.bridge.offload import refuse_offloaded
from sinklens.bridge.requirements import refuse_half_precision
from sinklens.bridge.torch_globals import forward_mode
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.storage import atomic_path
from sinklens.core.validation import public, public_methods
from sinklens.forward.follow import numbered
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.mixing.conditions import Sinks, sinks_of
from sinklens.mixing.jacobians import CHUNK, Stream, derivatives_named, exact_block
from sinklens.residual.contributions import flat
from sinklens.residual.linear_maps import FrozenNorm, frozen_norm, identity_norm
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STEPS = 60
TOLERANCE = 1e-3
POINTS = ("attn.hook_in", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "attn.hook_out", "mlp.hook_in")
NORM_POINTS = tuple(f"{norm}.hook_{end}" for norm in ("ln1_post", "ln2", "ln2_post") for end in ("in", "out"))


@public_methods
@dataclass(frozen=True, eq=False)
class PathSums(ShownInJupyter):
    """Bound and measured spectral norm of chosen Jacobian blocks.

    Attributes:
        table: one row per (sequence, layer, row, column): ``spectral``, ``bound``, ``sink`` (whether the column is in
            S), ``log10_ratio`` of the bound to what was measured.
        bounds: the whole bound, per sequence: [layer, i, j].
    """

    table: pd.DataFrame
    bounds: tuple[Float[Tensor, "layer pos pos2"], ...]

    def __repr__(self) -> str:
        return f"PathSums: bound and measured norm of {len(self.table)} block(s), {len(self.bounds)} sequence(s)"

    def to_dataframe(self) -> pd.DataFrame:
        """The table of measured blocks."""
        return self.table

    def looseness(self) -> pd.DataFrame:
        """One row per layer: median, 5 and 95 % of ``log10(bound / spectral)``, and how many blocks break the bound.

        Blocks that are 0 (rows before the column) are left out; a block breaks the bound if it exceeds it by more than
        0.1 %, the error of the power iterations.
        """
        rows = []
        for layer, group in self.table.groupby("layer"):
            ratio = torch.tensor(group.log10_ratio.tolist(), dtype=torch.float64)
            low, middle, high = torch.quantile(ratio, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
            broken = int((ratio < math.log10(1 - TOLERANCE)).sum())
            rows.append({"layer": layer, "median": middle, "low": low, "high": high, "n": len(group), "broken": broken})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Measured spectral norm against the bound, coloured by layer; everything must lie below the line."""
        from sinklens.mixing.figures import bound_scatter  # plotly is slow to load

        return bound_scatter(self.table)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as Parquet, whole or not at all."""
        with atomic_path(path) as partial:
            self.table.to_parquet(partial, index=False)
        return Path(path)


@public
def path_sums(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    sinks: Sinks = None,
    hooks: Sequence[Any] = (),
    columns: Sequence[int] | None = None,
    chunk: int = CHUNK,
    seed: int = 0,
    progress: bool | None = None,
) -> PathSums:
    """The local path-sum bound beside measured spectral norms, attention frozen.

    Args:
        model: from :func:`sinklens.load_model`; decoders and encoders whose norms stand before (or around) attention
            and MLP, parallel blocks included.
        tokens: the sequences; short ones, since a column's blocks are computed in full.
        sinks: S, as in :func:`sinklens.measure_mixing`; only labels columns and chooses the default ones.
        hooks: edits of the pattern that are in force.
        columns: j of the blocks that are measured; default: the first sink and one other token drawn per sequence.
        chunk: tangents at once.
        seed: of the drawn column.
        progress: show a bar.

    Cost: d_model tangents per column. Memory: ``layers x T x d_model^2`` floats.

    Raises:
        BadInputError: a column out of range.
        UnsupportedModelError: norms on the stream itself (BERT), values that are no matrix per head (MLA), edits of
            what heads read beyond their pattern, no forward mode.
    """
    batch = as_tokens(model, tokens).to("cpu")
    own, _ = sinks_of(model, batch, sinks)
    draw = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    bounds: list[Tensor] = []
    with progress_bar("path sums", len(batch), progress) as advance:
        for b in range(len(batch)):
            one = batch[b].trim()
            ids = one.ids.to(model.cfg.device)
            length = ids.shape[1]
            free = [p for p in range(1, length - 1) if p not in own[b]] or [0]
            drawn = free[int(torch.randint(len(free), (1,), generator=draw))]
            chosen = list(dict.fromkeys([*own[b][:1], drawn] if columns is None else columns))
            if any(not 0 <= j < length for j in chosen):
                raise BadInputError(f"columns {chosen} are out of range: sequence {b} has {length} tokens")
            with numbered([b]):
                bounds.append(path_sum_bound(model, ids, hooks))
            stream = Stream(model, ids, hooks, frozen_attention=True, sequence=b)
            for j in chosen:
                norms = spectral_norms(exact_block(stream, j, chunk=chunk))
                for layer in range(norms.shape[0]):
                    for i in range(length):
                        measured, bound = float(norms[layer, i]), float(bounds[-1][layer, i, j])
                        if measured > 0:
                            row = {"sequence": b, "layer": layer, "row": i, "column": j, "sink": j in own[b]}
                            ratio = math.log10(bound / measured) if bound > 0 else -math.inf
                            rows.append(row | {"spectral": measured, "bound": bound, "log10_ratio": ratio})
            advance()
    return PathSums(pd.DataFrame(rows), tuple(bounds))


def path_sum_bound(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], hooks: Sequence[Any] = ()
) -> Float[Tensor, "layer pos pos"]:
    """The bound of every block (l, i, j) of one unpadded sequence. Cost: one forward, and ``60`` times two passes
    through the MLPs. Memory: one layer's patterns.
    """
    refuse_offloaded(model.original_model, str(model.cfg.model_name), "the path-sum bound")
    refuse_half_precision(model, "blocks are summed up again")
    length = ids.shape[1]
    points = [p for p in (*POINTS, *NORM_POINTS) if has_hook(model, f"blocks.0.{p}")]
    seen: dict[str, Tensor] = {}
    found: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach()

        return hook

    def close(layer: int) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            step = _layer_bound(model, layer, seen | {"hook_out": tensor.detach()}, length).cpu()
            found.append(step if not found else step @ found[-1])
            seen.clear()

        return hook

    mine: list[Any] = []
    for layer in range(capabilities(model).n_layers):
        mine.append((block_input(layer), keep("hook_in")))
        mine += [(f"blocks.{layer}.{p}", keep(p)) for p in points]
        mine.append((block_output(layer), close(layer)))
    run_blocks(model, ids, [*hooks, *mine])
    return torch.stack(found)


def _layer_bound(model: TransformerBridge, layer: int, seen: dict[str, Tensor], length: int) -> Float[Tensor, "i j"]:
    """``D M`` of one layer, float64."""
    name = model.cfg.model_name
    x, y, out = (flat(seen[p], length) for p in ("hook_in", "hook_out", "attn.hook_out"))
    added = flat(seen["ln1_post.hook_out"], length) if "ln1_post.hook_out" in seen else out
    mlp = _Branch(model, layer)
    middle = x + added
    try:
        parallel = not _close(middle + mlp(middle), y)
        known = not parallel or _close(middle + mlp(x), y)
    except TypeError:  # an MLP that is handed the stream apart (Bloom)
        parallel = known = False
    if not known:
        raise UnsupportedModelError(
            f"{name}: block {layer} is not the sum of the stream, its attention and its MLP (norms that stand on the "
            f"stream, or scaled layers), so the path-sum bound is not defined for it"
        )
    hops = _hops(model, layer, seen, x)
    if "ln1_post.hook_out" in seen:
        post = frozen_norm(original(_block(model, layer).ln1_post), out, added)
        hops = hops * (post.gain.abs().max() * post.scale.double())[:, None]
    eye = torch.eye(length, dtype=torch.float64, device=hops.device)
    gains = mlp.gains(x if parallel else middle, identity=not parallel)
    return eye + hops + gains.diag() if parallel else gains[:, None] * (eye + hops)


def _hops(model: TransformerBridge, layer: int, seen: dict[str, Tensor], x: Tensor) -> Float[Tensor, "i j"]:
    """``sum_h c_hj A^h``."""
    facts = capabilities(model)
    w_o = output_weights(model, layer)
    if w_o is None or "attn.hook_pattern" not in seen or "attn.hook_z" not in seen:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: the host does not show W_O, pattern and z by head, which the path-sum bound needs"
        )
    x_hat = flat(seen["attn.hook_in"], x.shape[0])
    norm = _read_norm(model, layer, x, x_hat)
    weight, bias = (t.to(x) for t in score_projection(model, layer, "v"))
    v = by_head(seen["attn.hook_v"], facts.heads_first, facts.n_heads).to(x)
    groups = facts.n_heads // weight.shape[0]
    rebuilt = (x_hat @ weight + bias[:, None]).repeat_interleave(groups, 0)
    pattern = seen["attn.hook_pattern"][0].to(x)
    z = seen["attn.hook_z"][0].to(x)
    z = z.reshape(x.shape[0], facts.n_heads, -1).transpose(0, 1) if z.ndim == 2 else z.transpose(0, 1)
    if not _close(rebuilt, v) or not _close(pattern @ v, z):
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: what heads of layer {layer} read is more than their pattern times W_V of the "
            f"stream's norm (an edit of values, or an unusual host), so the path-sum bound is not defined"
        )
    gained = (norm.gain.expand(x.shape[1])[:, None] * weight).repeat_interleave(groups, 0)
    left, right = (torch.linalg.qr(m.double()).R for m in (gained, w_o.detach().to(x).mT))
    gain = torch.linalg.matrix_norm(left @ right.mT, 2)
    reach = gain[:, None] * norm.scale.double().expand(x.shape[0])
    return torch.einsum("hij,hj->ij", pattern.double().abs(), reach)


def _read_norm(model: TransformerBridge, layer: int, x: Tensor, x_hat: Tensor) -> FrozenNorm:
    if torch.allclose(x, x_hat, rtol=1e-5, atol=1e-6):
        return identity_norm(x)
    block = _block(model, layer)
    if not hasattr(block, "ln1"):
        raise UnsupportedModelError(f"{model.cfg.model_name}: layer {layer} does not read the stream or its norm ln1")
    return frozen_norm(original(block.ln1), x, x_hat)


class _Branch:
    """What one block's MLP adds, norms included, as a function of the stream it reads; token by token."""

    def __init__(self, model: TransformerBridge, layer: int) -> None:
        block = _block(model, layer)
        self._model = model
        names = [n for n in ("ln2", "ln1") if has_hook(model, f"blocks.{layer}.{n}.hook_out")]
        post = has_hook(model, f"blocks.{layer}.ln2_post.hook_out")
        reads: Any = None if post and "ln2" not in names else original(getattr(block, names[0])) if names else None
        self._parts: list[Any] = [m for m in (reads, original(mlp_of(model, layer))) if m is not None]
        self._parts += [original(block.ln2_post)] if post else []
        self._dtype = next(self._parts[-1].parameters()).dtype

    def __call__(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        found = x[None].to(self._dtype)
        for part in self._parts:
            found = part(found)
            found = found[0] if isinstance(found, tuple) else found
        return found[0].to(x)

    def gains(self, x: Float[Tensor, "pos d_model"], *, identity: bool) -> Float[Tensor, " pos"]:
        """``|I + d branch_i / dx_i|_2`` (or without I) of every token, by power iteration."""
        own = float(identity)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        old = new = torch.zeros_like(x[:, 0])
        with forward_mode(self._model), derivatives_named(self._model), torch.enable_grad():
            for _ in range(STEPS):
                v = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)
                w = own * v + torch.func.jvp(self, (x,), (v,))[1]
                pull: Any = torch.func.vjp(self, x)[1]
                v = (own * w + pull(w)[0]).detach()
                new = w.detach().norm(dim=-1)
                if bool(((new - old).abs() <= 0.01 * TOLERANCE * new).all()):
                    break
                old = new
        return new.double()


def spectral_norms(blocks: Float[Tensor, "layer pos d_out d_in"], steps: int = STEPS) -> Float[Tensor, "layer pos"]:
    """Largest singular values by power iteration, all blocks of a layer at once; from below, to about 0.01 %."""
    found = []
    for block in blocks:
        v = torch.randn(block.shape[-1], generator=torch.Generator().manual_seed(0)).to(block).expand(len(block), -1)
        norm = torch.zeros(len(block)).to(block)
        for _ in range(steps):
            v = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            w = torch.einsum("pij,pj->pi", block, v)
            norm = w.norm(dim=-1)
            v = torch.einsum("pij,pi->pj", block, w)
        found.append(norm.double())
    return torch.stack(found)


def _block(model: TransformerBridge, layer: int) -> Any:
    return model.blocks[layer]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()))
