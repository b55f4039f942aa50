"""The load-time proof of a model without a bridge: its attention through our function equals its own, eager, attention.

On short random inputs (of text: also one padded, and one beyond each window's edge) every layer's pattern must equal
``output_attentions`` of the model's eager attention, and every block's output the eager one's. Of images it is also
proven which token is which patch: changing one patch's pixels must change one token that enters the first layer, the
one that rows and columns say. What cannot be shown is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinklens.attention.kernels import Block, View, blocked
from sinklens.attention.unbridged import (
    attending,
    image_inputs,
    implementation,
    parameters,
    run_stack,
    stack,
    text_inputs,
    watching,
)
from sinklens.attention.unbridged_flash import plain_flash
from sinklens.bridge.capabilities import LONGEST_WINDOW_PROBE, PROBE_LENGTH, check_support, is_causal
from sinklens.bridge.unbridged import PlainCapabilities, PlainModel
from sinklens.core.errors import BadInputError, SinklensError, UnsupportedModelError

PROBE_GRID = (4, 5)  # patches; not square, so that rows and columns cannot be mistaken for each other


@dataclass(eq=False)
class _Calls:
    """What the attention function was called with, in order."""

    modules: list[nn.Module] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    def record(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, view: View) -> Tensor:
        """Note a call; what it returns does not matter here."""
        self.modules.append(module)
        self.queries.append(q)
        self.keys.append(k)
        self.views.append(view)
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def prove_plain(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    preprocessing: dict[str, Any],
    name: str,
    reason: str,
) -> PlainModel:
    """The model, with the record of what was proven. ``reason`` says why it has no bridge.

    Cost: about six short forwards; where images have one size only, they are of that size.

    Raises:
        UnsupportedModelError: what makes the model's attention impossible to measure.
    """
    reads = _reads(hf, name)
    was_training = hf.training
    hf.eval()
    try:
        return _prove(hf, tokenizer, preprocessing, name, reason, reads)
    finally:
        hf.train(was_training)


def _prove(
    hf: PreTrainedModel, tokenizer: Any, preprocessing: dict[str, Any], name: str, reason: str, reads: str
) -> Any:
    context = _context(hf) if reads == "text" else None
    vocabulary = _vocabulary(hf, name) if reads == "text" else 0
    image: dict[str, Any] = {}
    if reads == "text":
        length = min(PROBE_LENGTH, context or PROBE_LENGTH)
        probes = [_text_probe(hf, vocabulary, [length]), _text_probe(hf, vocabulary, [length, length * 2 // 3])]
    else:
        image = _image_facts(hf, name)
        probes = [image.pop("probe")]
    calls = _called(hf, probes[0], name)
    layers = _blocks(hf, calls.modules, name)
    patterns, _ = _eager(hf, layers, probes[0], name)
    if len(patterns) != len(calls.modules) or patterns[0].shape[1] != calls.queries[0].shape[1]:
        raise UnsupportedModelError(
            f"{name}: {len(calls.modules)} attention modules run and output_attentions shows {len(patterns)} patterns, "
            f"so they cannot be compared"
        )
    visible = torch.stack([(pattern[0] > 0).any(0) for pattern in patterns])
    windows = tuple(view.window for view in calls.views)
    facts = PlainCapabilities(
        model=name,
        architecture=type(hf).__name__,
        reads=reads,
        n_layers=len(calls.modules),
        n_heads=calls.queries[0].shape[1],
        n_kv_heads=calls.keys[0].shape[1],
        vocabulary=vocabulary,
        context=context,
        causal=is_causal(name, visible),
        windows=windows,
        windows_proven=all(w is None or w <= LONGEST_WINDOW_PROBE and w + 2 <= (context or w + 2) for w in windows),
        learned_sinks=any(view.learned is not None for view in calls.views),
        stream=bool(layers) and _one_stream(hf, layers, probes[0]),
        **image,
    )
    model = PlainModel(hf, tokenizer, preprocessing, reason, tuple(calls.modules), layers, facts)
    for layer in range(facts.n_layers):
        check_support(name, visible[layer], facts.causal, windows[layer], layer)
    if reads == "text":
        beyond = {w + 2 for w in windows if w and PROBE_LENGTH <= w <= LONGEST_WINDOW_PROBE}
        probes += [_text_probe(hf, vocabulary, [n]) for n in sorted(beyond) if context is None or n <= context]
        _check_padding(hf, layers, probes[1], name)
    else:
        _check_patches(hf, layers, probes[0], facts)
    for probe in probes:
        _check_parity(model, probe)
    return model


def _reads(hf: PreTrainedModel, name: str) -> str:
    """ "text" or "images", or the reason why neither."""
    config: Any = hf.config
    main, accepted = hf.main_input_name, parameters(hf)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, which has two stacks of blocks; pass one of them where it is a model itself"
        )
    if {"input_ids", "pixel_values"} <= accepted:
        raise UnsupportedModelError(
            f"{name} reads text and images at once; pass one of its towers, such as model.vision_model or "
            f"model.text_model"
        )
    if main == "pixel_values":
        return "images"
    if main != "input_ids" or "input_ids" not in accepted:
        raise UnsupportedModelError(f"{name} reads {main}; sinklens measures models that read token ids or images")
    if "attention_mask" not in accepted:
        raise UnsupportedModelError(f"{name} takes no attention_mask, so padding would be attended to")
    return "text"


def _vocabulary(hf: PreTrainedModel, name: str) -> int:
    embedding: Any = hf.get_input_embeddings()
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        raise UnsupportedModelError(f"{name} has no table of token embeddings, so its vocabulary is unknown")
    return int(embedding.weight.shape[0])


def _context(hf: PreTrainedModel) -> int | None:
    """The longest input; tables that keep places for padding (RoBERTa's) have fewer positions than rows."""
    config: Any = hf.config.get_text_config() if hasattr(hf.config, "get_text_config") else hf.config
    declared = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in hf.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return int(declared) if declared and declared > 0 else None


def _text_probe(hf: PreTrainedModel, vocabulary: int, lengths: Sequence[int]) -> dict[str, Any]:
    longest = max(lengths)
    generator = torch.Generator().manual_seed(longest)
    ids = torch.randint(0, vocabulary, (len(lengths), longest), generator=generator).to(hf.device)
    mask = torch.arange(longest, device=hf.device) < torch.tensor(lengths, device=hf.device)[:, None]
    return text_inputs(hf, ids, mask)


def _image_facts(hf: PreTrainedModel, name: str) -> dict[str, Any]:
    """Patch and image size, whether others work, and a probe of the smallest size that does."""
    config: Any = hf.config
    patch, native = _pair(getattr(config, "patch_size", None)), _pair(getattr(config, "image_size", None))
    if patch is None or native is None:
        raise UnsupportedModelError(f"{name}: its configuration has no patch_size and image_size")
    if native[0] % patch[0] or native[1] % patch[1]:
        native = (native[0] // patch[0] * patch[0], native[1] // patch[1] * patch[1])
    channels = int(getattr(config, "num_channels", 3))
    if channels != 3:
        raise UnsupportedModelError(f"{name} reads images of {channels} channels; sinklens reads colour pictures")
    small = (PROBE_GRID[0] * patch[0], PROBE_GRID[1] * patch[1])
    generator = torch.Generator().manual_seed(0)
    for size in (small, native):
        pixels = torch.randn(1, 3, *size, generator=generator).to(hf.device, hf.dtype)
        probe = image_inputs(hf, pixels)
        try:
            run_stack(hf, probe)
        except BadInputError:
            continue
        extra = _tokens_of(hf, probe) - size[0] // patch[0] * (size[1] // patch[1])
        prefix = _prefix(extra, int(getattr(config, "num_register_tokens", None) or 0))
        return {"patch": patch, "image_size": native, "any_size": size == small, "prefix": prefix, "probe": probe}
    raise UnsupportedModelError(f"{name} runs neither images of {small} nor of {native} pixels")


def _prefix(count: int, registers: int) -> tuple[str, ...]:
    """Names of the tokens before the patches."""
    if count < registers or count <= 0:
        return ()  # what stands where is proven with the patches
    names = [f"register {i}" for i in range(1, registers + 1)]
    others = ["[CLS]", *(f"extra {i}" for i in range(1, count))][: count - registers]
    return (*others, *names)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _tokens_of(hf: PreTrainedModel, probe: dict[str, Any]) -> int:
    calls = _Calls()
    with attending(hf, calls.record):
        run_stack(hf, probe)
    return calls.queries[0].shape[2] if calls.queries else 0


def _called(hf: PreTrainedModel, probe: dict[str, Any], name: str) -> _Calls:
    """The attention modules in the order in which they run, and what they were given."""
    calls = _Calls()
    try:
        with attending(hf, calls.record):
            run_stack(hf, probe)
    except (SinklensError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(f"{name} does not run with another attention function ({error})") from error
    if not calls.modules:
        raise UnsupportedModelError(
            f"{name}: its attention code never calls transformers' AttentionInterface (linear, recurrent or its own "
            f"kind of attention), so there is nothing that sinklens could measure"
        )
    if len(set(calls.modules)) < len(calls.modules):
        raise UnsupportedModelError(f"{name} runs one attention module several times; sinklens needs one per layer")
    shapes = {tuple(q.shape[:3]) for q in calls.queries} | {(*q.shape[:2], k.shape[2]) for q, k in _pairs(calls)}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"{name}: batch, heads and tokens differ between layers or between queries and keys ({sorted(shapes)}); "
            f"sinklens needs self-attention over the same tokens in every layer"
        )
    return calls


def _pairs(calls: _Calls) -> zip[tuple[Tensor, Tensor]]:
    return zip(calls.queries, calls.keys, strict=True)


def _blocks(hf: PreTrainedModel, attentions: Sequence[nn.Module], name: str) -> tuple[nn.Module, ...]:
    """The list of blocks that holds one attention module each; () where the modules form no list."""
    for candidate in stack(hf).modules():
        if not isinstance(candidate, nn.ModuleList) or len(candidate) < len(attentions):
            continue
        holds = [[a for a in attentions if any(m is a for m in block.modules())] for block in candidate]
        if sum(map(len, holds)) < len(attentions):
            continue
        lacking = [i for i, found in enumerate(holds) if not found]
        if lacking:
            raise UnsupportedModelError(
                f"{name}: layers {lacking} have no softmax attention (linear or recurrent layers); sinklens needs it "
                f"in every layer"
            )
        if [found[0] for found in holds] == list(attentions):
            return tuple(candidate)
    return ()


def _states(hf: PreTrainedModel, layers: tuple[nn.Module, ...], probe: dict[str, Any], **wanted: bool) -> Any:
    """The stack's output, and the blocks' inputs and last output where they are known."""
    seen: list[Tensor] = []
    if not layers:
        return run_stack(hf, probe, **wanted), [run_stack(hf, probe)[0]]
    with watching(layers, lambda _, state: seen.append(state.clone())):
        out = run_stack(hf, probe, **wanted)
    return out, seen


def _one_stream(hf: PreTrainedModel, layers: tuple[nn.Module, ...], probe: dict[str, Any]) -> bool:
    """Whether each block's output is the next one's input."""
    outputs: list[Any] = []
    handles = [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in layers]
    try:
        seen = _states(hf, layers, probe)[1]
    except (KeyError, AttributeError):
        return False
    finally:
        for handle in handles:
            handle.remove()
    tensors = [out if isinstance(out, Tensor) else out[0] for out in outputs]
    return len(tensors) == len(layers) and all(map(torch.equal, tensors, seen[1:]))


def _eager(
    hf: PreTrainedModel, layers: tuple[nn.Module, ...], probe: dict[str, Any], name: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Patterns and block outputs of the model's own eager attention."""
    with implementation(hf, "eager"):
        out, states = _states(hf, layers, probe, output_attentions=True)
    patterns = getattr(out, "attentions", None)
    if not patterns or any(p is None or p.ndim != 4 for p in patterns):
        raise UnsupportedModelError(
            f"{name} returns no attention patterns (output_attentions), so ours cannot be compared with its own"
        )
    if not states[-1].isfinite().all():
        raise BadInputError(f"{name} gives NaN or infinity on a random input although its weights are finite")
    return [pattern.detach().float() for pattern in patterns], states


def _check_parity(model: PlainModel, probe: dict[str, Any]) -> None:
    """Our patterns and block outputs must be the eager ones, by both kernels."""
    hf, name = model.original_model, model.capabilities.model
    theirs, host = _eager(hf, model.layers, probe, name)
    found: dict[int, Tensor] = {}
    exact = model.dtype in (torch.float32, torch.float64)

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, str]:
        whole = q.new_zeros(q.shape[0] * k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]).float()

        def put(chunk: slice, block: Block, pattern: Tensor) -> None:
            whole[chunk, :, block.rows, block.keys] = pattern.float()

        out, _ = blocked(q, k, v, view, visit=put)
        found[layer] = whole.view(q.shape[0], q.shape[1], *whole.shape[2:])
        return out, "blocked"

    real = probe["attention_mask"].bool() if "attention_mask" in probe else None
    for collect in (keep, None):
        with plain_flash(model) as state:
            state.collect = collect
            _, ours = _states(hf, model.layers, probe)
        for at, (a, b) in enumerate(zip(ours, host, strict=True)):
            a, b = (a, b) if real is None else (a[real], b[real])
            gap = float((a.float() - b.float()).abs().max() / (1 + b.float().abs().max()))
            if not gap <= (2e-4 if exact else 5e-2):
                raise UnsupportedModelError(
                    f"{name}: the state before block {at} differs by {gap:.2g} of its size from that of the model's "
                    f"own eager attention"
                )
    for layer, pattern in enumerate(theirs):
        gap = (found[layer] - pattern).abs()
        worst = float((gap if real is None else gap.amax((1, 3))[real]).max())
        if not worst <= (1e-5 if exact else 2e-2):
            raise UnsupportedModelError(
                f"{name}: attention in layer {layer} differs by up to {worst:.2g} from the model's own eager attention "
                f"(a bias on the scores, or another mask than causal={model.capabilities.causal}, "
                f"window={model.capabilities.windows[layer]})"
            )


def _check_padding(hf: PreTrainedModel, layers: tuple[nn.Module, ...], padded: dict[str, Any], name: str) -> None:
    """A padded row's real tokens must come out as they do alone."""
    length = int(padded["attention_mask"][1].sum())
    alone = {key: v[1:, :length] if isinstance(v, Tensor) else v for key, v in padded.items()}
    _, together = _eager(hf, layers, padded, name)
    _, single = _eager(hf, layers, alone, name)
    gap = (together[-1][1, :length] - single[-1][0]).abs().max() / (1 + single[-1].abs().max())
    if not gap <= (1e-4 if hf.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UnsupportedModelError(f"{name}: padding on the right changes its real tokens by {float(gap):.2g}")


def _entering(hf: PreTrainedModel, layers: tuple[nn.Module, ...], probe: dict[str, Any]) -> Tensor:
    """What enters the first layer: the first block's input, or where blocks are unknown its queries and keys."""
    if layers:
        return _states(hf, layers, probe)[1][0]
    calls = _Calls()
    with attending(hf, calls.record):
        run_stack(hf, probe)
    return torch.cat([t.transpose(1, 2).flatten(2) for t in (calls.queries[0], calls.keys[0])], -1)


def _check_patches(
    hf: PreTrainedModel, layers: tuple[nn.Module, ...], probe: dict[str, Any], facts: PlainCapabilities
) -> None:
    """Changing a patch's pixels must change its own token as it enters the first layer, and no other."""
    patch, pixels = facts.patch, probe["pixel_values"]
    assert patch is not None
    base = _entering(hf, layers, probe)
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    for row, column in {(0, 0), (1, 2), (rows - 1, columns - 1), (rows - 1, 0)}:
        changed = pixels.clone()
        changed[..., row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]] += 1
        entered = _entering(hf, layers, probe | {"pixel_values": changed})
        moved = (entered != base).any(-1)[0].nonzero().flatten().tolist()
        expected = len(facts.prefix) + row * columns + column
        if moved != [expected]:
            raise UnsupportedModelError(
                f"{facts.model}: the pixels of patch ({row}, {column}) reach tokens {moved[:6]} of the first layer, "
                f"not token {expected} alone; sinklens maps tokens that are one patch each, row by row"
            )
