"""Kills, wild input and interruptions at full size, and a summary: what ``make torture`` runs.

    python benchmarks/torture.py [--kills 50] [--cases 10000] [--moments 20] [--only EXPRESSION] [--real] [--smoke]

The tests are those of CI (in ``tests/robustness``: ``test_kills.py``, ``test_fuzz.py``, ``test_fuzz_files.py``,
``test_fuzz_methods.py``, ``test_cleanup.py``, ``test_safety.py``) with other sizes, set by ``SINKLENS_KILLS`` (per
stage, six stages), ``SINKLENS_FUZZ`` and ``SINKLENS_STRIKES``. ``--real`` also kills the fetch and the conversion of
SmolLM2 (93 MB) as often as one stage.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import smoke

TESTS = Path(__file__).parents[1] / "tests" / "robustness"
NAMES = ("kills", "fuzz", "fuzz_files", "fuzz_methods", "cleanup", "safety")
STAGES = 6
COUNTS = ("kills survived", "cases fuzzed", "interruptions survived")
ONE_OF_EACH = "training_survives_kills or token_loss or broken_lines or every_class_with or names_that_become_folders"


def run(options: argparse.Namespace, counts: Path) -> int:
    """The tests at these sizes; pytest's exit status."""
    sizes = {
        "SINKLENS_KILLS": max(1, -(-options.kills // STAGES)),
        "SINKLENS_FUZZ": options.cases,
        "SINKLENS_STRIKES": options.moments,
    }
    given = {name: str(value) for name, value in sizes.items()} | {"SINKLENS_COUNTS": str(counts)}
    files = [str(path) for name in NAMES for path in sorted(TESTS.rglob(f"test_{name}.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "--tb=short", "-k", options.only, *files]
    return subprocess.run(command, env=os.environ | given, cwd=counts.parent, check=False).returncode


def kill_the_real_fetch(kills: int) -> int:
    """Kill a fetch of SmolLM2 into an empty cache at random moments until it is whole; how many kills it took."""
    killed, chance = 0, random.Random(0)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"SINKLENS_CACHE": cache}
        command = [sys.executable, "-c", "from sinklens.models.fetch import fetch; fetch('smollm2-135m')"]
        while True:
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            if killed < kills:
                time.sleep(chance.uniform(0, 20))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    killed += 1
            if process.wait() == 0:
                break
        check = "import sinklens as sl; sl.sink_scores(sl.load_model('smollm2-135m'), 'a text to see that it works')"
        subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    return killed


def main() -> int:
    """Read the command line, run, and give an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--only", default="", help="some of the tests: pytest's -k")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.smoke:
        options.kills, options.cases, options.moments, options.only = 1, 1, 1, ONE_OF_EACH
    return torture(options)


def torture(options: argparse.Namespace) -> int:
    """Run, and print the summary; what was never tried counts as a failure."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        counts.touch()
        status = run(options, counts)
        total: Counter[str] = Counter()
        for line in counts.read_text(encoding="utf-8").splitlines():
            what, number = line.split("\t")
            total[what] += int(number)
    real = kill_the_real_fetch(options.kills // STAGES) if options.real else 0
    status = status or int(any(total[what] == 0 for what in COUNTS if not options.only or options.smoke))
    print(f"torture, {time.monotonic() - began:.0f} s: {'nothing failed' if status == 0 else 'FAILURES, see above'}")
    print(f"  kills survived: {total['kills survived']} of tiny models, {real} of the real fetch and conversion")
    print(f"  cases fuzzed: {total['cases fuzzed']}")
    print(f"  interruptions survived: {total['interruptions survived']}")
    return status


if __name__ == "__main__":
    sys.exit(main())
