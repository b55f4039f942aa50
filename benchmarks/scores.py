"""What sink_scores costs beside a plain bridge forward: CPU time and peak memory, as ratios from one run.

    python benchmarks/scores.py [--model smollm2-135m] [--tokens 2048] [--rounds 3] [--smoke]

Each measurement is a process of its own, interleaved A B A B; medians are compared. Contenders:

    forward   the bridge's forward, logits and all
    scores    sinklens.sink_scores
    cached    run_with_cache of every hook_pattern, then alpha: what the sink papers' scripts do
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import smoke

CONTENDERS = ("forward", "scores", "cached")


def measure(contender: str, name: str, length: int) -> dict[str, float]:
    """Run one contender in this process; CPU seconds and peak memory (GB) above the loaded model."""
    import torch

    import sinklens as sl

    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "random", n_seqs=1, seq_len=length)
    sl.sink_scores(model, tokens.ids[:, :32])
    reset_peak()
    before = resident()
    start = time.process_time()
    with torch.no_grad():
        if contender == "forward":
            model(tokens.ids)
        elif contender == "scores":
            sl.sink_scores(model, tokens)
        else:
            layers = range(model.cfg.n_layers)
            names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
            _, cache = model.run_with_cache(tokens.ids, names_filter=names)
            torch.stack([cache[n].sum(-2) / torch.arange(length, 0, -1) for n in names])
    return {"cpu": time.process_time() - start, "peak": peak() - before}


def reset_peak() -> None:
    """Forget the process's peak so far (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> float:
    """Peak resident memory in GB since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e6


def resident() -> float:
    """Resident memory in GB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e9


def compare(
    name: str, length: int, rounds: int, contenders: tuple[str, ...], script: str = __file__
) -> dict[str, dict[str, float]]:
    """Medians per contender, measured in turn."""
    found: dict[str, list[dict[str, float]]] = {c: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            command = [sys.executable, script, "--one", contender, "--model", name, "--tokens", str(length)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[contender].append(json.loads(done.stdout.splitlines()[-1]))
    return {c: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for c, runs in found.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.model, options.tokens)))
        return
    with smoke.small(options, tokens=64, rounds=1):
        found = compare(options.model, options.tokens, options.rounds, CONTENDERS)
    base = found["forward"]
    print(f"{options.model}, {options.tokens} tokens, 1 thread, medians of {options.rounds} interleaved runs")
    for contender, numbers in found.items():
        print(
            f"{contender:8s} CPU time x{numbers['cpu'] / base['cpu']:.2f} of the plain forward, "
            f"peak memory {numbers['peak'] - base['peak']:+.2f} GB"
        )


if __name__ == "__main__":
    main()
