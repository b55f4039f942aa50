"""Read what `make demo` wrote and compare the three files with each other."""

import json
import sys
from pathlib import Path

import pandas as pd

folder = Path(sys.argv[1])
facts = json.loads((folder / "manifest.json").read_text())
table = pd.read_parquet(folder / "scores.parquet")
page = (folder / "scan.html").read_text()
result = facts["result"]
at_position = table[table.position == result["position"]]
rate = float((at_position.alpha > result["epsilon"]).mean())
assert abs(rate - result["sink_rate"]) < 1e-9, (rate, result)
assert 0.4 < rate < 0.9, f"SmolLM2 parks attention on its first token in most heads; found {rate}"
assert result["interval"][0] < rate < result["interval"][1], result
assert f"{rate:.3f}" in page
assert "plotly.js v" in page
assert len(facts["sources"]) == 16
sys.stdout.write(
    f"demo: sink rate {rate:.3f}, interval {result['interval']}, {len(table)} rows, page {len(page)} bytes\n"
)
