"""What sink statistics and ablations cost beside a plain forward, from 512 to 8192 tokens.

    python benchmarks/attention.py [--model smollm2-135m] [--tokens 512 1024 2048] [--rounds 3] [--threads 1]
                                   [--only NAME ...] [--json FILE] [--smoke]
    python benchmarks/attention.py --draw FILE.json ... --out attention.png [--only NAME ...]

Every contender runs in this process, in turn (A B C A B C); ratios of medians of CPU time, and the peak of resident
memory beside what was resident before. The base is the plain Hugging Face model with sdpa, without the unembedding.

    4 columns, all columns     sink_scores(backend="flash"), four positions and all
    ablate MODE                hooks of ablate_sinks in a flash context: sinks 0, 10 and 46 (or 0 alone)
    hooks                      sink_scores(backend="hooks")
    cached patterns            run_with_cache of every hook_pattern, then alpha: what the papers' scripts do
    output_attentions          Hugging Face's eager attention, stacked, then alpha: the peers' formula
    bridge                     the plain bridge forward, without the unembedding

`--cuda` does the same on a GPU with random weights of Llama-8B's shape in bfloat16 (wall time, peak allocation).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smoke
import torch

MODES: dict[Any, Any] = {
    "renormalize": {},
    "zero": {},
    "value_only": {},
    "scale": {"g": 0.5},
    "null": {},
    "move": {"target": 5},
    "uniform": {},
    "mean_value": {"reference": 2},
    "fixed_key": {"reference": 2},
    "fixed_logit": {"reference": 2},
}
SINKS = (0, 10, 46)
LONGEST = {"hooks": 8192, "bridge": 4096, "cached patterns": 2048, "output_attentions": 2048}
BASE = "sdpa forward"


def contenders(name: str, length: int, cuda: bool) -> dict[str, Callable[[], Any]]:
    """What runs, on one batch."""
    import sinklens as sl
    from sinklens.attention.run import run_blocks

    plain, model = models(name, cuda)
    most = min(1000, model.cfg.d_vocab)
    ids = torch.randint(3, most, (1, length), generator=torch.Generator().manual_seed(0)).to(model.cfg.device)
    few = torch.randint(3, most, (2, 128), generator=torch.Generator().manual_seed(1)).to(model.cfg.device)
    layers = range(model.cfg.n_layers)

    def base() -> None:
        plain.model(ids, use_cache=False)

    def ablation(hooks: Any) -> Callable[[], None]:
        def run() -> None:
            with sl.flash(model):
                run_blocks(model, ids, hooks, flashing=True)

        return run

    def cached() -> None:
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
        cache = model.run_with_cache(ids, names_filter=names)[1]
        torch.stack([cache[n].sum(-2) / torch.arange(length, 0, -1, device=ids.device) for n in names])

    def attentions() -> None:
        plain.set_attn_implementation("eager")
        found = torch.stack(plain.model(ids, use_cache=False, output_attentions=True).attentions)
        _ = found.sum(-2) / torch.arange(length, 0, -1, device=ids.device)
        plain.set_attn_implementation("sdpa")

    found: dict[str, Callable[[], Any]] = {
        BASE: base,
        "4 columns": lambda: sl.sink_scores(model, ids, positions=[0, 1, 2, 3], backend="flash", progress=False),
        "all columns": lambda: sl.sink_scores(model, ids, backend="flash", progress=False),
    }
    for mode, options in MODES.items():
        more = {**options, **({"reference": few} if "reference" in options else {})}
        for sinks in [[0], list(SINKS)] if mode in ("renormalize", "zero") else [list(SINKS)]:
            hooks = sl.ablate_sinks(model, sinks, mode, **more, allow_identity=True, progress=False)
            found[f"ablate {mode} {len(sinks)}"] = ablation(hooks)
    found |= {
        "hooks": lambda: sl.sink_scores(model, ids, backend="hooks", progress=False),
        "bridge": lambda: run_blocks(model, ids, []),
        "cached patterns": cached,
        "output_attentions": attentions,
    }
    return {key: run for key, run in found.items() if length <= LONGEST.get(key, length)}


def models(name: str, cuda: bool) -> tuple[Any, Any]:
    """The plain Hugging Face model, and a bridge over another copy of the same weights."""
    import transformers as tf

    import sinklens as sl

    if not cuda:
        where = smoke.folder_of(name)
        plain = tf.AutoModelForCausalLM.from_pretrained(where, attn_implementation="sdpa").eval()
        return plain, sl.load_model(name)
    config = tf.LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=65536, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        plain = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        shared = tf.AutoModelForCausalLM.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
    return plain, sl.load_model(shared)


def measure(run: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """CPU seconds (on a GPU: wall seconds) and peak memory in GB above what was there before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        run()
        torch.cuda.synchronize()
        return {
            "cpu": time.perf_counter() - start,
            "peak": (torch.cuda.max_memory_allocated() - before) / 1e9,
        }
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier contenders left in the heap would hide a peak
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
    start = time.process_time()
    run()
    spent = time.process_time() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e9
    return {"cpu": spent, "peak": peak - resident}


def compare(name: str, length: int, rounds: int, only: list[str], cuda: bool) -> dict[str, dict[str, float]]:
    """Medians per contender, measured in turn; the least ratio of a round stands beside them."""
    with torch.no_grad():
        runs = contenders(name, length, cuda)
        runs = {key: run for key, run in runs.items() if key == BASE or not only or any(o in key for o in only)}
        gc.freeze()  # each measurement collects, which would take half a second over what the imports left
        found: dict[str, list[dict[str, float]]] = {key: [] for key in runs}
        for key in (BASE, "all columns") if length <= 2048 else (BASE,):
            runs[key]()  # warm up
        for _ in range(rounds):
            for key, run in runs.items():
                found[key].append(measure(run, cuda))
    return {
        key: {
            "ratio": statistics.median(m["cpu"] for m in measured) / statistics.median(m["cpu"] for m in found[BASE]),
            "least": min(m["cpu"] / b["cpu"] for m, b in zip(measured, found[BASE], strict=True)),
            "peak": statistics.median(m["peak"] for m in measured),
            "cpu": statistics.median(m["cpu"] for m in measured),
        }
        for key, measured in found.items()
    }


def draw(files: list[Path], out: Path, only: list[str]) -> None:
    """Cost against T on logarithmic axes, in units of the base at the shortest T, with the exponents of a fit."""
    import plotly.graph_objects as go

    from sinklens.show.theme import themed

    points: dict[str, dict[int, float]] = {}
    for file in files:
        for row in json.loads(file.read_text())["readings"]:
            points.setdefault(row["contender"], {})[row["tokens"]] = row["cpu"]
    unit = points[BASE][min(points[BASE])]
    figure = go.Figure()
    for key, numbers in points.items():
        if len(numbers) < 3 or (only and key != BASE and not any(o in key for o in only)):
            continue
        x, y = zip(*sorted((t, cpu / unit) for t, cpu in numbers.items()), strict=True)
        logs = [math.log(t) for t in x], [math.log(c) for c in y]
        slope = statistics.linear_regression(*logs).slope
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=f"{key}: T^{slope:.2f}"))
    figure.update_xaxes(title="tokens T", type="log", tickvals=sorted(points[BASE]))
    figure.update_yaxes(
        title="CPU time (sdpa forward at the shortest T = 1)", type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200]
    )
    themed(figure, "Cost against length, with the exponent of a power law", height=520, width=900)
    figure.write_html(out) if out.suffix == ".html" else figure.write_image(out, scale=2)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--draw", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.draw:
        draw(options.draw, options.out, options.only)
        return
    with smoke.small(options, tokens=[56, 64, 72], rounds=1, json=Path("costs.json")):
        measure_all(options)
        if options.smoke:
            draw([options.json], Path("costs.html"), [])


def measure_all(options: argparse.Namespace) -> None:
    """Print the ratios of every length."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    name = "Llama-8B's shape, random, bfloat16" if options.cuda else options.model
    readings: list[dict[str, Any]] = []
    for length in options.tokens:
        found = compare(options.model, length, options.rounds, options.only, options.cuda)
        print(f"{name}, {length} tokens, {options.threads} thread(s), medians of {options.rounds} interleaved runs")
        for key, numbers in found.items():
            print(
                f"  {key:24s} x{numbers['ratio']:.2f} (least {numbers['least']:.2f})   "
                f"peak {numbers['peak']:+.2f} GB ({numbers['peak'] - found[BASE]['peak']:+.2f} beside the base)",
                flush=True,
            )
            readings.append({"contender": key, "tokens": length, "threads": options.threads, **numbers})
        if options.json:
            options.json.write_text(json.dumps({"model": name, "readings": readings}))


if __name__ == "__main__":
    main()
