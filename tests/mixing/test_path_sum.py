"""The path-sum bound against dense Jacobians and a loop over paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows

import sinklens as sl
from sinklens.mixing.jacobians import Stream
from sinklens.mixing.path_sum import _Branch, path_sum_bound, spectral_norms

LENGTH = 7


def collect(model: Any, ids: torch.Tensor, names: list[str], hooks: Any = ()) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = tensor.detach()

    model.run_with_hooks(ids, fwd_hooks=[*hooks, *((n, keep) for n in names)])
    return seen


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "neox", "falcon", "phi3"]
)
def test_no_block_exceeds_the_bound(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    try:
        bound = path_sum_bound(model, ids)
    except sl.UnsupportedModelError:
        assert name in ("phi3", "falcon")  # W_V is packed with W_Q and W_K
        return
    stream = Stream(model, ids, frozen_attention=True)
    whole: Any = torch.autograd.functional.jacobian(stream, stream.start, vectorize=True)
    norms = torch.linalg.matrix_norm(whole.permute(0, 1, 3, 2, 4).double(), 2)
    assert (norms <= bound * (1 + 1e-3)).all()
    below = torch.ones(LENGTH, LENGTH).tril().bool()
    assert (bound[:, ~below] == 0).all()
    assert (bound[0][below] / norms[0][below]).median() < 30  # and it is no empty statement


def test_the_bound_of_one_layer_is_that_of_the_formula() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    names = ["blocks.0.hook_in", "blocks.0.attn.hook_pattern", "blocks.0.ln2.hook_in"]
    seen = collect(model, ids, names)
    x, middle = seen["blocks.0.hook_in"][0], seen["blocks.0.ln2.hook_in"][0]
    attention: Any = model.blocks[0].attn
    host: Any = model.original_model
    layer = host.model.layers[0]
    gain = layer.input_layernorm.weight
    expected = torch.eye(LENGTH, dtype=torch.float64)
    n_heads = model.cfg.n_heads
    for i in range(LENGTH):
        for j in range(i + 1):
            rms = float(x[j].square().mean().sqrt())
            for h in range(n_heads):
                group = h // (n_heads // attention.W_V.shape[0])
                value = torch.diag(gain) @ attention.W_V[group] @ attention.W_O[h]
                weight = float(seen["blocks.0.attn.hook_pattern"][0, h, i, j])
                expected[i, j] += weight * float(torch.linalg.matrix_norm(value, 2)) / rms
    for i in range(LENGTH):
        whole: Any = torch.autograd.functional.jacobian(
            lambda v: v + layer.mlp(layer.post_attention_layernorm(v[None, None]))[0, 0], middle[i]
        )
        expected[i] *= float(torch.linalg.matrix_norm(whole, 2))
    assert torch.allclose(path_sum_bound(model, ids)[0], expected, rtol=1e-3)


def test_layers_multiply_over_paths() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((LENGTH,)))
    whole = path_sum_bound(model, ids)
    steps = [whole[0], torch.linalg.solve(whole[0].T, whole[1].T).T]  # whole[1] = step_1 whole[0]
    for i, j in ((5, 2), (6, 6)):
        total = sum(float(steps[1][i, k] * steps[0][k, j]) for k in range(j, i + 1))
        assert float(whole[1, i, j]) == pytest.approx(total, rel=1e-6)


def test_the_bound_follows_the_edited_pattern() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    plain, without = path_sum_bound(model, ids), path_sum_bound(model, ids, sl.ablate_sinks(model, [0]))
    assert float(without[:, 1:, 0].abs().max()) == 0.0
    assert float(plain[:, 1:, 0].min()) > 0
    found = sl.mixing.path_sums(model, ids, sinks=[0], hooks=sl.ablate_sinks(model, [0]), columns=[2], progress=False)
    assert found.looseness().broken.sum() == 0
    valued = sl.ablate_sinks(model, [0], "mean_value", reference=torch.stack(random_rows((20, 20))))
    with pytest.raises(sl.UnsupportedModelError, match="path-sum bound"):
        path_sum_bound(model, ids, valued)


def test_power_iterations_find_the_largest_singular_value() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randn(2, 3, 16, 16, generator=draw)
    assert torch.allclose(spectral_norms(blocks, 400), torch.linalg.matrix_norm(blocks.double(), 2), rtol=1e-3)
    _, model = build_pair("gpt2")
    branch = _Branch(model, 1)
    x = torch.randn(3, model.cfg.d_model, generator=draw)
    for identity in (True, False):
        gains = branch.gains(x, identity=identity)
        for i in range(3):
            whole: Any = torch.autograd.functional.jacobian(lambda v: branch(v[None])[0], x[i])
            whole = whole + float(identity) * torch.eye(model.cfg.d_model)
            assert float(gains[i]) == pytest.approx(float(torch.linalg.matrix_norm(whole, 2)), rel=1e-2)


def test_tables_figures_and_refusals(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH, LENGTH)))
    found = sl.mixing.path_sums(model, ids, sinks=[0], progress=False)
    table = found.to_dataframe()
    assert set(table.column[table.sink]) == {0}
    assert len(set(table.column)) >= 2
    assert found.looseness().broken.sum() == 0
    row = table.to_dict("records")[-1]
    assert row["bound"] == float(found.bounds[1][row["layer"], row["row"], row["column"]])
    broken = sl.mixing.PathSums(table.assign(log10_ratio=-1.0), found.bounds)
    assert broken.looseness().broken.tolist() == broken.looseness().n.tolist()
    assert found.plot().to_json()
    assert found.save(tmp_path / "paths.parquet").is_file()
    with pytest.raises(sl.BadInputError, match="out of range"):
        sl.mixing.path_sums(model, ids, columns=[50], progress=False)
    for name in ("bert", "bloom"):
        with pytest.raises(sl.UnsupportedModelError):
            sl.mixing.path_sums(build_pair(name)[1], ids, progress=False)
