"""Read the report that `make demo` wrote and compare the page, the tables and the saved results with each other."""

import json
import sys
from pathlib import Path

import pandas as pd

import sinklens as sl

folder = Path(sys.argv[1])
facts = json.loads((folder / "manifest.json").read_text())
page = (folder / "index.html").read_text()
said = (folder / "report.md").read_text()

for kind, names in facts["files"].items():
    missing = [name for name in names if not (folder / kind / name).is_file()]
    assert not missing, (kind, missing)
assert facts["files"]["figures"], facts["result"]["notes"]
assert not facts["result"]["left_out"], facts["result"]["left_out"]
assert len(page.encode()) < 6_000_000, len(page.encode())
assert page.count("plotly.js v") == 1

scores = sl.SinkScores.load(folder / "stages" / "scores.safetensors")
rate, interval = scores.sink_rate(), scores.sink_rate_interval()
assert len(facts["sources"]) == 16
assert interval is not None
assert 0.4 < rate < 0.9, f"SmolLM2 parks attention on its first token in most heads; found {rate}"
assert interval[0] < rate < interval[1], interval
for text in (page, said.replace("\\", "")):
    assert f"in a share of {rate:.3f} of" in text

effects = pd.read_parquet(folder / "tables" / "effects.parquet")
experiment = sl.experiment.Experiment.load(folder / "stages" / "experiment.safetensors")
pd.testing.assert_frame_equal(effects, experiment.to_dataframe())
for row in effects[effects.label != "base"].to_dict("records"):
    assert f"<td>{row['d_loss']:.4f}</td>" in page, row
gone = effects[(effects.label == "primary sinks, renormalize") & (effects.control == "")].iloc[0]
assert gone.d_loss_low > 0, f"SmolLM2 loses without its primary sinks; found {gone.to_dict()}"
assert f"the loss rises by {gone.d_loss:.3f} nats per token [{gone.d_loss_low:.3f}, {gone.d_loss_high:.3f}]" in page

trace = sl.trace.SinkTrace.load(folder / "stages" / "trace.safetensors")
pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables" / "writers.parquet"), trace.writers())
top = trace.by_component("secondary").iloc[0]
assert top.writer == "mlp 2", f"SmolLM2's secondary sinks are written by MLP 2; found {top.writer}"
assert f"direction: mlp 2 ({top.phases} of" in page

seconds = sum(stage["seconds"] for stage in facts["stages"].values())
sys.stdout.write(
    f"demo: sink rate {rate:.3f} {interval}, loss +{gone.d_loss:.3f} without primary sinks, "
    f"{len(facts['files']['tables'])} tables, {len(facts['files']['figures'])} figures, "
    f"page {len(page.encode())} bytes, stages {seconds:.0f} s\n"
)
