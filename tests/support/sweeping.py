"""Tiny models in folders, small job lists, and users' functions for the tests of sweeps."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from architectures import build
from wording import WORDS, word_tokenizer

import sinklens as sl
from sinklens.sweep import Job, collect, run_sweep


def _words(seed: int) -> str:
    drawn = torch.randint(4, len(WORDS), (64,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn.tolist())


# 64 tokens each, long enough for far importance. The tiny Llama has a sink in the first two and in the fifth, the tiny
# GPT-2 in the second and in the last three, neither in the third and fourth.
SENTENCES = [_words(seed) for seed in (9, 13, 0, 1, 25, 7, 11, 19)]


def save_models(folder: Path) -> list[str]:
    """Two tiny models with a tokenizer of words."""
    found = []
    for name in ("llama", "gpt2"):
        build(name).save_pretrained(folder / name)
        word_tokenizer(adds_bos=False).save_pretrained(folder / name)
        found.append(str(folder / name))
    return found


def first_logit(model: Any, tokens: sl.Tokens, *, hooks: Any, seed: int, scale: float = 1.0) -> list[dict[str, float]]:
    """A user's task: a row per sequence."""
    rows = []
    for b in range(len(tokens)):
        logits = model.run_with_hooks(tokens[b].trim().ids, fwd_hooks=list(hooks))
        rows.append({"sequence": b, "logit": scale * float(logits[0, -1, 0]), "drawn": float(seed)})
    return rows


def raises(model: Any, tokens: sl.Tokens, *, hooks: Any, seed: int, unless: str = "") -> dict[str, float]:
    """A user's task that fails, unless a file is there."""
    if not (unless and Path(unless).exists()):
        raise ValueError("broken on purpose")
    return {"value": 1.0}


def kills(model: Any, tokens: sl.Tokens, *, hooks: Any, seed: int, unless: str = "") -> dict[str, float]:
    """A user's task that kills its worker, unless a file is there; then it is made."""
    if not (unless and Path(unless).exists()):
        if unless:
            Path(unless).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": 1.0}


EDITS = [
    "none",
    {"build": "ablate_sinks", "sinks": "all", "mode": "zero"},
    {"build": "ablate_sinks", "sinks": [0], "mode": "renormalize", "layers": [1], "heads": [0, 2]},
    {"build": "swap_attention", "kind": "off-by-one"},
    {"build": "restrict_attention", "sinks": 2, "recent": 8},
    {"build": "patch_bos", "source": "zero"},
    {"build": "ablate_sinks", "sinks": "all", "mode": "mean_value", "reference": {"texts": SENTENCES[4:]}},
]
TASKS = [
    {"task": "sink_scores", "positions": [0, 6]},
    "find_sinks",
    {"task": "find_sinks", "per": "sequence"},
    "token_loss",
    {"task": "token_loss", "per": "token", "most_scored": 9},
    {"task": "experiment", "controls": ["random", "recent"], "most_scored": 20},
    {"task": "experiment", "controls": ["random"], "per": "token"},
]
TEXT = {"texts": SENTENCES, "label": "words"}
EFFECT = {"task": "experiment", "controls": ["random", "matched"], "most_scored": 20}


def here(jobs: list[Job], folder: Path, **options: Any) -> Any:
    """Run in this process."""
    with ThreadPoolExecutor(1) as pool:
        return run_sweep(jobs, folder, executor=pool, workers=1, **options)


def value_of(folder: Path, **chosen: Any) -> pd.DataFrame:
    return collect(folder).to_dataframe(**chosen)
