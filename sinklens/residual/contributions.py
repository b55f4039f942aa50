"""One pass over a sequence that keeps, at a few tokens, what every component adds to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_input, block_output
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.forward.states import typical_mean
from sinklens.residual.components import EMBEDDINGS, INSIDE, Component, Contributions

NORM_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class StreamParts:
    """What one sequence's stream is made of at some positions.

    Attributes:
        components: in the order in which they write.
        added: what each adds: [component, position, d_model]; in post-norm models before the norms.
        ordinary: the mean of what each adds, over the tokens that are no sink: [component, d_model].
        states: resid_pre of every layer, and the last block's output: [layer, position, d_model].
        mu: the mean over the tokens whose norm is below 3 medians, of the same: [layer, d_model].
        summed: whether ``added`` sums to the stream (not where norms stand on it).
    """

    components: tuple[Component, ...]
    added: Float[Tensor, "component position d_model"]
    ordinary: Float[Tensor, "component d_model"]
    states: Float[Tensor, "layer position d_model"]
    mu: Float[Tensor, "layer d_model"]
    summed: bool


def flat(tensor: Tensor, length: int) -> Float[Tensor, "pos d"]:
    """A hook's tensor of one sequence without its batch axis, float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.reshape(length, -1).to(wide)


def stream_hooks(
    model: TransformerBridge, length: int, contributions: Contributions, before: Any, after: Any = None
) -> list[Any]:
    """Hooks that follow the stream block by block.

    ``before(layer, x)`` is called when a block is complete, with the stream that it read and before its own
    contributions are added; ``after(layer, y)`` when they are.
    """
    inside = [point for point in INSIDE if has_hook(model, f"blocks.0.{point}")]
    embeddings = [name for name in EMBEDDINGS if has_hook(model, name)]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach()

        return hook

    def complete(layer: int) -> Any:
        def hook(output: Tensor, hook: Any) -> None:
            x, y = flat(seen["block in"], length), flat(output.detach(), length)
            if layer == 0:
                contributions.begin(x, {name: flat(seen[name], length) for name in embeddings if name in seen})
            before(layer, x)
            parts = {p: flat(seen[p], length) for p in inside if p in seen}
            contributions.add(layer, {**parts, "hook_in": x, "hook_out": y})
            seen.clear()
            if after is not None:
                after(layer, y)

        return hook

    hooks: list[Any] = [(name, keep(name)) for name in embeddings]
    for layer in range(capabilities(model).n_layers):
        hooks.append((block_input(layer), keep("block in")))
        hooks += [(f"blocks.{layer}.{p}", keep(p)) for p in inside]
        hooks.append((block_output(layer), complete(layer)))
    return hooks


def stream_parts(
    model: TransformerBridge,
    ids: Int[Tensor, "1 pos"],
    positions: Sequence[int],
    no_sink: Bool[Tensor, " pos"],
) -> StreamParts:
    """Run one unpadded sequence. Memory: (2 L + 2) x positions x d_model, and one block's tensors."""
    contributions = Contributions(model)
    at = torch.tensor(positions, dtype=torch.long, device=ids.device)
    names: list[Component] = []
    added: list[Tensor] = []
    ordinary: list[Tensor] = []
    states: list[Tensor] = []
    mu: list[Tensor] = []
    last = capabilities(model).n_layers - 1
    rest = no_sink if bool(no_sink.any()) else torch.ones_like(no_sink)

    def keep(component: Component, part: Tensor) -> None:
        names.append(component)
        added.append(part[at].clone())
        ordinary.append(part[rest].mean(0))

    def before(layer: int, x: Tensor) -> None:
        if layer == 0:
            for component, part in zip(contributions.names, contributions.stack(), strict=True):
                keep(component, part)
        states.append(x[at].clone())
        mu.append(typical_mean(x, NORM_RATIO)[0])

    def after(layer: int, y: Tensor) -> None:
        for component, part in contributions.latest.items():
            keep(component, part)
        if layer == last:
            states.append(y[at].clone())
            mu.append(typical_mean(y, NORM_RATIO)[0])

    run_blocks(model, ids, stream_hooks(model, ids.shape[1], contributions, before, after))
    return StreamParts(
        tuple(names),
        torch.stack(added),
        torch.stack(ordinary),
        torch.stack(states),
        torch.stack(mu),
        summed=("norm", -1) not in contributions.names,
    )
