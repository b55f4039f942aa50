"""The proof of the flash backend: on short random inputs, every block's output must equal the host's.

It runs at a model's first use of the backend and is kept: why the backend cannot run the model, if so, and which hooks
of attention fire in the host and cannot fire there.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Flash, hook_points, note_unheard, switched
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, block_output, either_backend
from sinklens.bridge.capabilities import LONGEST_WINDOW_PROBE, PROBE_LENGTH, capabilities, has_hook
from sinklens.core.errors import SinklensError

_reasons: WeakKeyDictionary[TransformerBridge, str] = WeakKeyDictionary()


def unsupported(model: TransformerBridge) -> str:
    """Why the flash backend cannot run a model, or "". The proof runs at the first call and is kept.

    Every layer's output, of one sequence and of a batch padded on the left, must equal the host's; a window of up to
    1024 is probed beyond its edge. Recorded, too, is which hooks fire in the host and not here.
    """
    facts = capabilities(model)
    if model not in _reasons:
        heard: dict[str, set[str]] = {}
        reason = ""
        for length in sorted({PROBE_LENGTH, *(w + 2 for w in facts.windows if w and w <= LONGEST_WINDOW_PROBE)}):
            if facts.context is None or length <= facts.context:
                reason = reason or _differs(model, length, heard if length == PROBE_LENGTH else {})
        _reasons[model] = reason
        first = attention_hook(0, "")
        deaf = sorted(heard.get("host", set()) - heard.get("flash", set()))
        points = [name.removeprefix(first) for name in deaf if name.startswith(first)]
        note_unheard(model, points)
    return _reasons[model]


def _differs(model: TransformerBridge, length: int, heard: dict[str, set[str]]) -> str:
    """Where the backends' block outputs differ on random ids, or ""."""
    facts = capabilities(model)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, facts.vocabulary, (2, length), generator=generator).to(model.cfg.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : length // 3] = False
    outputs: dict[str, list[Tensor]] = {"host": [], "flash": []}
    points = [point for point in hook_points(model) if point.startswith("blocks.0.attn.") and has_hook(model, point)]
    states: dict[str, Flash | None] = {"host": None, "flash": Flash(model)}
    for name, state in states.items():
        fired = heard.setdefault(name, set())

        def note(_: Any, hook: Any, fired: set[str] = fired) -> None:
            fired.add(hook.name)

        def keep(tensor: Tensor, hook: Any, name: str = name) -> None:
            outputs[name].append(tensor.detach().float())

        within = [(point, either_backend(note)) for point in points]
        ends = [(block_output(layer), keep) for layer in range(facts.n_layers)]
        try:
            with switched(model, state), torch.no_grad():
                for rows in (slice(0, 1), slice(0, 2)):
                    padding = mask[rows] if rows.stop > 1 else None
                    run_blocks(model, ids[rows], [*within, *ends], mask=padding, flashing=state is not None)
        except (SinklensError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            if state is None or state.paths:
                return f"it fails on a short input ({type(error).__name__}: {str(error)[:200]})"
        if state is not None and len(state.paths) != facts.n_layers:
            return "its attention code does not call transformers' AttentionInterface"
    tolerance = 2e-4 if model.cfg.dtype in (torch.float32, torch.float64) else 5e-2
    for at, (ours, theirs) in enumerate(zip(outputs["flash"], outputs["host"], strict=True)):
        real = mask if len(theirs) > 1 else mask[:1]
        gap = ((ours - theirs)[real]).abs().max() / (1 + theirs[real].abs().max())
        if not gap <= tolerance:
            return f"the output of block {at % facts.n_layers} differs by {float(gap):.2g} of its size from the host's"
    return ""
