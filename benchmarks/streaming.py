"""What StreamingLLM's cache costs in one forward, beside a plain forward.

    python benchmarks/streaming.py [--model smollm2-135m] [--tokens 2048 4096 8192] [--recent 256] [--rounds 2]
                                   [--threads 1] [--smoke]

Contenders run in this process, in turn (A B C A B C): the plain Hugging Face model with sdpa, without the
unembedding; the flash context; ``streaming_attention`` with 0 and 4 first tokens kept. Ratios of medians of CPU time,
the least ratio of a round, and the peak of resident memory beside what was resident before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import smoke
import torch
from attention import BASE, measure, models


def contenders(plain: Any, model: Any, length: int, recent: int) -> dict[str, Callable[[], Any]]:
    """What runs, on one text."""
    import sinklens as sl
    from sinklens.attention.run import run_blocks
    from sinklens.streaming import streaming_attention

    most = min(1000, model.cfg.d_vocab)
    ids = torch.randint(3, most, (1, length), generator=torch.Generator().manual_seed(0))

    def within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[], None]:
        def run() -> None:
            with context():
                run_blocks(model, ids, [], flashing=True)

        return run

    return {
        BASE: lambda: plain.model(ids, use_cache=False),
        "flash": within(lambda: sl.flash(model)),
        "window only": within(lambda: streaming_attention(model, 0, recent)),
        "4 first tokens": within(lambda: streaming_attention(model, 4, recent)),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    with smoke.small(options, tokens=[96], recent=32, rounds=1):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Print the ratios of every length."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    plain, model = models(options.model, cuda=False)
    with torch.no_grad():
        for run in contenders(plain, model, 512, 64).values():
            run()  # warm up, and the proofs
        for length in options.tokens:
            runs = contenders(plain, model, length, options.recent)
            found: dict[str, list[dict[str, float]]] = {key: [] for key in runs}
            for _ in range(options.rounds):
                for key, run in runs.items():
                    found[key].append(measure(run, cuda=False))
            base = found[BASE]
            print(
                f"{options.model}, {length} tokens, N = {options.recent}, {options.threads} thread(s), medians of "
                f"{options.rounds} interleaved runs; {BASE}: {statistics.median(m['cpu'] for m in base):.1f} CPU s"
            )
            for key, measured in found.items():
                ratio = statistics.median(m["cpu"] for m in measured) / statistics.median(m["cpu"] for m in base)
                least = min(m["cpu"] / b["cpu"] for m, b in zip(measured, base, strict=True))
                peak = statistics.median(m["peak"] for m in measured)
                beside = peak - statistics.median(m["peak"] for m in base)
                print(
                    f"  {key:16s} x{ratio:.2f} (least {least:.2f})   peak {peak:+.2f} GB "
                    f"({beside:+.2f} beside the base)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
