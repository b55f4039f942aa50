"""Tiny models in memory, and the same weights with some modules on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import build
from torch import Tensor
from wording import word_tokenizer

import sinklens as sl

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gemma3": "model.layers",
    "gpt-oss": "model.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
}


def disk_map(model: Any, blocks: str) -> dict[str, str]:
    """Every block on disk, everything else in memory."""
    found: dict[str, str] = {}
    for path, _ in model.named_modules():
        inside = path.startswith(blocks + ".")
        if inside and path.count(".") == blocks.count(".") + 1:
            found[path] = "disk"
        elif not inside and not blocks.startswith(path) and not any(path.startswith(known + ".") for known in found):
            found[path] = "cpu"
    return found


def offloaded_pair(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model in memory and the same one with its blocks on disk."""
    plain = build(name)
    plain.save_pretrained(folder)
    word_tokenizer(adds_bos=False).save_pretrained(folder)
    dispatch = {"device_map": disk_map(plain, BLOCKS[name]), "offload_folder": folder / "offloaded"}
    return sl.load_model(folder, device="cpu", **options), sl.load_model(folder, **dispatch, **options)


def on_disk(model: Any) -> list[str]:
    """The weights that are placeholders while the model is at rest."""
    return [name for name, weight in model.original_model.named_parameters() if weight.is_meta]


def run(model: Any, ids: Tensor, hooks: Any = (), flash: bool = False) -> Tensor:
    with torch.no_grad():
        if not flash:
            return model.run_with_hooks(ids, fwd_hooks=list(hooks))
        with sl.flash(model):
            return model.run_with_hooks(ids, fwd_hooks=list(hooks))
