"""What a per-layer sweep costs beside one full forward per layer: CPU time and peak memory, as ratios from one run.

    python benchmarks/sweeps.py [--model smollm2-135m] [--tokens 128] [--rounds 3] [--smoke]

Each measurement is a process of its own, interleaved A B A B; medians are compared. Contenders:

    forwards  one forward per layer with that layer's hooks, logits of every scored token
    sweep     sinklens.sweep_ablation(over="layer"): one growing batch that reuses the unedited prefix
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import smoke
from scores import compare, peak, reset_peak, resident

CONTENDERS = ("forwards", "sweep")


def measure(contender: str, name: str, length: int) -> dict[str, float]:
    """Run one contender in this process; CPU seconds and peak memory (GB) above the loaded model."""
    import torch

    import sinklens as sl
    from sinklens.forward.metrics import kl, loss
    from sinklens.forward.predictions import scored_logits

    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", n_seqs=1, seq_len=length)
    sl.token_loss(model, tokens)
    scored = torch.arange(1, length - 1)
    reset_peak()
    before = resident()
    start = time.process_time()
    if contender == "sweep":
        sl.sweep_ablation(model, tokens, [0])
    else:
        clean = scored_logits(model, tokens.ids, scored, [])
        for layer in range(model.cfg.n_layers):
            logits = scored_logits(model, tokens.ids, scored, sl.ablate_sinks(model, [0], layers=layer))
            for metric in (loss, kl):
                metric(logits, clean, tokens.ids[0, scored + 1]).mean()
    return {"cpu": time.process_time() - start, "peak": peak() - before}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.model, options.tokens)) + "\n")
        return
    with smoke.small(options, tokens=32, rounds=1):
        found = compare(options.model, options.tokens, options.rounds, CONTENDERS, script=__file__)
    cpu = found["sweep"]["cpu"] / found["forwards"]["cpu"]
    memory = found["sweep"]["peak"] - found["forwards"]["peak"]
    sys.stdout.write(f"{options.model}, {options.tokens} tokens, {options.rounds} round(s)\n")
    sys.stdout.write(f"sweep / forwards: CPU time x{cpu:.2f}, peak memory {memory:+.2f} GB\n")


if __name__ == "__main__":
    main()
