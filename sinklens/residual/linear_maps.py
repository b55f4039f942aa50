"""Layer norms and rotary embeddings as the linear maps that they are once their scale, or the position, is fixed.

With its scale frozen a norm is affine in its input, so what it does to a sum is the sum of what it does to the terms.
The map is read off the module by probing it, whatever its class (LayerNorm, RMSNorm, Gemma's ``1 + weight``), and
checked against what the module really gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import UnsupportedModelError

PROBE = 1e3  # large beside any epsilon, small beside float32's limits
TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """``y = scale * gain * (x - mean x) + bias``, the mean only where ``centred``; scale is each token's own.

    Attributes:
        gain, bias: of the normalised axis (or axes).
        scale: one number per token (and head): ``1 / rms`` or ``1 / sd`` of what the module saw.
        centred: LayerNorm subtracts the mean, RMSNorm does not.
    """

    gain: Float[Tensor, "*features"]
    bias: Float[Tensor, "*features"]
    scale: Float[Tensor, "*tokens"]
    centred: bool

    def linear(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """The linear part, of anything that is shaped like the input (more axes may stand before)."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.gain * self.scale[..., None]

    def adjoint(self, y: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """The transpose of the linear part."""
        x = y * self.gain * self.scale[..., None]
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def at(self, positions: Any) -> FrozenNorm:
        """The norm of some tokens only."""
        return replace(self, scale=self.scale[positions])

    def without_scale(self) -> FrozenNorm:
        """Centring and gain alone."""
        return replace(self, scale=self.scale.new_ones(1))


def identity_norm(like: Float[Tensor, "*tokens d"]) -> FrozenNorm:
    """The norm that does nothing, for hosts without one."""
    ones = like.new_ones(like.shape[-1])
    return FrozenNorm(ones, torch.zeros_like(ones), torch.ones_like(like[..., 0]), False)


def frozen_norm(
    module: Callable[[Tensor], Tensor], x: Float[Tensor, "*tokens d"], y: Float[Tensor, "*tokens d"], features: int = 1
) -> FrozenNorm:
    """The affine map of a norm at the scale that takes ``x`` to ``y``.

    Args:
        module: the norm; it is probed, so its parameters need not be known.
        x, y: what went in and what came out.
        features: how many trailing axes the parameters span (2 where each head has its own).

    Raises:
        UnsupportedModelError: the module is no such norm.
    """
    shape = x.shape[-features:]
    signs = torch.ones(shape[-1], dtype=x.dtype, device=x.device)
    signs[1::2] = -1
    lead = (1,) * (x.ndim - features)

    def probe(row: Tensor) -> Tensor:
        with torch.no_grad():
            return module(row.expand(shape).reshape(*lead, *shape)).reshape(shape).to(x)

    bias = probe(torch.zeros_like(signs))
    flat = probe(PROBE * torch.ones_like(signs)) - bias
    varied = probe(PROBE * signs) - bias
    centred = bool(flat.abs().max() < 1e-2 * varied.abs().max())
    centre = signs - signs.mean() if centred else signs
    gain = varied / centre * centre.pow(2).mean().sqrt()
    straight = (x - x.mean(-1, keepdim=True) if centred else x) * gain
    scale = ((y - bias) * straight).sum(-1) / straight.pow(2).sum(-1).clamp(min=1e-30)
    found = FrozenNorm(gain, bias, scale, centred)
    gap = (found.linear(x) + bias - y).abs().max()
    if not gap <= TOLERANCE * (1 + y.abs().max()):
        raise UnsupportedModelError(
            f"{type(module).__name__} is neither a layer norm nor an RMS norm (with its scale frozen it misses its own "
            f"output by {float(gap):.2g}), so scores cannot be split into components"
        )
    return found


Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary embedding: position i turns the pairs of a vector by fixed angles (and may scale them).

    Attributes:
        cos, sin: one entry per position and rotated dimension; None without rotary embedding.
        interleaved: pairs are neighbours (2n, 2n+1), not (n, n + r/2).
    """

    cos: Float[Tensor, "*batch pos r"] | None = None
    sin: Float[Tensor, "*batch pos r"] | None = None
    interleaved: bool = False

    def __call__(self, x: Float[Tensor, "*any pos d"]) -> Float[Tensor, "*any pos d"]:
        """R_i x_i."""
        return x if self.sin is None else self._turn(x, self.sin)

    def back(self, x: Float[Tensor, "*any pos d"]) -> Float[Tensor, "*any pos d"]:
        """The transpose: R_i^T x_i."""
        return x if self.sin is None else self._turn(x, -self.sin)

    def at(self, positions: Any) -> Rotation:
        """The rotation of some positions only."""
        if self.cos is None or self.sin is None:
            return self
        return Rotation(self.cos[positions], self.sin[positions], self.interleaved)

    def _turn(self, x: Tensor, sin: Tensor) -> Tensor:
        assert self.cos is not None
        size = sin.shape[-1]
        turned, rest = x[..., :size], x[..., size:]
        if self.interleaved:
            half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
        return torch.cat([turned * self.cos + half * sin, rest], -1)


def rotations(cos: Float[Tensor, "pos n"], sin: Float[Tensor, "pos n"], d_head: int) -> list[Rotation]:
    """Every reading of a host's tables: pairs apart or neighbours, one column per dimension or per pair."""
    found = []
    if cos.shape[-1] <= d_head:
        found += [Rotation(cos, sin, interleaved) for interleaved in (False, True)]
    if 2 * cos.shape[-1] <= d_head:
        found.append(Rotation(torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)))
        found.append(Rotation(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), True))
    return found
