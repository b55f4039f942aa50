"""What a scan takes with a model's blocks on disk, beside the same scan in memory: peak memory, CPU and wall time.

    python benchmarks/offload.py [--model smollm2-135m] [--tokens 512] [--rounds 3] [--smoke]

Each measurement is a process of its own, in turn; it loads the model and scores one sequence. Memory counts from after
the imports; ``private`` leaves out pages of the weights' file, which the system may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import threading
import time

import smoke
from scores import compare, peak, reset_peak, resident

CONTENDERS = ("memory", "disk")


def private() -> float:
    """Resident memory that is no page of a file, in GB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1e6


def measure(contender: str, name: str, length: int) -> dict[str, float]:
    """Load and score in this process."""
    import torch
    from transformers import AutoConfig

    import sinklens as sl

    torch.set_num_threads(1)
    folder = smoke.folder_of(name)
    blocks = AutoConfig.from_pretrained(folder).num_hidden_layers
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" for n in range(blocks)}
    sl.load_model  # noqa: B018  (imports)
    most, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], private())

    reset_peak()
    before, before_private = resident(), private()
    clock, start = time.perf_counter(), time.process_time()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = sl.load_model(folder, device_map=places if contender == "disk" else None)
    tokens = sl.load_tokens(model, "random", n_seqs=1, seq_len=length)
    loaded = time.perf_counter()
    sl.sink_scores(model, tokens)
    now, cpu = time.perf_counter(), time.process_time() - start
    ended.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters()) / 1e9
    return {
        "peak": peak() - before,
        "private": most[0] - before_private,
        "weights": weights,
        "cpu": cpu,
        "load": loaded - clock,
        "scan": now - loaded,
    }


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.model, options.tokens)))
        return
    with smoke.small(options, tokens=64, rounds=1):
        medians = compare(options.model, options.tokens, options.rounds, CONTENDERS, script=__file__)
    for contender, values in medians.items():
        print(contender, " ".join(f"{k} {v:.3f}" for k, v in values.items()))
    print("disk over memory", " ".join(f"{k} {medians['disk'][k] / v:.2f}" for k, v in medians["memory"].items()))


if __name__ == "__main__":
    main()
