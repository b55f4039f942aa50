"""The figure of attention statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch

from sinklens.show.theme import layer_by_head

if TYPE_CHECKING:
    from sinklens.heads.statistics import AttentionStatistics


def statistics_map(statistics: AttentionStatistics) -> go.Figure:
    """Layer x head heat map of the mean mass of S over queries and sequences."""
    table = statistics.to_dataframe()
    shape = statistics.mass.shape[:3]
    columns = [torch.tensor(table[name].tolist()).view(shape).nanmean(0) for name in ("mass", "margin", "free_margin")]
    title = (
        "Attention mass of the sinks, per head<br><sup>mean over the queries that see a sink and something else</sup>"
    )
    hover = (
        "mass of the sinks %{customdata[0]:.3f}<br>margin %{customdata[1]:.2f} nats<br>"
        "competitor-free margin %{customdata[2]:.2f} nats"
    )
    return layer_by_head(torch.stack(columns, -1), title, "mean mass", hover)
