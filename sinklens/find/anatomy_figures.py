"""Figures of an anatomy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from sinklens.core.errors import BadInputError
from sinklens.show.theme import escape_hover, themed

if TYPE_CHECKING:
    from sinklens.find.anatomy import Anatomy


def anatomy_curves(anatomy: Anatomy, most: int = 8) -> go.Figure:
    """Residual norm ratio, mass, margin and value ratio over layers, for the sinks with the largest mass."""
    table = anatomy.layers
    if table.empty:
        raise BadInputError("there are no sinks to draw")
    keys = ["sequence", "position", "token"]
    strongest = table.groupby(keys).mass.max().nlargest(most).index
    values = anatomy.heads.groupby([*keys, "layer"], as_index=False).agg(
        **{"ov_ratio": ("ov_ratio" if "ov_ratio" in anatomy.heads else "v_ratio", "median")}
    )
    panels = (
        ("residual_ratio", "residual norm / median", True),
        ("mass", "mass (mean beta)", False),
        ("margin", "competitor-free margin, nats", False),
        ("ov_ratio", "|(v - b_V) W_O| / median", True),
    )
    figure = make_subplots(rows=2, cols=2, subplot_titles=[title for _, title, _ in panels], vertical_spacing=0.14)
    for i, key in enumerate(strongest):
        colour = qualitative.Safe[i % len(qualitative.Safe)]
        for panel, (column, _, _) in enumerate(panels):
            source = values if column == "ov_ratio" else table
            rows = pd.DataFrame(source[(source[keys] == list(key)).all(axis=1)]).sort_values(by="layer")
            figure.add_scatter(
                x=rows.layer,
                y=rows[column],
                name=escape_hover(f"{key[0]}:{key[1]} {key[2]!r}"),
                legendgroup=str(i),
                showlegend=panel == 0,
                line={"color": colour},
                row=panel // 2 + 1,
                col=panel % 2 + 1,
            )
    for panel, (_, _, logarithmic) in enumerate(panels):
        if logarithmic:
            figure.update_yaxes(type="log", row=panel // 2 + 1, col=panel % 2 + 1)
    figure.update_xaxes(title="layer", row=2)
    return themed(figure, "Anatomy of the strongest sinks, layer by layer", height=640)
