"""How much every token's representation depends on every other: squared norms of Jacobian blocks, by random probes.

``J[l,i,j] = d x_i^l / d e_j``: e is the stream that a chosen block reads, x^l the output of block l. With v ~ N(0, I)
at token j, ``E |J v|^2 = |J|_F^2``; one forward-mode pass per probe and j gives every layer and every i at once. The
same probes serve all layers, rows and conditions, so their errors are shared: compare conditions probe by probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from einops import rearrange
from jaxtyping import Float, Int
from scipy.stats import chi2
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sinklens.attention.backend import hooked
from sinklens.bridge.adapters import attention_hook, block_input, block_output, original
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.bridge.offload import refuse_offloaded
from sinklens.bridge.torch_globals import PlainAttention, forward_mode
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.forward.follow import numbered
from sinklens.residual.linear_maps import frozen_norm

PROBES = 16
CHUNK = 16  # tangents at once
NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
SHRINK = 0.7  # of the fitted degrees of freedom: unshrunk intervals cover 0.90 to 0.93 (docs/definitions.md, section 6)


class Stream:
    """The outputs of all blocks from a layer on, as a function of the stream that the layer reads.

    Args:
        model: the bridge.
        ids: one unpadded sequence.
        hooks: edits that are in force, such as an ablation.
        layer: the block whose input is varied.
        frozen_attention: keep every attention pattern as it is at the point of departure.
        frozen_norms: keep the scale (``1 / rms`` or ``1 / sd``) of every norm that reads or writes the stream as it is
            there; the norms of single heads' queries and keys stay live.
        sequence: its number in the batch that the edits were built for; it tells copies of one text apart.

    Raises:
        BadInputError: no such layer, hooks that leave no numbers behind.
        UnsupportedModelError: what shall be frozen cannot be on this host.
    """

    def __init__(
        self,
        model: TransformerBridge,
        ids: Int[Tensor, "1 pos"],
        hooks: Sequence[Any] = (),
        *,
        layer: int = 0,
        frozen_attention: bool = False,
        frozen_norms: bool = False,
        sequence: int = 0,
    ) -> None:
        facts = capabilities(model)
        refuse_offloaded(model.original_model, facts.model, "a Jacobian")
        if not 0 <= layer < facts.n_layers:
            raise BadInputError(f"layer {layer} is out of range: the model has {facts.n_layers}")
        if frozen_attention and not facts.pattern_edit:
            raise UnsupportedModelError(f"{facts.model}: this host discards edits of the pattern; it cannot be frozen")
        self.model, self.ids, self.layer, self.n_layers = model, ids, layer, facts.n_layers
        self.hooks: list[Any] = list(hooks)
        self.sequence = sequence
        start: list[Tensor] = []
        seen: dict[str, Tensor] = {}

        def hold(tensor: Tensor, hook: Any) -> None:
            seen[hook.name] = tensor.detach().clone()

        patterns = [attention_hook(n, "hook_pattern") for n in range(layer, facts.n_layers)] if frozen_attention else []
        norms = _norms(model, layer) if frozen_norms else []
        ends = [f"{norm}.hook_{end}" for norm in norms for end in ("in", "out")]
        with torch.no_grad():
            put = [(block_input(layer), lambda tensor, hook: start.append(tensor.detach().clone()))]
            self._forward([*self.hooks, *put, *((name, hold) for name in (*patterns, *ends))])
        self.start: Float[Tensor, "pos d_model"] = start[0].reshape(ids.shape[1], -1)
        self._shape = start[0].shape
        self.hooks += [(name, _constant(seen[name])) for name in patterns]
        for norm in norms:
            self.hooks += _frozen(model, norm, seen[f"{norm}.hook_in"], seen[f"{norm}.hook_out"])
        with torch.no_grad():
            self.outputs: Float[Tensor, "layer pos d_model"] = self(self.start)
            if not self.outputs.isfinite().all():
                raise BadInputError("the stream is NaN or infinite under these hooks: an edit leaves no numbers behind")
            for norm in norms:
                self._heard(norm)

    def _heard(self, norm: str) -> None:
        """An edit of the norm's output must reach the stream, else freezing it would do nothing."""
        out = self._with([(f"{norm}.hook_out", lambda tensor, hook: tensor + 1)])
        if torch.equal(out, self.outputs):
            raise UnsupportedModelError(
                f"{capabilities(self.model).model}: this host discards edits of {norm}; its scale cannot be frozen"
            )

    def _with(self, more: Sequence[Any]) -> Float[Tensor, "layer pos d_model"]:
        own, self.hooks = self.hooks, [*self.hooks, *more]
        try:
            return self(self.start)
        finally:
            self.hooks = own

    def _forward(self, hooks: Sequence[Any]) -> None:
        def stop(tensor: Tensor, hook: Any) -> None:
            raise StopAtLayerException(tensor[:, :0] if tensor.dim() == 3 else tensor[:0])

        ends = [*hooks, (block_output(self.n_layers - 1), stop)]
        with hooked(self.model), numbered([self.sequence]):
            self.model.run_with_hooks(self.ids, return_type=None, fwd_hooks=ends)

    def __call__(self, start: Float[Tensor, "pos d_model"]) -> Float[Tensor, "layer pos d_model"]:
        """The outputs of the blocks from the layer on."""
        kept: list[Tensor] = []

        def put(_: Tensor, hook: Any) -> Tensor:
            return start.view(self._shape)

        def keep(tensor: Tensor, hook: Any) -> None:
            kept.append(tensor.reshape(start.shape))

        reading = [(block_output(n), keep) for n in range(self.layer, self.n_layers)]
        self._forward([(block_input(self.layer), put), *self.hooks, *reading])
        return torch.stack(kept)

    def pushed(
        self, tangents: Float[Tensor, "tangent pos d_model"], chunk: int = CHUNK
    ) -> Iterator[Float[Tensor, "some layer pos d_model"]]:
        """``J v`` of every tangent, by forward mode, ``chunk`` at a time.

        Raises:
            UnsupportedModelError: an operation of the host has no forward-mode derivative.
        """

        def one(v: Tensor) -> Tensor:
            return torch.func.jvp(self, (self.start,), (v,))[1]

        for first in range(0, len(tangents), chunk):
            with forward_mode(self.model), torch.no_grad(), PlainAttention(), derivatives_named(self.model):
                part = torch.func.vmap(one)(tangents[first : first + chunk])
            yield part

    def pulled(
        self, layer: int, row: int, covectors: Float[Tensor, "covector d_model"]
    ) -> Float[Tensor, "covector pos d_model"]:
        """``w^T J`` of every covector at one block's output and row, for all j, by reverse mode."""
        [found] = self.pulled_rows([(layer, row, covectors)])  # to its end: a fault while Python closes it is lost
        return found

    def pulled_rows(
        self, wanted: Sequence[tuple[int, int, Float[Tensor, "covector d_model"]]]
    ) -> Iterator[Float[Tensor, "covector pos d_model"]]:
        """:meth:`pulled` of several (layer, row, covectors), from one forward whose graph is kept meanwhile."""
        start = self.start.clone().requires_grad_()
        with torch.enable_grad(), PlainAttention():
            outputs = self(start)
        for layer, row, covectors in wanted:
            out = outputs[layer - self.layer, row]
            yield torch.stack([torch.autograd.grad(out, start, w.to(out), retain_graph=True)[0] for w in covectors])


def _norms(model: TransformerBridge, layer: int) -> list[str]:
    """The norms that read or write the stream, from a layer on."""
    names = [f"blocks.{n}.{norm}" for n in range(layer, capabilities(model).n_layers) for norm in NORMS]
    return [name for name in names if has_hook(model, f"{name}.hook_out")]


def _frozen(model: TransformerBridge, name: str, x: Tensor, y: Tensor) -> list[Any]:
    """Hooks that make a norm the affine map that it is at ``x``."""
    component: Any = model
    for part in name.split("."):
        component = component[int(part)] if part.isdigit() else getattr(component, part)
    norm = frozen_norm(original(component), x, y)
    inside: list[Tensor] = []

    def read(tensor: Tensor, hook: Any) -> None:
        inside[:] = [tensor]

    def write(_: Tensor, hook: Any) -> Tensor:
        return norm.linear(inside.pop()) + norm.bias

    return [(f"{name}.hook_in", read), (f"{name}.hook_out", write)]


def _constant(pattern: Tensor) -> Any:
    def hook(_: Tensor, hook: Any) -> Tensor:
        return pattern

    return hook


@contextlib.contextmanager
def derivatives_named(model: TransformerBridge) -> Iterator[None]:
    """Turn torch's refusal of a derivative into UnsupportedModelError that names the model and the way out."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        words = str(error)
        if "forward AD" not in words and "functorch" not in words:
            raise
        raise UnsupportedModelError(
            f"{capabilities(model).model}: an operation of this host has no forward-mode derivative "
            f"({words.splitlines()[0][:120]}); use route='reverse'"
        ) from error


def probes(column: int, count: int, size: int, seed: int = 0) -> Float[Tensor, "probe d_model"]:
    """The random vectors at one token: the same for every model state, layer and condition."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + column)
    return torch.randn(count, size, generator=draw)


def probed_squares(
    stream: Stream, columns: Sequence[int], *, count: int = PROBES, seed: int = 0, chunk: int = CHUNK
) -> Float[Tensor, "probe layer pos column"]:
    """``|J[l,i,j] v|^2`` of every probe; its mean over probes estimates ``|J|_F^2``.

    Cost: ``count x columns`` tangents in chunks; a tangent costs about one forward. Memory: :func:`needed_memory`.
    """
    length, size = stream.start.shape
    pairs = [(j, p) for j in columns for p in range(count)]
    drawn = {j: probes(j, count, size, seed).to(stream.start) for j in columns}
    found = []
    for first in range(0, len(pairs), chunk):
        some = pairs[first : first + chunk]
        tangents = torch.zeros(len(some), length, size).to(stream.start)
        for n, (j, p) in enumerate(some):
            tangents[n, j] = drawn[j][p]
        for part in stream.pushed(tangents, chunk):
            found.append(torch.stack([layer.double().square().sum(-1).cpu() for layer in part.unbind(1)], 1))
    return rearrange(torch.cat(found), "(column probe) layer pos -> probe layer pos column", probe=count)


def probed_squares_reverse(
    stream: Stream, layers: Sequence[int], rows: Sequence[int], *, count: int = PROBES, seed: int = 0
) -> Float[Tensor, "probe layer row column"]:
    """``|w^T J[l,i,j]|^2`` of every probe w at chosen layers and rows, for all j: where forward mode is missing.

    Cost: one forward, and ``count`` backwards per (layer, row): L times as many passes as forward mode takes for the
    whole map. Memory: one forward's graph.
    """
    size = stream.start.shape[1]
    wanted = [(n, i, probes(i, count, size, seed)) for n in layers for i in rows]
    found = [part.double().square().sum(-1).cpu() for part in stream.pulled_rows(wanted)]
    return rearrange(torch.stack(found, 1), "probe (layer row) column -> probe layer row column", layer=len(layers))


def exact_columns(stream: Stream, columns: Sequence[int], *, chunk: int = CHUNK) -> Float[Tensor, "layer pos column"]:
    """``|J[l,i,j]|_F^2`` itself for chosen columns j. Cost: d_model tangents per column."""
    length, size = stream.start.shape
    found = []
    for j in columns:
        total = torch.zeros(stream.n_layers - stream.layer, length, dtype=torch.float64)
        for first in range(0, size, chunk):
            at = torch.arange(first, min(first + chunk, size))
            tangents = torch.zeros(len(at), length, size).to(stream.start)
            tangents[torch.arange(len(at)), j, at] = 1
            for part in stream.pushed(tangents, chunk):
                total += torch.stack([layer.double().square().sum((0, -1)).cpu() for layer in part.unbind(1)])
        found.append(total)
    return torch.stack(found, -1)


def needed_memory(stream: Stream, chunk: int = CHUNK) -> int:
    """About how many bytes ``chunk`` tangents at once need beside the model.

    Per tangent the outputs of all blocks twice (``2 L T d``), one block's patterns and scores (``4 H T^2``) and its
    MLP (``6 T d_mlp``), each of the stream's width in bytes.
    """
    length, size = stream.start.shape
    cfg: Any = stream.model.cfg
    inside = 4 * int(cfg.n_heads) * length**2 + 6 * length * int(cfg.d_mlp or 4 * size)
    kept = 2 * (stream.n_layers - stream.layer) * length * size
    return chunk * (kept + inside) * stream.start.element_size()


def fitting_chunk(stream: Stream, chunk: int | None = None) -> int:
    """So many tangents at once as fit into half of the free memory, at most 16; or the number asked for, if it fits.

    Raises:
        BadInputError: it does not fit; the message says how much it would take.
    """
    free = _free_memory(stream.start.device)
    one = needed_memory(stream, 1)
    if chunk is not None and chunk < 1:
        raise BadInputError(f"chunk must be at least 1, got {chunk}")
    fits = min(CHUNK, free // (2 * one))
    asked = 1 if chunk is None else chunk
    if asked * one > free or (chunk is None and not fits):
        length = stream.start.shape[0]
        raise BadInputError(
            f"{asked} tangent(s) at once of {length} tokens need about {asked * one / 1e9:.2g} GB, and "
            f"{free / 1e9:.2g} GB are free: take " + ("a smaller chunk or " if asked > 1 else "") + "shorter sequences"
        )
    return int(fits) if chunk is None else chunk


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def exact_block(stream: Stream, column: int, *, chunk: int = CHUNK) -> Float[Tensor, "layer pos d_model d_model"]:
    """``J[l,i,column]`` itself: [layer, i, out, in]. Cost: d_model tangents."""
    length, size = stream.start.shape
    tangents = torch.zeros(size, length, size).to(stream.start)
    tangents[torch.arange(size), column, torch.arange(size)] = 1
    return torch.cat(list(stream.pushed(tangents, chunk))).permute(1, 2, 3, 0)


def spectral_norm(
    stream: Stream, layer: int, row: int, column: int, *, steps: int = 30, tolerance: float = 1e-6, seed: int = 0
) -> float:
    """``|J[l,i,j]|_2`` by power iteration on ``J^T J``: one tangent and one backward per step."""
    size = stream.start.shape[1]
    v = probes(column, 1, size, seed).to(stream.start)
    v = v / v.norm()
    old = 0.0
    for _ in range(steps):
        tangent = torch.zeros(1, *stream.start.shape).to(stream.start)
        tangent[0, column] = v[0]
        [part] = stream.pushed(tangent)
        w = part[0, layer - stream.layer, row]
        norm = float(w.norm())
        if norm == 0.0:
            return 0.0
        back = stream.pulled(layer, row, (w / norm)[None])[0, column]
        v = (back / back.norm().clamp(min=1e-30))[None]
        new = float(back.norm())
        if abs(new - old) <= tolerance * new:
            return new
        old = new
    return old


def chi_square_interval(
    squares: Float[Tensor, "probe *entry"], confidence: float = 0.95
) -> tuple[Float[Tensor, "*entry"], Float[Tensor, "*entry"]]:
    """:func:`squares_interval` of probes that are at hand."""
    return squares_interval(squares.mean(0), squares.var(0), squares.shape[0], confidence)


def squares_interval(
    mean: Float[Tensor, "*entry"], var: Float[Tensor, "*entry"], n: int, confidence: float = 0.95
) -> tuple[Float[Tensor, "*entry"], Float[Tensor, "*entry"]]:
    """Interval of the mean over n probes: a scaled chi-square law with fitted degrees of freedom, shrunk.

    ``df = 0.7 max(n, n 2 mean^2 / var)``: a block of stable rank r has about ``n r`` of them, and never fewer than n.
    """
    fitted = 2 * n * mean.square() / var.clamp(min=1e-300)
    df = SHRINK * np.maximum(fitted.numpy(), n)
    tail = (1 - confidence) / 2
    low, high = (torch.from_numpy(df / chi2.ppf(q, df)) * mean for q in (1 - tail, tail))
    return low, high
