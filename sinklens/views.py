"""Attention and sinks as pictures of one text: the coloured text, the attention map of a head, the grid of layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.arguments import public, public_methods
from sinklens.attention import attention_hook
from sinklens.errors import BadInputError, UnsupportedModelError
from sinklens.plots import SCALE, escape_hover, themed
from sinklens.proof import Capabilities, capabilities
from sinklens.results import write_text
from sinklens.running import collect
from sinklens.tokens import Tokens, as_tokens
from sinklens.visibility import allowed_keys

if TYPE_CHECKING:
    from sinklens.sinkmap import SinkMap

LONGEST_VIEW = 128
LONGEST_GRID = 64
KINDS = ("probabilities", "logits")
_JOINER = "\u2060"  # has no width; behind '<' and '&' it lets no tag and no entity begin
_LESS_THAN = "\ue000"  # stands for '<' until the page is written: circuitsvis does not escape it inside its script


@public_methods
@dataclass(frozen=True)
class TokenView:
    """A circuitsvis view that works offline: it shows itself in a notebook, or :meth:`save` it as a page."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as a page of its own."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{self.html}</body></html>\n')
        return Path(path)


def token_view(sinks: SinkMap, sequence: int = 0) -> TokenView:
    """The text of one sequence, coloured by mass (mean far importance over heads); the reader picks the layer.

    Raises:
        BadInputError: more than 128 tokens (the page would take minutes to draw), or no such sequence.
    """
    from circuitsvis.tokens import colored_tokens_multi

    if not 0 <= sequence < len(sinks.tokens):
        raise BadInputError(f"sequence {sequence} is out of range: there are {len(sinks.tokens)}")
    labels = sinks.tokens.labels[sequence]
    if len(labels) > LONGEST_VIEW:
        raise BadInputError(
            f"token_view draws up to {LONGEST_VIEW} tokens, this sequence has {len(labels)}; use plot()"
        )
    mass = sinks.mass[sequence, :, : len(labels)].nan_to_num(0.0)
    names = [f"layer {layer}" for layer in range(sinks.n_layers)]
    return _offline(colored_tokens_multi(_hidden(labels), mass.T.contiguous(), labels=names))


@public
def attention_view(
    model: TransformerBridge, text: str | Sequence[str] | Tensor | Tokens, *, layer: int, sequence: int = 0
) -> TokenView:
    """The attention of every head of a layer as circuitsvis draws it: small maps, one of them large; works offline.

    Raises:
        BadInputError: no such layer or sequence, or more than 64 tokens.
    """
    from circuitsvis.attention import attention_heads

    facts = capabilities(model)
    _check_choice(facts, [layer], 0, "probabilities")
    one = _one_sequence(model, text, sequence, LONGEST_GRID)
    name = attention_hook(layer, "hook_pattern")
    weights = collect(model, one.ids, [name])[name].float().cpu().nan_to_num(0.0)
    heads = [f"layer {layer}, head {head}" for head in range(facts.n_heads)]
    rounded = [[[round(value, 4) for value in row] for row in head] for head in weights.tolist()]
    drawn = attention_heads(
        rounded, _hidden(one.labels[0]), attention_head_names=heads, max_value=1.0, min_value=0.0,
        mask_upper_tri=facts.causal,
    )  # fmt: skip
    return _offline(drawn)


def _hidden(labels: Sequence[str]) -> list[str]:
    """Tokens as circuitsvis may write them into its script and, as it does with tokens, take them for HTML."""
    shown = (_visible_token(label).replace("&", f"&{_JOINER}") for label in labels)
    return [label.replace("<", f"{_LESS_THAN}{_JOINER}") for label in shown]


def _offline(drawn: Any) -> TokenView:
    """What circuitsvis drew, with its script inside and every '<' of a token escaped."""
    script, call = str(drawn.local_src).rsplit("CircuitsVis.render(", 1)
    escaped = call.replace(r"\ue000", r"\u003c")
    return TokenView(f"{script}CircuitsVis.render({escaped}".replace('margin: 15px 0;"/>', 'margin: 15px 0;"></div>'))


@public
def attention_map(
    model: TransformerBridge,
    text: str | Sequence[str] | Tensor | Tokens,
    *,
    layer: int,
    head: int,
    kind: str = "probabilities",
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
    kind: str = "probabilities",
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
    if kind not in KINDS:
        raise BadInputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
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


def _visible_token(label: str) -> str:
    return label.replace("\n", "\u21b5") or "\u00b7"


def _axis_labels(labels: Sequence[str]) -> list[str]:
    return [escape_hover(_visible_token(label)) for label in labels]


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
