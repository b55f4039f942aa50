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
import torch
from einops import rearrange
from jaxtyping import Float, Int
from scipy.stats import chi2
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sinklens.attention import attention_hook, block_input, block_output
from sinklens.errors import BadInputError, UnsupportedModelError
from sinklens.flash_backend import hooked
from sinklens.proof import capabilities

PROBES = 16
CHUNK = 16  # tangents at once
SHRINK = 0.7  # of the fitted degrees of freedom: unshrunk intervals cover 0.90 to 0.93 (docs/definitions.md, section 6)


class Stream:
    """The outputs of all blocks from a layer on, as a function of the stream that the layer reads.

    Args:
        model: the bridge.
        ids: one unpadded sequence.
        hooks: edits that are in force, such as an ablation.
        layer: the block whose input is varied.
        frozen_attention: keep every attention pattern as it is at the point of departure.
    """

    def __init__(
        self,
        model: TransformerBridge,
        ids: Int[Tensor, "1 pos"],
        hooks: Sequence[Any] = (),
        *,
        layer: int = 0,
        frozen_attention: bool = False,
    ) -> None:
        facts = capabilities(model)
        if not 0 <= layer < facts.n_layers:
            raise BadInputError(f"layer {layer} is out of range: the model has {facts.n_layers}")
        if frozen_attention and not facts.pattern_edit:
            raise UnsupportedModelError(f"{facts.model}: this host discards edits of the pattern; it cannot be frozen")
        self.model, self.ids, self.layer, self.n_layers = model, ids, layer, facts.n_layers
        self.hooks: list[Any] = list(hooks)
        start: list[Tensor] = []
        patterns: dict[str, Tensor] = {}
        seeing: list[Any] = [(block_input(layer), lambda tensor, hook: start.append(tensor.detach().clone()))]
        if frozen_attention:

            def hold(tensor: Tensor, hook: Any) -> None:
                patterns[hook.name] = tensor.detach().clone()

            seeing += [(attention_hook(n, "hook_pattern"), hold) for n in range(layer, facts.n_layers)]
        with torch.no_grad():
            self._forward([*self.hooks, *seeing])
        self.start: Float[Tensor, "pos d_model"] = start[0].reshape(ids.shape[1], -1)
        self._shape = start[0].shape
        self.hooks += [(name, _constant(pattern)) for name, pattern in patterns.items()]
        with torch.no_grad():
            self.outputs: Float[Tensor, "layer pos d_model"] = self(self.start)

    def _forward(self, hooks: Sequence[Any]) -> None:
        def stop(tensor: Tensor, hook: Any) -> None:
            raise StopAtLayerException(tensor[:, :0] if tensor.dim() == 3 else tensor[:0])

        ends = [*hooks, (block_output(self.n_layers - 1), stop)]
        with hooked(self.model):
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
            with torch.no_grad(), _plain_kernels(), _named(self.model):
                yield torch.func.vmap(one)(tangents[first : first + chunk])

    def pulled(
        self, layer: int, row: int, covectors: Float[Tensor, "covector d_model"]
    ) -> Float[Tensor, "covector pos d_model"]:
        """``w^T J`` of every covector at one block's output and row, for all j, by reverse mode."""
        start = self.start.clone().requires_grad_()
        with torch.enable_grad(), _plain_kernels():
            out = self(start)[layer - self.layer, row]
            found = [
                torch.autograd.grad(out, start, w.to(out), retain_graph=n + 1 < len(covectors))[0]
                for n, w in enumerate(covectors)
            ]
        return torch.stack(found)


def _constant(pattern: Tensor) -> Any:
    def hook(_: Tensor, hook: Any) -> Tensor:
        return pattern

    return hook


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Only attention kernels with derivatives of either mode; what was allowed before is restored."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@contextlib.contextmanager
def _named(model: TransformerBridge) -> Iterator[None]:
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

    Cost: ``count x columns`` tangents in chunks; a tangent costs about one forward. Memory: ``chunk x layers x
    positions x d_model`` floats and the chunk's activations.
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
        found += [part.double().square().sum(-1).cpu() for part in stream.pushed(tangents, chunk)]
    return rearrange(torch.cat(found), "(column probe) layer pos -> probe layer pos column", probe=count)


def probed_squares_reverse(
    stream: Stream, layers: Sequence[int], rows: Sequence[int], *, count: int = PROBES, seed: int = 0
) -> Float[Tensor, "probe layer row column"]:
    """``|w^T J[l,i,j]|^2`` of every probe w at chosen layers and rows, for all j: where forward mode is missing.

    Cost: one forward per (layer, row) and ``count`` backwards.
    """
    size = stream.start.shape[1]
    found = [
        [stream.pulled(n, i, probes(i, count, size, seed)).double().square().sum(-1).cpu() for i in rows]
        for n in layers
    ]
    return torch.stack([torch.stack(per_row, 1) for per_row in found], 1)


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
        w = next(stream.pushed(tangent))[0, layer - stream.layer, row]
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
    """Interval of the mean over probes: a scaled chi-square law with fitted degrees of freedom, shrunk.

    ``df = 0.7 max(n, n 2 mean^2 / var)``: a block of stable rank r has about ``n r`` of them, and never fewer than n.
    """
    n = squares.shape[0]
    mean, var = squares.mean(0), squares.var(0)
    fitted = 2 * n * mean.square() / var.clamp(min=1e-300)
    df = SHRINK * np.maximum(fitted.numpy(), n)
    tail = (1 - confidence) / 2
    low, high = (torch.from_numpy(df / chi2.ppf(q, df)) * mean for q in (1 - tail, tail))
    return low, high
