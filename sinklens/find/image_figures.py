"""Figures over pictures: attention on patches drawn on the picture itself, and norms over layers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from sinklens.core.errors import BadInputError, SinklensError
from sinklens.core.validation import public
from sinklens.inputs.images import Images
from sinklens.show.theme import ACCENT, COLOURS, INK, MUTED, SCALE, band, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.find.registers import Registers
    from sinklens.find.scores import SinkScores

GAP = (14, 62)  # pixels between panels, for the titles
PANEL = 300  # pixels of a picture's longer side
LEAST = 0.25  # the colour scale begins at a quarter of the uniform share


@public
def image_map(
    scores: SinkScores, image: int = 0, layers: Sequence[int] | None = None, *, heads: Sequence[int] | None = None
) -> go.Figure:
    """A picture and, beside it, the attention that each of its patches gets, drawn over it, layer by layer.

    Colours are ``alpha`` over the uniform share ``1 / tokens`` on a logarithmic scale, the mean over heads; each
    panel names what [CLS] and registers get, which have no place on the picture, and the strongest patch (the scale
    ends where one patch in 400 lies above it). Hover shows alpha itself.

    Args:
        scores: of :class:`sinklens.inputs.Images`.
        image: which picture.
        layers: up to eight; default four over the depth of the model, first and last among them.
        heads: the mean over these only.

    Raises:
        BadInputError: scores of texts, a picture, layer or head out of range.
        SinklensError: Pillow is not installed.
    """
    tokens = scores.tokens
    if not isinstance(tokens, Images):
        raise BadInputError("these scores are of texts; image_map draws on pictures (plot_positions is for texts)")
    if not 0 <= image < len(tokens):
        raise BadInputError(f"image {image} is out of range: there are {len(tokens)}")
    last = scores.n_layers - 1
    chosen = sorted({0, round(last / 3), round(2 * last / 3), last}) if layers is None else list(layers)
    if not chosen or len(chosen) > 8 or any(not 0 <= layer <= last for layer in chosen):
        raise BadInputError(f"layers must be one to eight numbers between 0 and {last}, got {chosen}")
    used = list(range(scores.n_heads)) if heads is None else list(heads)
    if not used or any(not 0 <= head < scores.n_heads for head in used):
        raise BadInputError(f"heads must lie between 0 and {scores.n_heads - 1}, got {used}")
    alpha = scores.alpha[image][:, used].double().mean(1)
    count = alpha.shape[-1]
    share = alpha * count
    shown = tokens.patches(share)[chosen].flatten()
    top = max(4.0, float(shown.sort().values[-1 - len(shown) // 400]))  # a few patches do not set the scale
    full = bool(shown.max() > top)
    titles = ["the picture", *(_panel_title(share[layer], layer, tokens) for layer in chosen)]
    columns = len(titles) if len(titles) <= 5 else math.ceil(len(titles) / 2)
    rows = math.ceil(len(titles) / columns)
    height, width = tokens.pictures.shape[1:3]
    across, down = PANEL * min(1.0, width / height), PANEL * min(1.0, height / width)
    plot = (columns * (across + GAP[0]) - GAP[0], rows * (down + GAP[1]) - GAP[1])
    across_gap, down_gap = GAP[0] / plot[0], GAP[1] / plot[1]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=across_gap, vertical_spacing=down_gap
    )
    plain, pale = _png(tokens.pictures[image]), _png(tokens.pictures[image], pale=True)
    for number in range(len(titles)):
        row, column = number // columns + 1, number % columns + 1
        _place(figure, plain if number == 0 else pale, tokens.grid, row, column, f"x{number + 1}" if number else "x")
        if number:
            layer = chosen[number - 1]
            trace = _overlay(tokens, alpha[layer], share[layer], layer, (top, full), bar=number == 1)
            figure.add_trace(trace, row=row, col=column)
    figure.update_annotations(font={"size": 13, "color": INK})
    name, used_heads = escape_hover(tokens.sources[image]), "all heads" if heads is None else f"heads {used}"
    title = (
        f"Attention on the patches of {name}<br><sup>mean over {used_heads}; 1x is an even spread over all {count} "
        f"tokens (alpha = {1 / count:.4f})</sup>"
    )
    margin = {"l": 20, "r": 120, "t": 118, "b": 20}
    themed(figure, title, height=int(plot[1] + 138), width=int(plot[0] + 140))
    return figure.update_layout(margin=margin, title_y=1 - 34 / (plot[1] + 138), title_yanchor="middle")


def _panel_title(share: Tensor, layer: int, tokens: Images) -> str:
    own = [f"{tokens.labels[0][p]}: {float(share[p]):.3g}x" for p in range(tokens.prefix)]
    shown = ", ".join(own[:2]) + (f" + {len(own) - 2} more" if len(own) > 2 else "")
    patches = share[tokens.prefix :]
    best = f"{tokens.labels[0][tokens.prefix + int(patches.argmax())]}: {float(patches.max()):.3g}x"
    return f"layer {layer}<br><span style='color:{ACCENT}'>{shown}{', ' * bool(own)}</span>{best}"


def _overlay(
    tokens: Images, alpha: Tensor, share: Tensor, layer: int, scale: tuple[float, bool], *, bar: bool
) -> go.Heatmap:
    rows, columns = tokens.grid
    values = tokens.patches(share).clamp(min=1e-6)
    top, full = scale
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if t < top / 1.4]
    hover = [
        [
            f"layer {layer}, patch {row},{column}<br>alpha {float(a):.5f}, {float(s):.2f} times the uniform share"
            for column, (a, s) in enumerate(zip(alphas, shares, strict=True))
        ]
        for row, (alphas, shares) in enumerate(zip(tokens.patches(alpha), values, strict=True))
    ]
    return go.Heatmap(
        z=values.log2().tolist(),
        x=list(range(columns)),
        y=list(range(rows)),
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale=SCALE,
        zmin=math.log2(LEAST),
        zmax=math.log2(top),
        opacity=0.82,
        showscale=bar,
        colorbar={
            "title": {"text": "attention,<br>times the<br>uniform share<br> ", "font": {"size": 12}},
            "tickvals": [*(math.log2(t) for t in ticks), math.log2(top)],
            "ticktext": [f"{t:g}x" if t > LEAST else f"{t:g}x or less" for t in ticks]
            + [f"{top:.2g}x" + (" or more" if full else "")],
            "outlinewidth": 0,
            "thickness": 14,
        },
    )


def _place(figure: go.Figure, source: str, grid: tuple[int, int], row: int, column: int, axis: str) -> None:
    rows, columns = grid
    place = {"x": -0.5, "y": -0.5, "sizex": columns, "sizey": rows, "xref": "x", "yref": "y"}
    figure.add_layout_image(source=source, sizing="stretch", layer="below", row=row, col=column, **place)
    quiet = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    figure.update_xaxes(range=[-0.5, columns - 0.5], constrain="domain", row=row, col=column, **quiet)
    figure.update_yaxes(
        range=[rows - 0.5, -0.5], scaleanchor=axis, scaleratio=1, constrain="domain", row=row, col=column, **quiet
    )


def _png(picture: Tensor, *, pale: bool = False) -> str:
    """A picture as a data URI; ``pale`` is grey and low in contrast, so that colours on it can be read."""
    try:
        from PIL import Image  # optional
    except ImportError as error:
        raise SinklensError("pictures need Pillow: pip install 'sinklens[images]'") from error
    image = Image.fromarray(picture.cpu().numpy())
    image = image.convert("L").convert("RGB") if pale else image
    image.thumbnail((2 * PANEL, 2 * PANEL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def register_figure(registers: Registers) -> go.Figure:
    """Norms over layers, relative to the patches' median: their spread, the largest, [CLS], registers, the rule."""
    relative, tokens = registers.relative, registers.tokens
    prefix = tokens.prefix
    patches = relative[..., prefix:].transpose(0, 1).flatten(1)
    x = list(range(relative.shape[1]))
    marks = torch.tensor([0.01, 0.5, 0.99], dtype=patches.dtype)
    low, middle, high = patches.quantile(marks, dim=1).tolist() if patches.numel() < 2**24 else _quantiles(patches)
    figure = go.Figure(band(x, low, high, COLOURS[1]))
    figure.add_scatter(
        x=x, y=middle, name="patches: median, 1 to 99 %", mode="lines", line={"color": COLOURS[1], "width": 1.5},
        hovertemplate="block %{x}: median %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=patches.amax(1).tolist(), name="largest patch", mode="lines",
        line={"color": COLOURS[1], "dash": "dot", "width": 2},
        hovertemplate="block %{x}: largest patch %{y:.2f}<extra></extra>",
    )  # fmt: skip
    for p in range(prefix):
        figure.add_scatter(
            x=x, y=relative[..., p].mean(0).tolist(), name=tokens.labels[0][p], mode="lines+markers",
            line={"color": ACCENT if p == 0 else COLOURS[2 + (p - 1) % 4]}, marker={"size": 4},
            hovertemplate="block %{x}: %{y:.2f}<extra>" + tokens.labels[0][p] + "</extra>",
        )  # fmt: skip
    if registers.norm is None:
        figure.add_hline(
            y=registers.ratio, line={"color": MUTED, "dash": "dash"}, annotation_text=f"rule: {registers.ratio:g} x",
            annotation_position="top left", annotation_font_color=MUTED,
        )  # fmt: skip
    figure.update_xaxes(title="after block", dtick=5 if len(x) > 12 else 1)
    figure.update_yaxes(title="norm / median of the picture's patches", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0})
    found = int(registers.high[:, registers.layer].sum())
    title = (
        f"Norms of tokens, {len(tokens)} picture(s)<br><sup>{found} patch(es) by the rule "
        f"({escape_hover(registers.rule)}) after block {registers.layer}</sup>"
    )
    return themed(figure, title, height=440).update_layout(margin={"b": 100})


def _quantiles(patches: Tensor) -> list[list[float]]:
    """torch.quantile takes 2^24 numbers at most."""
    ordered = patches.sort(1).values
    return [ordered[:, round(q * (ordered.shape[1] - 1))].tolist() for q in (0.01, 0.5, 0.99)]
