"""float32 against float64 on the CPU: every public number of families that keep float64, within a stated bound."""

from __future__ import annotations

from typing import Any

import public_numbers
import pytest
import torch
from public_numbers import FAMILIES, TOLERANCE, errors
from torch import Tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_costs_less_than_the_tolerance(family: str) -> None:
    found = errors(family)
    assert len(found) >= {"planted gpt2": 3, "neox": 15}.get(family, 30)
    wrong = {name: error for name, (_, _, error) in found.items() if not error <= TOLERANCE}
    assert not wrong
    # a model that never left float32 would show no error at all
    assert any(error > 0 for _, _, error in found.values())


def test_an_error_of_a_ten_thousandth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = public_numbers.numbers

    def off(model: Any, family: str) -> dict[str, Tensor]:
        found = true(model, family)
        if model.cfg.dtype == torch.float32:
            found["trace_sinks: shares"] = found["trace_sinks: shares"] * 1.0001
        return found

    monkeypatch.setattr(public_numbers, "numbers", off)
    assert errors("planted gpt2")["trace_sinks: shares"][2] > TOLERANCE
