"""What heads put out, the view of a layer, and the conditions under which mixing is compared."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from sinklens.bridge.adapters import output_weights
from sinklens.check.reference_edit import naive_edit
from sinklens.check.reference_forward import Layer, plain, visible
from sinklens.check.subject import SINKS, Parts, Subject, gap
from sinklens.forward.metrics import token_loss
from sinklens.heads.activity import head_activity
from sinklens.heads.maps import attention_view
from sinklens.mixing.conditions import mixing_conditions

ROUNDING = 0.5e-4  # of the numbers in a view


def check_activity(subject: Subject, parts: Parts) -> None:
    """Weights, output norms and contributions from whole patterns; no contribution where the host hides W_O."""

    def outputs() -> float:
        found = head_activity(subject.model, subject.tokens, progress=False)
        worst = 0.0
        for n, layer in enumerate(subject.base.layers):
            weights = layer.weights.cpu()
            norms = (weights @ layer.v.cpu()).norm(dim=-1).mean(-1)
            worst = max(worst, gap(found.first_token[:, n], weights[..., 0].mean(-1)), gap(found.ahon[:, n], norms))
            worst = max(worst, gap(found.ahon_ln[:, n], norms / norms.mean(-1, keepdim=True)))
        return worst

    def contributions() -> float:
        found = head_activity(subject.model, subject.tokens, progress=False)
        worst = 0.0
        for n, layer in enumerate(subject.base.layers):
            w_o, weights = output_weights(subject.model, n), layer.weights.cpu()
            expected = torch.full_like(weights[..., 0, :], torch.nan)
            if w_o is not None:
                seen = visible(weights.shape[-1], subject.facts.causal, subject.facts.windows[n]).cpu()
                written = (layer.v.cpu() @ w_o.detach().double().cpu()).norm(dim=-1)
                expected = (weights * seen).sum(-2) / seen.sum(-2) * written
            worst = max(worst, gap(found.contribution[:, n], expected))
        return worst

    parts.add("weights and outputs", outputs)
    parts.add("contributions", contributions)


def check_view(subject: Subject, parts: Parts) -> None:
    """The numbers that stand in the page, beyond the rounding to four digits that it gets."""

    def drawn() -> float:
        layer = subject.facts.n_layers - 1
        page = attention_view(subject.model, subject.tokens[0], layer=layer).html
        start = page.rindex('"attention": ') + len('"attention": ')
        shown = json.JSONDecoder().raw_decode(page, start)[0]
        return max(0.0, gap(shown, subject.base.layers[layer].weights[0]) - ROUNDING)

    parts.add("drawn weights", drawn)


def check_conditions(subject: Subject, parts: Parts) -> None:
    """Each kind of sink gone in the layers of its life, a dose of the primary, and what each costs."""
    edits = {"without primary sinks": _gone(0), "without secondary sinks": _gone(1)}
    edits["primary x 0.5"] = naive_edit("scale", [SINKS[0]], g=0.5)

    def found() -> Any:
        return mixing_conditions(subject.model, subject.sinks, doses=(0.5,), control=False)

    def edited() -> float:
        conditions = found().edits
        if set(conditions) != set(edits):
            return float("inf")
        return max(subject.edited(list(conditions[label]), edit) for label, edit in edits.items())

    def cost() -> float:
        losses = found().losses
        scored = ~token_loss(subject.model, subject.tokens).isnan()  # raises where the model predicts no tokens
        mean = {label: subject.losses(subject.ids, edit)[scored].mean() for label, edit in edits.items()}
        mean["base"] = subject.losses(subject.ids)[scored].mean()
        return max(gap(losses[label], value) for label, value in mean.items())

    parts.add("edits", edited)
    parts.add("losses", cost)


def _gone(which: int) -> Any:
    def edit(n: int, layer: Layer) -> Tensor:  # the declared sinks live from layer 0 and from layer 1 on
        return naive_edit("renormalize", [SINKS[which]])(n, layer) if n >= which else plain(n, layer)

    return edit
