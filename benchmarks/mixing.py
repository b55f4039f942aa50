"""What the Jacobian map costs by probes beside dense forward mode: passes, CPU time and peak memory from one run.

    python benchmarks/mixing.py [--model smollm2-135m] [--tokens 64] [--rounds 3] [--smoke]

Each measurement is a process of its own, interleaved A B A B; medians are compared. Contenders:

    probed    the full [layer, i, j] map by random probes, every tangent of it
    dense     forward mode with all d_model x T tangents, extrapolated from 10 chunks of as many tangents
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import smoke
from scores import compare, peak, reset_peak, resident

CONTENDERS = ("probed", "dense")
CHUNKS = 10
PROBES = 16


def measure(contender: str, name: str, length: int) -> dict[str, float]:
    """Run one contender in this process; CPU seconds, peak memory (GB) above the loaded model, tangents of a map."""
    import torch

    import sinklens as sl
    from sinklens.mixing.jacobians import CHUNK, Stream

    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", n_seqs=1, seq_len=length)
    Stream(model, tokens.ids)
    reset_peak()
    before = resident()
    start = time.process_time()
    if contender == "probed":
        sl.measure_mixing(model, tokens, sinks=[0], probes=PROBES, chunk=CHUNK, progress=False)
        return {"cpu": time.process_time() - start, "peak": peak() - before, "passes": PROBES * length}
    stream = Stream(model, tokens.ids)
    size = stream.start.shape[1]
    for n in range(CHUNKS):
        tangents = torch.zeros(CHUNK, length, size)
        tangents[torch.arange(CHUNK), n % length, torch.arange(CHUNK)] = 1
        for part in stream.pushed(tangents):
            part.square().sum((0, -1))
    whole = size * length
    spent = (time.process_time() - start) * whole / (CHUNKS * CHUNK)
    return {"cpu": spent, "peak": peak() - before, "passes": whole}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.one:
        found = measure(options.one, options.model, options.tokens)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    with smoke.small(options, tokens=16, rounds=1):
        found = compare(options.model, options.tokens, options.rounds, CONTENDERS, script=__file__)
    cpu = found["dense"]["cpu"] / found["probed"]["cpu"]
    passes = found["dense"]["passes"] / found["probed"]["passes"]
    sys.stdout.write(f"{options.model}, {options.tokens} tokens, {PROBES} probes, {options.rounds} round(s)\n")
    sys.stdout.write(
        f"dense / probed: CPU time x{cpu:.1f}, passes x{passes:.1f}; peak memory: probed "
        f"{found['probed']['peak']:.2f} GB, dense {found['dense']['peak']:.2f} GB (extrapolated from {CHUNKS} chunks)\n"
    )


if __name__ == "__main__":
    main()
