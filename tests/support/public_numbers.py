"""Every public number of tiny models that keep float64 throughout, by name: what float32 costs is their difference."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from architectures import build, random_rows
from planted_writers import planted_writers, texts
from torch import Tensor

import sinklens as sl
from sinklens.decompose.result import NUMBERS
from sinklens.streaming.loss import streaming_loss

FAMILIES = ("gpt2", "bert", "neox", "planted gpt2")
TOLERANCE = 2e-5  # of the largest magnitude of the same number
MASK = 7
EDITS: dict[Any, dict[str, Any]] = {
    "renormalize": {},
    "zero": {},
    "value_only": {},
    "scale": {"g": 0.5},
    "move": {"target": 4},
    "uniform": {},
    "null": {},
    "mean_value": {"reference": True},
    "fixed_key": {"reference": True},
    "fixed_logit": {"reference": True},
}


def pair(family: str) -> tuple[Any, Any]:
    """The same model in float32 and in float64."""
    with patch.object(sl, "load_model", lambda model: model):  # a model that lies in a bridge cannot lie in another
        model: Any = planted_writers() if family == "planted gpt2" else build(family)
    exact = copy.deepcopy(model).double()
    return sl.load_model(model), sl.load_model(exact)


def inputs() -> Tensor:
    """Four sequences of 56 tokens, none of them the mask's."""
    return torch.stack([torch.where(row == MASK, MASK + 1, row) for row in random_rows((56, 56, 56, 56))])


def numbers(model: Any, family: str) -> dict[str, Tensor]:
    """Public numbers by "function: number"."""
    if family == "planted gpt2":
        return _traced(model)
    ids = inputs()
    mask = MASK if family == "bert" else None
    found: dict[str, Tensor] = {}
    scores = sl.sink_scores(model, ids, progress=False)
    found |= {"sink_scores: alpha": scores.alpha, "sink_scores: beta": scores.beta}
    seen = sl.heads.attention_statistics(model, ids, [1], entropy=True, progress=False)
    for name in ("mass", "margin", "free_margin", "value_norm", "entropy"):
        found[f"attention_statistics: {name}"] = getattr(seen, name)
    heads = sl.heads.head_activity(model, ids, progress=False)
    found |= {f"head_activity: {name}": getattr(heads, name) for name in ("ahon", "ahon_ln", "contribution")}
    if family != "neox":
        collapse = sl.mixing.measure_collapse(model, ids, sinks=[0], progress=False)
        found["measure_collapse: all three"] = collapse.values
        swaps = sl.mixing.perturbation_spread(model, ids, sinks=[0], n_swaps=8, progress=False)
        found["perturbation_spread: relative"] = swaps.relative
        mixing = sl.measure_mixing(model, ids[:1], sinks=[0], probes=4, progress=False)
        found |= {f"measure_mixing: {name}": getattr(mixing, name) for name in ("mix", "via_sink", "spread")}
        if family == "gpt2":  # BERT's norms stand on the stream
            found["path_sums: bounds"] = sl.mixing.path_sums(model, ids[:1, :16], sinks=[0], progress=False).bounds[0]
        parts = sl.decompose_sinks(
            model, ids, [1], effects="all", metrics="embedding" if family == "bert" else "loss", progress=False
        )
        for n, name in enumerate(NUMBERS):
            found[f"decompose_sinks: {name}"] = parts.values[..., n]
        for metric, values in parts.effects["all"].values.items():
            found[f"decompose_sinks: 2x2, {metric}"] = values
    base = sl.token_loss(model, ids[:2], mask_id=mask)
    found["token_loss: unedited"] = base
    for mode, options in EDITS.items():
        given = {**options, **({"reference": ids[2:]} if options.get("reference") else {})}
        try:
            hooks = sl.ablate_sinks(model, [1], mode, **given, progress=False)
        except sl.UnsupportedModelError:
            continue  # a delegating host's keys or values cannot be replaced
        found[f"ablate_sinks: {mode}, loss"] = sl.token_loss(model, ids[:2], hooks=hooks, mask_id=mask)
    residual: dict[Any, Any] = {"project": {"reference": ids[2:]}, "rescale": {"g": 0.5}}
    for mode, options in residual.items():
        hooks = sl.ablate_residual(model, [1], mode, **options, progress=False)
        found[f"ablate_residual: {mode}, loss"] = sl.token_loss(model, ids[:2], hooks=hooks, mask_id=mask)
    if family == "neox":
        found["streaming_loss: loss"] = streaming_loss(model, ids, sinks=2, recent=12, progress=False).losses
    return found


def _traced(model: Any) -> dict[str, Tensor]:
    """What a model with planted writers shows: a trace, its causes."""
    trace = sl.trace_sinks(model, texts(3), replacements=("same_id", "zero"), progress=False)
    shares = torch.tensor([share for one in trace.traced for _, share in one.shares()])
    causes = {name: torch.tensor([float(row[name]) for row in trace.causes]) for name in ("d_alpha", "d_margin")}
    rho = torch.tensor([one.rho for one in trace.traced])
    return {"trace_sinks: shares": shares, "trace_sinks: rho": rho} | {
        f"trace_sinks: {name} of replacements": values for name, values in causes.items()
    }


def errors(family: str) -> dict[str, tuple[float, float, float]]:
    """By number: the largest absolute error of float32, the largest magnitude, and their quotient."""
    single, double = pair(family)
    mine, exact = numbers(single, family), numbers(double, family)
    assert set(mine) == set(exact)
    found = {}
    for name, reference in exact.items():
        got, truth = mine[name].double(), reference.double()
        assert got.shape == truth.shape, name
        both = truth.isfinite()
        assert bool((got.isfinite() == both).all()), f"{name}: finite in one precision only"
        assert bool((got[~both & ~truth.isnan()] == truth[~both & ~truth.isnan()]).all()), name
        if not both.any():
            continue
        largest = float(truth[both].abs().max())
        error = float((got - truth)[both].abs().max())
        found[name] = error, largest, error / largest if largest > 1e-12 else error
    return found
