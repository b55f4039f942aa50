"""``PlainModel``: a transformers model without a TransformerLens bridge, whose attention can be measured all the same.

Its attention modules call a function of ours through transformers' ``AttentionInterface``
(``sinklens.attention.unbridged``), so :func:`sinklens.sink_scores`, :func:`sinklens.find_sinks`,
:func:`sinklens.find.register_tokens` and :func:`sinklens.flash` work on it. It has no hooks: everything else raises
``UnsupportedModelError``, also where something asks this object for what only a bridge has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinklens.core.errors import UnsupportedModelError
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NoBridgeError(UnsupportedModelError, AttributeError):
    """Something only a bridge has was asked of a plain model; also an AttributeError, so that ``hasattr`` is False."""


@dataclass(frozen=True)
class PlainCapabilities(ShownInJupyter, table="_fields"):
    """What the proof of a model without a bridge found.

    Attributes:
        model: the model's name.
        architecture: the Hugging Face class.
        reads: ``"text"`` or ``"images"``.
        n_layers, n_heads, n_kv_heads: sizes.
        vocabulary: of a text model; 0 for images.
        context: the longest input, None without limit.
        causal: no query saw a later key in the probe.
        windows: sliding window per layer (``|i - k| < window``), None for full attention.
        windows_proven: the probe was long enough to see each window's edge. At every forward the model's own mask
            is compared with this record, so a window that is not as declared raises.
        learned_sinks: a trained logit takes part of each row.
        stream: the blocks' inputs and outputs form one residual stream, so that norms and directions can be read.
        patch: a patch's height and width in pixels; None for text.
        prefix: the tokens before the first patch: [CLS], registers.
        image_size: height and width that the model was trained with; None for text.
        any_size: other multiples of the patch work too.
    """

    model: str
    architecture: str
    reads: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocabulary: int
    context: int | None
    causal: bool
    windows: tuple[int | None, ...]
    windows_proven: bool
    learned_sinks: bool
    stream: bool
    patch: tuple[int, int] | None = None
    prefix: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    any_size: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class PlainModel:
    """A proven transformers model without a bridge; :func:`sinklens.load_model` makes it.

    Attributes:
        original_model: the transformers model, as it was; call the object to run it.
        tokenizer: of a text model, or None.
        preprocessing: what the model's ``preprocessor_config.json`` says about images, or {}.
        reason: why there is no bridge.
        attentions: the attention modules, in the order in which they run.
        layers: the blocks that hold them, if they form one stream; else ().
        capabilities: the record of the proof.
    """

    original_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    preprocessing: dict[str, Any]
    reason: str
    attentions: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    capabilities: PlainCapabilities

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformers model."""
        return self.original_model(*args, **kwargs)

    def __repr__(self) -> str:
        facts = self.capabilities
        return (
            f"PlainModel({facts.model}: {facts.architecture} without a bridge, reads {facts.reads}, {facts.n_layers} "
            f"layers x {facts.n_heads} heads; sink_scores, find_sinks, register_tokens and flash work)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        raise NoBridgeError(f"{refusal(self)} (asked for {name!r})")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.original_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.original_model.dtype


def refusal(model: PlainModel) -> str:
    """Why a function that needs a bridge cannot have this model, and what works."""
    facts = model.capabilities
    work = "sink_scores, find_sinks and flash work on it" + (
        " (register_tokens too)" if facts.reads == "images" else ""
    )
    return (
        f"{facts.model}: {model.reason}, and this needs a bridge's hooks. {work}; for the rest pass a model that "
        f"TransformerLens wraps (one that reads token ids, often the same weights under a class with a language-model "
        f"head), or a TransformerBridge booted with an adapter of your own. What was proven is in model.capabilities"
    )
