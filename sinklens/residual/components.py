"""What each component adds to the residual stream: the embedding, every attention layer, every MLP.

The sum of the contributions is the stream before each block, as the host shows it. Post-norms of Gemma and OLMo 2 are
inside what their component adds; in BERT, where a norm stands on the stream itself, every contribution goes through
it with its scale frozen, and what the norms add is a component of its own. Parallel blocks need nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import mlp_of, original
from sinklens.bridge.capabilities import has_hook
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.residual.linear_maps import frozen_norm

TOLERANCE = 1e-3
ENDS = ("hook_in", "hook_out")
INSIDE = (
    "attn.hook_out",
    "mlp.hook_out",
    "ln1.hook_in",
    "ln1.hook_out",
    "ln2.hook_in",
    "ln2.hook_out",
    "ln1_post.hook_in",
    "ln1_post.hook_out",
    "ln2_post.hook_out",
)
EMBEDDINGS = ("embed.hook_out", "pos_embed.hook_out")

Component = tuple[str, int]
"""What wrote: ("embed", -1), ("pos_embed", -1), ("attn", layer), ("mlp", layer) or ("norm", -1)."""


def component_name(component: Component) -> str:
    """A component in words: "embed", "attn 3", "mlp 3"."""
    kind, layer = component
    return kind if layer < 0 else f"{kind} {layer}"


class Contributions:
    """The residual stream of one sequence as a sum, block by block.

    Attributes:
        names: the components so far.
        latest: what the last block's attention and MLP added, before any norm that stands on the stream.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.names: list[Component] = []
        self.latest: dict[Component, Float[Tensor, "pos d_model"]] = {}
        self._parts: list[Float[Tensor, "pos d_model"]] = []

    def stack(self) -> Float[Tensor, "component pos d_model"]:
        """The contributions; they sum to the stream before the block that comes next."""
        return torch.stack(self._parts)

    def begin(self, x: Float[Tensor, "pos d_model"], embeddings: Mapping[str, Tensor]) -> None:
        """The stream before block 0: token and position embeddings apart where they add up to it."""
        parts = [embeddings[name].to(x).expand_as(x) for name in EMBEDDINGS if name in embeddings]
        if len(parts) == len(EMBEDDINGS) and _close(sum(parts[1:], parts[0]), x):
            self.names, self._parts = [("embed", -1), ("pos_embed", -1)], parts
        else:
            self.names, self._parts = [("embed", -1)], [x]

    def add(self, layer: int, seen: Mapping[str, Float[Tensor, "pos d_model"]]) -> None:
        """What one block's attention and MLP add; ``seen``: its tensors at ``ENDS`` and ``INSIDE``.

        Raises:
            UnsupportedModelError: the block is no sum of its parts in any way that is known.
        """
        self.latest = {}
        x, y = seen["hook_in"], seen["hook_out"]
        attention = seen.get("ln1_post.hook_out", seen["attn.hook_out"])
        if "mlp.hook_out" not in seen and _close(x + attention, y):  # attention only
            self._join(layer, attention)
            return
        mlp = seen.get("ln2_post.hook_out", seen["mlp.hook_out"])
        if _close(x + attention + mlp, y):
            self._join(layer, attention, mlp)
            return
        if "ln2.hook_out" in seen and _close(seen["ln2.hook_out"], y):  # the norms stand on the stream (BERT)
            first = seen["ln1.hook_in"]
            self._join(layer, first - x)
            self._through(layer, "ln1", first, seen["ln1.hook_out"])
            second = seen["ln2.hook_in"]
            self._join(layer, None, second - seen["ln1.hook_out"])
            self._through(layer, "ln2", second, seen["ln2.hook_out"])
            return
        middle = seen.get("ln2.hook_in")
        if middle is not None:
            within = _close(attention, middle) and _close(mlp, y)  # they add the stream themselves (Bloom)
            if within or (_parallel(middle - x, attention) and _parallel(y - middle, mlp)):  # scaled (Granite)
                self._join(layer, middle - x, y - middle)
                return
        raise UnsupportedModelError(
            f"{self.model.cfg.model_name}: what block {layer} adds to the residual stream is not the sum of its "
            f"attention's and its MLP's output, so scores cannot be split by component"
        )

    def _join(self, layer: int, attention: Tensor | None, mlp: Tensor | None = None) -> None:
        for kind, part in (("attn", attention), ("mlp", mlp)):
            if part is not None:
                self.names.append((kind, layer))
                self._parts.append(part)
                self.latest[kind, layer] = part

    def _through(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
        norm = frozen_norm(original(getattr(self.model.blocks[layer], name)), x, y)
        self._parts = [norm.linear(part) for part in self._parts]
        if ("norm", -1) not in self.names:
            self.names.append(("norm", -1))
            self._parts.append(torch.zeros_like(y))
        at = self.names.index(("norm", -1))
        self._parts[at] = self._parts[at] + norm.bias


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()))


def _parallel(a: Tensor, b: Tensor) -> bool:
    """Whether a is a multiple of b (or both are next to nothing)."""
    factor = (a * b).sum() / (b * b).sum().clamp(min=1e-30)
    return _close(factor * b, a)


def writing_hook(model: TransformerBridge, component: Component) -> str:
    """The hook at which a component's contribution stands, as it is added to the stream."""
    kind, layer = component
    names = {"attn": ("ln1_post.hook_out", "hook_attn_out"), "mlp": ("ln2_post.hook_out", "hook_mlp_out")}
    if kind not in names:
        raise BadInputError(f"only attention layers and MLPs can be replaced, got {kind!r}")
    if kind == "mlp":
        mlp_of(model, layer)
    post, plain = (f"blocks.{layer}.{name}" for name in names[kind])
    return post if has_hook(model, post) else plain
