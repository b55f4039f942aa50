"""``streaming_attention``: StreamingLLM's rolling cache, exactly, in one forward.

Inside the context every token is computed as if a cache of the kept tokens (the sinks) and the ``recent`` latest ones
had rolled along the text, positions counted in the cache (docs/definitions.md, section 9). The flash backend carries
it: the host's own attention modules call :func:`sinklens.streaming.banded.banded` in the place of attention.

Before the first use of a model the host is asked twice: :mod:`sinklens.streaming.rotary` reads its rotation off it, and
with nothing evicted, once because the window is long and once because every token is kept, every block must give the
host's own output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Flash, plain, switched
from sinklens.attention.kernels import View
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import LONGEST_WINDOW_PROBE, PROBE_LENGTH, capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.follow import Forward
from sinklens.inputs.tokens import check_positions
from sinklens.streaming.banded import ABSENT, banded
from sinklens.streaming.rotary import turns

Kept = int | Sequence[int] | Sequence[Sequence[int]] | SinkMap


@public
@contextlib.contextmanager
def streaming_attention(model: TransformerBridge, sinks: Kept = 4, recent: int = 256) -> Iterator[Flash]:
    """Run a model as with StreamingLLM's cache: some kept tokens and the most recent ones, nothing else.

    Query i sees key k iff ``i - k < recent`` or k is kept; positions are counted in the cache, so a kept token stands
    right before the window however long ago it was. A layer's own sliding window holds in the cache, too. One forward
    equals the token-by-token :class:`sinklens.streaming.StreamingCache`. Other hooks of the model keep firing.

    Args:
        model: a causal bridge from :func:`sinklens.load_model`, with relative positions (rotary ones, or none).
        sinks: what is never evicted: how many first tokens (0: the window alone), a list of positions, one list per
            row of the batch, or a SinkMap (all its sinks, in every layer; rows are recognised by their ids).
        recent: how many of the latest tokens the cache holds beside them, the current one included.

    Yields:
        A :class:`sinklens.Flash`; its ``paths`` say which kernel ran in each layer.

    Raises:
        BadInputError: ``recent`` below 1, negative or repeated positions, a position beyond the end of a row, lists
            for another number of rows; a forward with a KV cache (generate with a StreamingCache, outside).
        UnsupportedModelError: learned positions, a rotation that cannot be read off or that depends on the length,
            attention that the flash backend does not reach; inside: edits of attention, and functions that choose how
            attention runs (``sink_scores``, ``run_experiment``).

    Source: Xiao et al. 2024 (2309.17453), sections 3.1 and 3.2.
    Cost: of attention, time O(T (recent + kept)) and memory O(T) per layer, no more than a plain forward
    (benchmarks/README.md). The first use of a model runs some short forwards.

    >>> with streaming_attention(model, sinks=4, recent=256):  # doctest: +SKIP
    ...     logits = model(ids)
    """
    _check(sinks, recent)
    turning = turns(model)
    reason = _unproven(model)
    if reason:
        raise UnsupportedModelError(f"{capabilities(model).model}: {reason}. Please report this architecture")
    with _rolling(model, turning, sinks, recent) as state:
        yield state


def check_recent(recent: int) -> None:
    """Refuse a window that holds nothing."""
    if isinstance(recent, bool) or not isinstance(recent, int) or recent < 1:
        raise BadInputError(
            f"recent counts the latest tokens in the cache, at least 1 (the token itself); got {recent}"
        )


def _check(sinks: Kept, recent: int) -> None:
    check_recent(recent)
    if isinstance(sinks, SinkMap):
        return
    if isinstance(sinks, bool) or (isinstance(sinks, int) and sinks < 0):
        raise BadInputError(f"sinks must be 0 or more first tokens, positions, or a SinkMap; got {sinks!r}")
    if isinstance(sinks, int):
        return
    if not isinstance(sinks, Sequence) or isinstance(sinks, str):
        raise BadInputError(f"sinks must be a number, positions, lists of positions or a SinkMap; got {sinks!r}")
    nested = [row for row in sinks if not isinstance(row, int)]
    if nested and len(nested) < len(sinks):
        raise BadInputError(f"sinks mixes positions and lists of positions: {list(sinks)!r}")
    for row in nested or [sinks]:
        positions = [int(p) for p in row]  # type: ignore[union-attr]
        if len(check_positions(positions)) < len(positions):
            raise BadInputError(f"a position is named twice in {positions}")


@contextlib.contextmanager
def _rolling(model: TransformerBridge, turning: Sequence[Any], sinks: Kept, recent: int) -> Iterator[Flash]:
    """The context, without the proof."""
    forward = Forward(model, sinks.tokens) if isinstance(sinks, SinkMap) else None

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, str]:
        if q.shape[2] != k.shape[2]:
            raise BadInputError(
                f"{q.shape[2]} queries meet {k.shape[2]} keys: streaming_attention reads whole texts in one forward. "
                f"To generate token by token, pass past_key_values=StreamingCache(model, ...) to generate outside"
            )
        kept = columns(sinks, q.shape[0], k.shape[2], view.mask, q.device, forward)
        if recent >= k.shape[2]:
            return plain(layer, q, k, v, view)
        return banded(q, k, v, view, recent=recent, kept=kept, turn=turning[layer])

    state = Flash(model, collect=attend, alone=f"streaming_attention (recent={recent})")
    hooks = [] if forward is None else forward.hooks()
    with switched(model, state), model.hooks(fwd_hooks=hooks) if hooks else contextlib.nullcontext():
        yield state


def columns(
    sinks: Kept,
    rows: int,
    length: int,
    mask: Tensor | None,
    device: torch.device,
    forward: Forward | None,
) -> Int[Tensor, "batch kept"]:
    """The columns of every row's kept tokens, in order, filled up with ``ABSENT``."""
    starts = [0] * rows if mask is None else mask.int().argmax(1).tolist()
    lengths = [length] * rows if mask is None else mask.sum(1).tolist()
    named: list[list[int]]
    if isinstance(sinks, int):
        named = [list(range(min(sinks, n))) for n in lengths]
    elif isinstance(sinks, SinkMap):
        assert forward is not None
        everything = [sorted(set(sinks.positions(b))) for b in range(len(sinks.tokens))]
        named = [everything[b] if b is not None else [] for b in forward.rows]
    else:
        nested = [list(row) for row in sinks if not isinstance(row, int)]
        flat = sorted(p for p in sinks if isinstance(p, int))
        named = [sorted(row) for row in nested] if nested else [flat] * rows
        if len(named) != rows:
            raise BadInputError(f"sinks has {len(named)} lists of positions and this forward {rows} rows")
        for b, row in enumerate(named):
            if row and row[-1] >= lengths[b]:
                raise BadInputError(
                    f"position {row[-1]} is out of range: row {b} of this forward has {lengths[b]} tokens, so nothing "
                    f"would be kept there"
                )
    most = max((len(row) for row in named), default=0)
    found = torch.full((rows, most), ABSENT, dtype=torch.long)
    for b, row in enumerate(named):
        found[b, : len(row)] = torch.tensor(row, dtype=torch.long) + starts[b]
    return found.to(device)


_reasons: WeakKeyDictionary[TransformerBridge, str] = WeakKeyDictionary()


def _unproven(model: TransformerBridge) -> str:
    """Why a model's own outputs do not come back when nothing is evicted, or ""; the proof runs once per model."""
    if model not in _reasons:
        facts = capabilities(model)
        reason = ""
        for length in sorted({PROBE_LENGTH, *(w + 2 for w in facts.windows if w and w <= LONGEST_WINDOW_PROBE)}):
            if facts.context is None or length <= facts.context:
                reason = reason or _differs(model, length)
        _reasons[model] = reason
    return _reasons[model]


def _differs(model: TransformerBridge, length: int) -> str:
    """Where a block's output differs from the host's although nothing is evicted, or ""."""
    facts = capabilities(model)
    ids = torch.randint(0, facts.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    ids = ids.to(model.cfg.device)
    host = _outputs(model, ids)
    for words, sinks, recent in (("a window that is never full", 4, length), ("every token kept", length, 7)):
        with _rolling(model, turns(model), sinks, recent):
            found = _outputs(model, ids, flashing=True)
        tolerance = 2e-4 if model.cfg.dtype in (torch.float32, torch.float64) else 5e-2
        for layer, (ours, theirs) in enumerate(zip(found, host, strict=True)):
            gap = (ours - theirs).abs().max() / (1 + theirs.abs().max())
            if not gap <= tolerance:
                return (
                    f"with {words} a cache loses nothing, but the output of block {layer} differs by "
                    f"{float(gap):.2g} of its size from the host's"
                )
    return ""


def _outputs(model: TransformerBridge, ids: Tensor, *, flashing: bool = False) -> list[Tensor]:
    """Every block's output."""
    found: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        found.append(tensor.detach().float())

    ends = [(block_output(layer), keep) for layer in range(capabilities(model).n_layers)]
    run_blocks(model, ids, ends, flashing=flashing)
    return found
