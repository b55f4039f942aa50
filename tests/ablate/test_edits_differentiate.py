"""Edited models can be differentiated: forward and reverse mode against central differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

import sinklens as sl
from sinklens.bridge.adapters import block_input, block_output

LENGTH = 12
MODES: dict[str, dict[str, Any]] = {
    "renormalize": {},
    "zero": {},
    "value_only": {},
    "scale": {"g": 0.5},
    "mean_value": {},
    "fixed_key": {},
    "fixed_logit": {},
    "null": {},
    "move": {"target": 3},
    "uniform": {},
}


def last_states(model: TransformerBridge, ids: torch.Tensor, hooks: list[Any], start: torch.Tensor) -> torch.Tensor:
    """The last block's output as a function of what the first block reads."""
    kept: list[torch.Tensor] = []

    def put(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return start.view(tensor.shape)

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        kept.append(tensor.reshape(LENGTH, -1))
        raise StopAtLayerException(tensor[:, :0])

    ends = [(block_input(0), put), *hooks, (block_output(model.cfg.n_layers - 1), keep)]
    model.run_with_hooks(ids, return_type=None, fwd_hooks=ends)
    return kept[0]


def check(model: TransformerBridge, hooks: list[Any], eps: float | None) -> None:
    """Forward against reverse mode, and in float64 forward mode against central differences."""
    ids = torch.stack(random_rows((LENGTH,)))
    start: list[torch.Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(
            ids, fwd_hooks=[(block_input(0), lambda t, hook: start.append(t.detach().reshape(LENGTH, -1)))]
        )
    draw = torch.Generator().manual_seed(0)
    v, w = (torch.randn(start[0].shape, generator=draw).to(start[0]) for _ in range(2))

    def run(x: torch.Tensor) -> torch.Tensor:
        return last_states(model, ids, hooks, x)

    with torch.no_grad():
        forward = torch.func.jvp(run, (start[0],), (v,))[1]
    x = start[0].clone().requires_grad_()
    gradient = torch.autograd.grad((run(x) * w).sum(), x)[0]
    assert float((gradient * v).sum()) == pytest.approx(float((forward * w).sum()), rel=1e-4)
    if eps is not None:
        with torch.no_grad():
            central = (run(start[0] + eps * v) - run(start[0] - eps * v)) / (2 * eps)
        assert float((forward - central).abs().max()) < 3e-4 * float(central.abs().max())


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_differentiates_as_the_edited_model_does(mode: Any) -> None:
    """float64 GPT-2; two sinks, one of which sees only itself and the other."""
    model = sl.load_model(build("gpt2").double())
    options = dict(MODES[mode])
    if mode in ("mean_value", "fixed_key", "fixed_logit"):
        options["reference"] = torch.stack(random_rows((20, 20), seed=4))
    hooks = sl.ablate_sinks(model, [0] if mode == "move" else [0, 3], mode, **options)
    check(model, hooks, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt", "bert"])
def test_other_hosts_differentiate_too(name: str) -> None:
    _, model = build_pair(name)
    check(model, sl.ablate_sinks(model, [0]), None)
