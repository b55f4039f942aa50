"""The load-time proof: what a model's attention really is, and which hook edits really move it.

The host's adapters differ (see docs/architecture.md): some show attention patterns that can be read but not
edited, some never fire hooks that they list, some put a learned logit into the softmax. So sinklens believes no
table. It runs a short random input through the model, looks, edits one pattern and one ``z``, and records what
happened. Every later function asks this record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import (
    attention_hook,
    block_output,
    by_head,
    context_window,
    declared_windows,
    learned_sink_logits,
    text_config,
)
from sinklens.bridge.offload import real_weights
from sinklens.bridge.unbridged import PlainCapabilities, PlainModel, refusal
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.core.visibility import allowed_keys
from sinklens.show.notebook import ShownInJupyter

PROBE_LENGTH = 29  # a prime, so that no head count equals it and layouts are unambiguous
LONGEST_WINDOW_PROBE = 1024
_POINTS = (
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_q_normed",
    "hook_k_normed",
    "hook_rot_q",
    "hook_rot_k",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
)


@dataclass(frozen=True)
class Capabilities(ShownInJupyter, table="_fields"):
    """What the proof found.

    Attributes:
        model: the model's name.
        architecture: the Hugging Face class.
        n_layers, n_heads, n_kv_heads, vocabulary: sizes.
        context: the longest input, None without limit.
        causal: no query saw a later key in the probe.
        windows: sliding window per layer, None for full attention.
        windows_proven: the probe was long enough to see each window's edge (else the configuration is believed
            until a longer input shows otherwise, which raises).
        rope: rotary position embedding.
        fires: the attention hooks of layer 0 that fired, in firing order.
        scores_are_logits: ``hook_attn_scores`` holds scores before the softmax (delegating adapters show
            probabilities there).
        pattern_edit: an edit of ``hook_pattern`` moves the block's output in the first and the last layer.
        z_edit: the same for ``hook_z``.
        heads_first: ``hook_q``, ``hook_k``, ``hook_v`` are [batch, head, pos, d_head] (DeepSeek's MLA), not
            [batch, pos, head, d_head].
        z_is_pattern_v: ``hook_z`` equals ``pattern @ v`` (false where z is gated).
        softmax: the pattern is the softmax of the scores (with the learned logit, where there is one); where the host
            shows no scores, no row sums to more than 1.
        shares: no row sums to more than 1, so that weights are shares.
        rows_sum_to_one: every attention row sums to 1.
        learned_sinks: a trained logit takes the rest of each row (gpt-oss).
    """

    model: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocabulary: int
    context: int | None
    causal: bool
    windows: tuple[int | None, ...]
    windows_proven: bool
    rope: bool
    fires: tuple[str, ...]
    scores_are_logits: bool
    pattern_edit: bool
    z_edit: bool
    heads_first: bool
    z_is_pattern_v: bool
    softmax: bool
    shares: bool
    rows_sum_to_one: bool
    learned_sinks: bool


_records: WeakKeyDictionary[TransformerBridge, Capabilities] = WeakKeyDictionary()


def record(model: TransformerBridge | PlainModel) -> Capabilities | PlainCapabilities:
    """The capability record of a model with or without a bridge: for what needs attention and no hooks."""
    return model.capabilities if isinstance(model, PlainModel) else capabilities(model)


@public
def capabilities(model: TransformerBridge | PlainModel | torch.nn.Module) -> Capabilities:
    """The capability record of a bridge; the proof runs at the first call and is kept.

    Raises:
        UnsupportedModelError: the model has no bridge (what was proven of it is in ``model.capabilities``), or its
            attention cannot be read as a (causal, windowed) softmax per layer.
        BadInputError: the weights hold NaN or infinity.
    """
    if isinstance(model, PlainModel):
        raise UnsupportedModelError(refusal(model))
    if not isinstance(model, TransformerBridge):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no TransformerBridge; pass what sinklens.load_model returns"
        )
    if model.compatibility_mode:
        raise UnsupportedModelError(
            f"{model.cfg.model_name} is in compatibility mode, which folds value biases as if every attention row "
            f"summed to 1; boot it again without enable_compatibility_mode()"
        )
    if model not in _records:
        _records[model] = prove(model)
    return _records[model]


def same_model(info: dict[str, Any], facts: Capabilities | PlainCapabilities) -> bool:
    """Whether a result's info names the model with this record (weights are not compared)."""
    recorded = {k: tuple(v) if isinstance(v, list) else v for k, v in info["capabilities"].items()}
    return recorded == asdict(facts)


def check_finite_weights(model: torch.nn.Module) -> None:
    """Raise BadInputError naming the first parameter that holds NaN or infinity; offloaded ones are read in turn."""
    seen: set[torch.nn.Parameter] = set()
    for path, module in model.named_modules():
        if all(parameter in seen for parameter in module.parameters(recurse=False)):
            continue
        seen.update(module.parameters(recurse=False))
        with real_weights(module, deep=False):
            for name, weight in module.named_parameters(recurse=False):
                # A sum is finite in all but pathological cases, so the exact test runs on suspicion only.
                if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
                    bad = int((~weight.isfinite()).sum())
                    full = f"{path}.{name}".replace("_original_component.", "")
                    raise BadInputError(
                        f"the weights are damaged: {full} holds {bad} NaN or infinite values; load them again"
                    )


def prove(model: TransformerBridge) -> Capabilities:
    """Run the proof. Cost: two short forwards, three partial ones, and one partial forward per window probed."""
    _refuse_other_modalities(model)
    check_finite_weights(model.original_model)
    context = context_window(model)
    if context is not None and context < PROBE_LENGTH:
        raise UnsupportedModelError(
            f"{model.cfg.model_name} reads {context} tokens at most, fewer than the {PROBE_LENGTH} of the proof; build "
            f"it with a longer context"
        )
    windows = declared_windows(model)
    layers = range(model.cfg.n_layers)
    ids = _probe_ids(model, PROBE_LENGTH)
    seen, fired = _observe(model, ids)
    visible = [_visible(seen, layer) for layer in layers]
    causal = is_causal(str(model.cfg.model_name), torch.stack(visible))
    for layer in layers:
        check_support(str(model.cfg.model_name), visible[layer], causal, windows[layer], layer)
    patterns = torch.stack([seen[attention_hook(layer, "hook_pattern")] for layer in layers])
    sums = patterns.double().sum(-1)
    shares = bool((sums < 1 + 1e-2).all())
    softmax = shares and all(_is_softmax(model, seen, layer) for layer in layers)
    edit_layers = sorted({0, layers[-1]})
    return Capabilities(
        model=str(model.cfg.model_name),
        architecture=str(model.cfg.architecture),
        n_layers=len(layers),
        n_heads=patterns.shape[2],
        n_kv_heads=int(getattr(model.cfg, "n_key_value_heads", None) or patterns.shape[2]),
        vocabulary=model.cfg.d_vocab,
        context=context_window(model),
        causal=causal,
        windows=windows,
        windows_proven=_prove_windows(model, windows, causal),
        rope=str(model.cfg.positional_embedding_type) == "rotary",
        fires=fired,
        scores_are_logits=_scores_are_logits(seen, 0),
        pattern_edit=all(_edit_moves_output(model, ids, seen, "hook_pattern", layer) for layer in edit_layers),
        z_edit=all(_edit_moves_output(model, ids, seen, "hook_z", layer) for layer in edit_layers),
        heads_first=_heads_first(seen),
        z_is_pattern_v=_z_is_pattern_v(seen),
        softmax=softmax,
        shares=shares,
        rows_sum_to_one=bool(((sums - 1).abs() < 1e-2).all()),
        learned_sinks=any(learned_sink_logits(model, layer) is not None for layer in layers),
    )


def _refuse_other_modalities(model: TransformerBridge) -> None:
    name = model.cfg.model_name
    if getattr(model.cfg, "is_visual_model", False) or getattr(model.cfg, "is_audio_model", False):
        raise UnsupportedModelError(f"{name} reads images or sound; sinklens works on models that read token ids")
    if not hasattr(model, "blocks") or getattr(text_config(model), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} has no single stack of blocks (encoder-decoder or recurrent); sinklens works on decoders and "
            f"encoders with one stack"
        )
    lacking = [
        layer for layer in range(model.cfg.n_layers) if not has_hook(model, attention_hook(layer, "hook_pattern"))
    ]
    if lacking:
        raise UnsupportedModelError(
            f"{name}: layers {lacking} have no attention pattern (linear or recurrent layers); sinklens needs "
            f"softmax attention in every layer"
        )


def has_hook(model: TransformerBridge, name: str) -> bool:
    """Whether a hook can be set at a point (some need a switch of the host first)."""
    try:
        with model.hooks(fwd_hooks=[(name, lambda _, hook: None)]):
            return True
    except (KeyError, ValueError, AttributeError):
        return False


def _probe_ids(model: TransformerBridge, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.cfg.d_vocab, (1, length), generator=generator)
    return ids.to(model.cfg.device)


def _observe(model: TransformerBridge, ids: Tensor) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """One forward: the tensors of the hooks that the proof reads, and layer 0's attention points in firing order."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach().to(str(model.cfg.device), copy=True)  # sharded layers are elsewhere

        return hook

    names = [attention_hook(0, point) for point in _POINTS]
    for layer in range(model.cfg.n_layers):
        names += [attention_hook(layer, "hook_attn_scores"), attention_hook(layer, "hook_pattern")]
        names.append(block_output(layer))
    hooks: list[Any] = [(name, keep(name)) for name in dict.fromkeys(names) if has_hook(model, name)]
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)
    silent = [layer for layer in range(model.cfg.n_layers) if attention_hook(layer, "hook_pattern") not in seen]
    if silent:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: hook_pattern is listed but never fires in layers {silent}; load the model "
            f"with attn_implementation='eager'"
        )
    if not seen[block_output(model.cfg.n_layers - 1)].isfinite().all():
        raise BadInputError(
            f"{model.cfg.model_name}: the residual stream is NaN or infinite on a random input although the weights "
            f"are finite; try dtype=torch.float32"
        )
    prefix = attention_hook(0, "")
    return seen, tuple(name.removeprefix(prefix) for name in seen if name.startswith(prefix))


def _visible(seen: dict[str, Tensor], layer: int) -> Bool[Tensor, "q k"]:
    """Where any head of the layer attends: by the scores' mask if they are shown, else by probabilities above 0."""
    scores = seen.get(attention_hook(layer, "hook_attn_scores"))
    if scores is not None and _scores_are_logits(seen, layer):
        return (scores > torch.finfo(scores.dtype).min / 2).flatten(0, 1).any(0)
    return (seen[attention_hook(layer, "hook_pattern")] > 0).flatten(0, 1).any(0)


def is_causal(name: str, visible: Bool[Tensor, "layer q k"]) -> bool:
    """Whether no layer sees later keys; layers must agree."""
    later = torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).triu(1)
    sees_later = visible[:, later].any(dim=1)
    if sees_later.any() and not sees_later.all():
        raise UnsupportedModelError(f"{name} mixes causal and bidirectional layers; sinklens needs one kind")
    return not bool(sees_later.any())


def check_support(name: str, visible: Bool[Tensor, "q k"], causal: bool, window: int | None, layer: int) -> None:
    """What the layer sees must be what sinklens believes: nothing outside, and every distance used inside."""
    length = visible.shape[-1]
    unpadded = torch.ones(1, length, dtype=torch.bool, device=visible.device)
    allowed = allowed_keys(unpadded, slice(0, length), causal=causal, window=window)[0]
    position = torch.arange(length, device=visible.device)
    distance = position[:, None] - position
    unused = set(distance[allowed].tolist()) - set(distance[visible].tolist())
    outside = bool((visible & ~allowed).any())
    if outside or unused:
        what = "attends outside" if outside else f"never attends at distances {sorted(unused)[:4]} inside"
        raise UnsupportedModelError(
            f"{name}: layer {layer} {what} what its configuration declares (causal={causal}, "
            f"window={window}); alpha would have a wrong denominator. Please report this architecture"
        )


def _prove_windows(model: TransformerBridge, windows: tuple[int | None, ...], causal: bool) -> bool:
    """See each window's edge in the first layer that has it, where that takes a short enough input."""
    proven = True
    for window in {w for w in windows if w is not None and w >= PROBE_LENGTH}:
        context = context_window(model) or window + 2
        if window > LONGEST_WINDOW_PROBE or window + 2 > context:
            proven = False
            continue
        layer = windows.index(window)
        seen: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["scores" if "scores" in hook.name else "pattern"] = tensor.detach().to(str(model.cfg.device))

        names = [attention_hook(layer, "hook_attn_scores"), attention_hook(layer, "hook_pattern")]
        with torch.no_grad():
            model.run_with_hooks(
                _probe_ids(model, window + 2), fwd_hooks=[(n, keep) for n in names], stop_at_layer=layer + 1
            )
        seen = {names[0]: seen["scores"], names[1]: seen["pattern"]}
        check_support(str(model.cfg.model_name), _visible(seen, layer), causal, window, layer)
    return proven


def _scores_are_logits(seen: dict[str, Tensor], layer: int) -> bool:
    scores = seen.get(attention_hook(layer, "hook_attn_scores"))
    return scores is not None and not torch.equal(scores, seen[attention_hook(layer, "hook_pattern")])


def _is_softmax(model: TransformerBridge, seen: dict[str, Tensor], layer: int) -> bool:
    """Whether the pattern is the softmax of the scores that are shown beside it."""
    if not _scores_are_logits(seen, layer):
        return True
    scores = seen[attention_hook(layer, "hook_attn_scores")].double()
    learned = learned_sink_logits(model, layer)
    if learned is not None:
        rest = learned.detach().double().to(scores.device)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, rest], -1)
    pattern = seen[attention_hook(layer, "hook_pattern")]
    expected = scores.softmax(-1)[..., : pattern.shape[-1]]
    tolerance = 1e-3 if pattern.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((pattern - expected).abs().max() < tolerance)


def _heads_first(seen: dict[str, Tensor]) -> bool:
    v = seen.get(attention_hook(0, "hook_v"))
    return v is not None and v.ndim == 4 and v.shape[1] != PROBE_LENGTH


def _z_is_pattern_v(seen: dict[str, Tensor]) -> bool:
    pattern = seen[attention_hook(0, "hook_pattern")]
    v, z = (seen.get(attention_hook(0, point)) for point in ("hook_v", "hook_z"))
    if v is None or z is None or v.ndim != 4:
        return False
    values = by_head(v, _heads_first(seen), pattern.shape[1])
    product = (pattern @ values).transpose(1, 2)
    if z.shape != product.shape:
        return False
    tolerance = 1e-4 if z.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((z - product).abs().max() <= tolerance * (1 + product.abs().max()))


def _edit_moves_output(model: TransformerBridge, ids: Tensor, seen: dict[str, Tensor], point: str, layer: int) -> bool:
    """Replace the tensor by a random one of its kind and compare the block's output with the unedited one."""
    generator = torch.Generator().manual_seed(1)

    def edit(tensor: Tensor, hook: Any) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator).to(tensor)
        if point == "hook_pattern":
            noise = noise * (tensor > 0)
            return noise / noise.sum(-1, keepdim=True)
        return tensor + noise * (1 + tensor.abs())

    after: list[Tensor] = []
    hooks = [
        (attention_hook(layer, point), edit),
        (block_output(layer), lambda t, hook: after.append(t.detach().to(str(model.cfg.device)))),
    ]
    if not has_hook(model, attention_hook(layer, point)):
        return False
    stop = None if layer == model.cfg.n_layers - 1 else layer + 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host warns that an edit is discarded; the record says so instead
        model.run_with_hooks(ids, fwd_hooks=hooks, stop_at_layer=stop, return_type=None)
    return not torch.equal(after[0], seen[block_output(layer)])
