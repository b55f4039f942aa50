"""Attention and sinks as pictures of one text: the coloured text, the attention map of a head, the grid of layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import collect
from sinklens.bridge.adapters import attention_hook
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.core.visibility import allowed_keys
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.circuitsvis import LONGEST_VIEW, TokenView, offline_view, safe_labels, visible_token
from sinklens.show.theme import SCALE, escape_hover, themed

LONGEST_GRID = 64
Shown = Literal["probabilities", "logits"]


@public
def attention_view(
    model: TransformerBridge, text: str | Sequence[str] | Tensor | Tokens, *, layer: int, sequence: int = 0
) -> TokenView:
    """The attention of every head of a layer as circuitsvis draws it: small maps, one of them large; works offline.

    Raises:
        BadInputError: no such layer or sequence, or more than 64 tokens.
    """
    from circuitsvis.attention import attention_heads  # slow to load

    facts = capabilities(model)
    _check_choice(facts, [layer], 0, "probabilities")
    one = _one_sequence(model, text, sequence, LONGEST_GRID)
    name = attention_hook(layer, "hook_pattern")
    weights = collect(model, one.ids, [name])[name].float().cpu().nan_to_num(0.0)
    heads = [f"layer {layer}, head {head}" for head in range(facts.n_heads)]
    rounded = [[[round(value, 4) for value in row] for row in head] for head in weights.tolist()]
    drawn = attention_heads(
        rounded, safe_labels(one.labels[0]), attention_head_names=heads, max_value=1.0, min_value=0.0,
        mask_upper_tri=facts.causal,
    )  # fmt: skip
    return offline_view(drawn)


@public
def attention_map(
    model: TransformerBridge,
    text: str | Sequence[str] | Tensor | Tokens,
    *,
    layer: int,
    head: int,
    kind: Shown = "probabilities",
    sequence: int = 0,
) -> go.Figure:
    """The query-key heat map of one head; the title states the model, layer, head, and probabilities or logits.

    Logits are the scores after scale and softcap, before the softmax; keys that a query may not see stay blank.

    Raises:
        BadInputError: no such layer, head, sequence or kind, or more than 128 tokens.
        UnsupportedModelError: logits of a model whose adapter shows only probabilities (OPT, BERT).
    """
    facts = capabilities(model)
    one = _one_sequence(model, text, sequence, LONGEST_VIEW)
    values = attention_values(model, one, [layer], head, kind)[0]
    labels = _axis_labels(one.labels[0])
    figure = go.Figure(_heatmap(values, labels, kind))
    figure.update_xaxes(title="key: attended token", **_token_axis(labels))
    figure.update_yaxes(title="query: attending token", autorange="reversed", scaleanchor="x", **_token_axis(labels))
    title = (
        f"{escape_hover(facts.model)}, layer {layer}, head {head}<br><sup>attention {kind}, one head, one text</sup>"
    )
    side = max(460, 190 + 15 * len(labels))
    return themed(figure, title, height=side, width=side + 60)


@public
def attention_grid(
    model: TransformerBridge,
    text: str | Sequence[str] | Tensor | Tokens,
    *,
    head: int = 0,
    layers: Sequence[int] | None = None,
    kind: Shown = "probabilities",
    sequence: int = 0,
) -> go.Figure:
    """The attention maps of one head in all layers side by side (StreamingLLM, appendix H), with token labels.

    Raises:
        BadInputError: no such layer, head, sequence or kind, or more than 64 tokens.
        UnsupportedModelError: logits of a model whose adapter shows only probabilities (OPT, BERT).
    """
    facts = capabilities(model)
    one = _one_sequence(model, text, sequence, LONGEST_GRID)
    chosen = list(range(facts.n_layers)) if layers is None else list(layers)
    maps = attention_values(model, one, chosen, head, kind)
    labels = _axis_labels(one.labels[0])
    columns = min(4 if len(chosen) > 6 else 3, len(chosen))
    rows = ceil(len(chosen) / columns)
    names = [f"layer {layer}" for layer in chosen]
    cell = max(190, 9 * len(labels) + 60)
    figure = make_subplots(rows, columns, subplot_titles=names, shared_xaxes=True, shared_yaxes=True,
                           horizontal_spacing=0.02, vertical_spacing=36 / (cell * rows))  # fmt: skip
    for i, values in enumerate(maps):
        figure.add_trace(
            _heatmap(values, labels, kind, coloraxis="coloraxis"), row=i // columns + 1, col=i % columns + 1
        )
    figure.update_xaxes(**_token_axis(labels))
    figure.update_yaxes(autorange="reversed", **_token_axis(labels))
    limits = {"cmin": 0, "cmax": 1} if kind == "probabilities" else {}
    figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": {"title": kind, "outlinewidth": 0}, **limits})
    title = (
        f"{escape_hover(facts.model)}: head {head} in every layer<br><sup>attention {kind}; a row is a query, a column "
        f"the key that it attends to</sup>"
    )
    return themed(figure, title, height=150 + cell * rows, width=170 + cell * columns)


def attention_values(
    model: TransformerBridge, one: Tokens, layers: Sequence[int], head: int, kind: str
) -> list[Float[Tensor, "query key"]]:
    """Probabilities or logits of one head of one sequence per layer; NaN where the query may not see the key."""
    facts = capabilities(model)
    _check_choice(facts, layers, head, kind)
    point = "hook_pattern" if kind == "probabilities" else "hook_attn_scores"
    names = {layer: attention_hook(layer, point) for layer in layers}
    kept = collect(model, one.ids, list(names.values()))
    maps = []
    for layer in layers:
        allowed = allowed_keys(
            one.mask.cpu(), slice(0, one.ids.shape[1]), causal=facts.causal, window=facts.windows[layer]
        )
        maps.append(kept[names[layer]][head].float().cpu().masked_fill(~allowed[0], torch.nan))
    return maps


def _check_choice(facts: Capabilities, layers: Sequence[int], head: int, kind: str) -> None:
    wrong = [layer for layer in layers if not 0 <= layer < facts.n_layers]
    if wrong or not layers:
        raise BadInputError(f"layers {wrong or 'none'}: {facts.model} has layers 0 to {facts.n_layers - 1}")
    if not 0 <= head < facts.n_heads:
        raise BadInputError(f"head {head} is out of range: {facts.model} has heads 0 to {facts.n_heads - 1}")
    if kind == "logits" and not facts.scores_are_logits:
        raise UnsupportedModelError(
            f"{facts.model}: its adapter shows no scores before the softmax; use kind='probabilities'"
        )


def _one_sequence(model: TransformerBridge, text: Any, sequence: int, longest: int) -> Tokens:
    batch = as_tokens(model, text)
    if not 0 <= sequence < len(batch):
        raise BadInputError(f"sequence {sequence} is out of range: there are {len(batch)}")
    one = batch[sequence].trim()
    if one.ids.shape[1] > longest:
        raise BadInputError(f"this picture draws up to {longest} tokens, the text has {one.ids.shape[1]}; shorten it")
    return one


def _axis_labels(labels: Sequence[str]) -> list[str]:
    return [escape_hover(visible_token(label)) for label in labels]


def _token_axis(labels: list[str]) -> dict[str, Any]:
    ticks = list(range(len(labels)))
    return {"tickvals": ticks, "ticktext": labels, "tickfont": {"size": 9}, "showgrid": False, "zeroline": False}


def _heatmap(values: Tensor, labels: list[str], kind: str, coloraxis: str | None = None) -> go.Heatmap:
    rows = [[None if v != v else v for v in row] for row in values.tolist()]
    hover = [[f"{q} attends to {k}: {{value}}" for k in labels] for q in labels]
    text = [
        [line.replace("{value}", "" if v is None else f"{v:.3f}") for line, v in zip(lines, row, strict=True)]
        for lines, row in zip(hover, rows, strict=True)
    ]
    colour: dict[str, Any] = (
        {"coloraxis": coloraxis}
        if coloraxis
        else {"colorscale": SCALE, "colorbar": {"title": kind, "outlinewidth": 0}}
        | ({"zmin": 0, "zmax": 1} if kind == "probabilities" else {})
    )
    return go.Heatmap(z=rows, text=text, hovertemplate="%{text}<extra></extra>", hoverongaps=False, **colour)
