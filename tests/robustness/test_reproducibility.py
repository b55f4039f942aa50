"""Seeds make runs bit-reproducible: in another process, with another hash seed, whatever the global generators hold."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from architectures import build_pair, random_rows
from lab_configs import SHORT
from places import ROOT, SUPPORT
from planted_writers import planted_writers, texts

import sinklens as sl
from sinklens.check.cause_checks import MANY, made
from sinklens.check.subject import LENGTH, Subject
from sinklens.experiment.matched_damage import damage
from sinklens.find.contexts import shuffle
from sinklens.inputs.load import as_tokens
from sinklens.lab import train
from sinklens.streaming import eviction_study


def fingerprint(value: Any) -> str:
    """A hash of every bit of a result; functions and notes about the run are left out."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(repr((value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, np.ndarray):
        found.update(value.tobytes())
    elif isinstance(value, pd.DataFrame):
        _feed(found, value.to_dict("list"))
    elif isinstance(value, float):
        found.update(struct.pack("d", value))
    elif is_dataclass(value):
        for part in fields(value):
            if part.name not in ("info", "hooks"):
                found.update(part.name.encode())
                _feed(found, getattr(value, part.name))
    elif isinstance(value, dict):
        for key, part in value.items():
            found.update(repr(key).encode())
            _feed(found, part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(found, part)
    else:
        found.update(repr(value).encode())


def trained(run: Any) -> Any:
    """The weights and the measured figures of a trained lab model."""
    return run.model.state_dict(), run.rows


def runs() -> dict[str, Callable[[], Any]]:
    """Every public function that draws, on tiny models."""
    model = build_pair("llama")[1]
    ids = as_tokens(model, torch.stack(random_rows((48,) * 4)))
    zero = sl.ablate_sinks(model, [0], "renormalize")
    traced = planted_writers()
    sequences = texts(6)
    sequences[::2, 50] = 4
    trace = sl.trace_sinks(traced, sequences, replacements=("same_id",), progress=False)
    scores = sl.sink_scores(traced, sequences, progress=False)
    sinks = sl.find_sinks(traced, sequences)
    many = [(b, p) for b in range(2) for p in MANY]
    rows = torch.stack(random_rows((LENGTH,) * 2))
    rows[:, 2:50] = rows[0, 2]  # the subspace needs tokens of a sink's id beside the sinks
    crowded = made(Subject(model, as_tokens(model, rows), ids), as_tokens(model, rows), many, 1)
    quiet: dict[str, Any] = {"progress": False, "seed": 3}
    return {
        "load_tokens random": lambda: sl.load_tokens(model, "random", n_seqs=3, seq_len=20, seed=3).ids,
        "load_tokens repeat": lambda: sl.load_tokens(model, "repeat", n_seqs=3, seq_len=20, seed=3).ids,
        "shuffle": lambda: shuffle(ids, 3)[1],
        "token_loss": lambda: sl.token_loss(model, ids, most_scored=5, seed=3),
        "run_experiment": lambda: (
            sl.run_experiment(model, ids, {"a": zero}, controls=("random",), twin=True, most_scored=9, **quiet).metrics
        ),
        "run_experiment split": lambda: (
            sl.run_experiment(
                model, ids, {"a": lambda _: sl.ablate_sinks(model, [0])}, controls=("random",), split=True, **quiet
            ).metrics
        ),
        "sweep_ablation": lambda: sl.sweep_ablation(model, ids, [0], most_scored=5, **quiet).to_dataframe(),
        "perturbation_spread": lambda: sl.mixing.perturbation_spread(model, ids, sinks=[0], n_swaps=6, **quiet),
        "measure_mixing": lambda: sl.measure_mixing(model, ids[0], sinks=[0], probes=3, **quiet),
        "path_sums": lambda: sl.mixing.path_sums(model, ids.ids[:1, :12], sinks=[0], **quiet).bounds,
        "matched_damage": lambda: sl.token_loss(model, ids, hooks=damage(model, "noise", 0.3, range(2), seed=3)),
        "decompose_sinks": lambda: sl.decompose_sinks(model, ids, [0], effects="all", most_scored=5, **quiet),
        "eviction_study": lambda: eviction_study(model, ids, 12, first=(2,), **quiet),
        "trace_sinks": lambda: sl.trace_sinks(traced, sequences, replacements=("same_id",), most_proven=1, **quiet),
        "plant_sinks": lambda: sl.trace.plant_sinks(traced, trace, n_positions=1, n_random=1, **quiet),
        "writer_neurons": lambda: sl.trace.writer_neurons(traced, trace, top=(1,), n_random=1, **quiet).to_dataframe(),
        "reading_heads": lambda: sl.heads.reading_heads(scores, sinks, kind="primary", permutations=20, seed=3),
        "compare_contexts": lambda: sl.find.compare_contexts(model, "random", lengths=(50,), n_seqs=2, **quiet),
        "writer_subspace": lambda: sl.trace.writer_subspace(model, crowded, sizes=(1,), n_random=2, **quiet),
        "lab.train": lambda: trained(train(SHORT, **quiet)),
        "reproduce": lambda: list(sl.reproduce("gu-sink-rates", model=model, source="random", n_seqs=16, **quiet).rows),
        "check_model": lambda: [row.error for row in sl.check_model(model, functions=["sink_scores"]).rows],
    }


def fingerprints(scrambled: int | None) -> dict[str, str]:
    """Of every run; with a number, the global generators are set before each; torch's and numpy's must be as they were
    after it (the standard library's is also drawn from by modules that load at first use)."""
    found = {}
    for name, run in runs().items():
        if scrambled is not None:
            random.seed(scrambled)
            np.random.seed(scrambled)
            torch.manual_seed(scrambled)
        before = repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
        found[name] = fingerprint(run())
        after = repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
        assert before == after, f"{name} moves a global generator"
    return found


def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    folders = (ROOT, SUPPORT, Path(__file__).parent)
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", "import json, test_reproducibility as t; print(json.dumps(t.fingerprints(None)))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = json.loads(done.stdout.splitlines()[-1])
    here = fingerprints(scrambled=12345)
    assert len(here) >= 22
    assert {name for name in here if here[name] != elsewhere[name]} == set()


def test_the_fingerprint_sees_the_last_bit_and_another_seed() -> None:
    one = torch.ones(3)
    other = one.clone()
    other[1] = torch.nextafter(one[1], torch.tensor(2.0))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint({"a": 1.0}) != fingerprint({"a": 1.0 + 2**-52})
    model = build_pair("llama")[1]
    drawn = [fingerprint(sl.load_tokens(model, "random", n_seqs=3, seq_len=20, seed=s).ids) for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
