"""The direction methods: sinks seen in the residual stream instead of in attention.

``direction``: at resid_pre of a layer a token is a sink if its norm is at least 3 times the median of the unpadded
tokens and ``|cos(x_k - mu, x_P - mu)| >= 0.9``, mu the mean over tokens below 3 medians (docs/definitions.md, 2; the
raw cosine is useless where residuals are anisotropic: on Gemma ordinary tokens have 0.93 to 0.98 to BOS).

``wong``: the released detector of Wong et al. 2025 (2512.22213), verbatim, for replication: block outputs (of the
last block after the final norm, as transformers returns it), BOS position = the larger mean norm of positions 0 and
1, layers between its largest rise and fall in norm, ``|cos(h_t, h_BOS)| > 0.9``, and labels by lifetime with their
constant 15. It needs no attention and says nothing about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import record
from sinklens.bridge.unbridged import PlainModel
from sinklens.find.lifetimes import Thresholds
from sinklens.forward.states import block_inputs, block_outputs, typical_mean
from sinklens.inputs.tokens import Tokens
from sinklens.show.progress import progress_bar

WONG_COSINE = 0.9
WONG_NOISE = 4
WONG_BOS = 15


def direction_activity(
    model: TransformerBridge | PlainModel,
    batch: Tokens,
    strongest: Sequence[int | None],
    thresholds: Thresholds,
    progress: bool | None = None,
) -> tuple[Bool[Tensor, "batch layer pos"], tuple[int | None, ...]]:
    """Where the direction criterion holds, and the position whose direction was used per sequence.

    That position is attention's P; without one, the token with the largest norm ratio over all layers.
    """
    facts = record(model)
    longest = int(batch.lengths.max())
    active = torch.zeros(len(batch), facts.n_layers, longest, dtype=torch.bool)
    used: list[int | None] = []
    with progress_bar("residual directions", len(batch), progress) as advance:
        for b in range(len(batch)):
            residual = block_inputs(model, batch[b].trim())
            chosen, found = direction_criterion(residual, strongest[b], thresholds)
            used.append(chosen)
            active[b, :, : found.shape[1]] = found.cpu()
            advance()
    return active, tuple(used)


def direction_criterion(
    residual: Float[Tensor, "layer pos d_model"], reference: int | None, thresholds: Thresholds
) -> tuple[int | None, Bool[Tensor, "layer pos"]]:
    """The criterion on one sequence's residuals; None and nothing active where no token is massive."""
    residual = residual.float()
    norm = residual.norm(dim=-1)
    ratio = norm / norm.median(dim=1, keepdim=True).values
    massive = ratio >= thresholds.norm_ratio
    if reference is None:
        if not massive.any():
            return None, massive
        reference = int(ratio.max(dim=0).values.argmax())
    centred = residual - typical_mean(residual, thresholds.norm_ratio)
    cosine = torch.cosine_similarity(centred, centred[:, reference, None], dim=-1)
    return reference, massive & (cosine.abs() >= thresholds.cosine)


@dataclass(frozen=True)
class WongSink:
    """What the published detector says of one token: its layers, level ``(start, lifetime)`` and label."""

    position: int
    layers: tuple[int, ...]
    level: tuple[int, int]
    label: str


def wong_level(layers: Sequence[int]) -> tuple[int, int]:
    """``(l_start, lifetime)``: the first layer, and how many; they need not be contiguous."""
    return layers[0], len(layers)


def wong_label(lifetime: int, n_layers: int) -> str:
    """``secondary`` if ``4 < lifetime < L - 15``, ``bos_sink`` if ``lifetime >= L - 15``, else ``noise``."""
    if WONG_NOISE < lifetime < n_layers - WONG_BOS:
        return "secondary"
    return "bos_sink" if lifetime >= n_layers - WONG_BOS else "noise"


def wong_detect(states: Float[Tensor, "layer pos d_model"], candidates: Sequence[int] = (0, 1)) -> list[WongSink]:
    """The published detector on one sequence's hidden states (block outputs, embedding dropped)."""
    n_layers = states.shape[0]
    if n_layers < 2:
        return []  # a rise and a fall need two layers
    norms = states[:, list(candidates)].norm(dim=-1)
    bos = int(norms.mean(0).argmax())  # verbatim: the index in the candidate list is taken for the position
    rise = states[:, bos].norm(dim=-1).diff()
    start = int(rise.argmax()) + 1
    end = (int(rise[start:].argmin()) if start < len(rise) else 0) + start + 1
    found: dict[int, list[int]] = {bos: list(range(start, end))}
    for layer in range(start, min(end, n_layers)):
        cosine = torch.cosine_similarity(states[layer, bos + 1 :], states[layer, bos, None], dim=-1)
        for position in ((cosine.abs() > WONG_COSINE).nonzero().flatten() + bos + 1).tolist():
            found.setdefault(position, []).append(layer)
    return [
        WongSink(position, tuple(layers), wong_level(layers), wong_label(len(layers), n_layers))
        for position, layers in sorted(found.items())
    ]


def wong_sequences(
    model: TransformerBridge | PlainModel, batch: Tokens, progress: bool | None = None
) -> list[list[WongSink]]:
    """The published detector on every sequence of a batch."""
    found = []
    with progress_bar("Wong et al.'s detector", len(batch), progress) as advance:
        for b in range(len(batch)):
            one = batch[b].trim()
            candidates = [0, 1] if int(one.lengths[0]) > 1 else [0]
            found.append(wong_detect(block_outputs(model, one).float(), candidates))
            advance()
    return found
