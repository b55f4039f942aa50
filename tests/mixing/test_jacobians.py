"""Jacobian norms against autograd's dense Jacobian, differences, and simulated probes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows

import sinklens as sl
from sinklens.bridge.adapters import original
from sinklens.bridge.torch_globals import PlainAttention
from sinklens.mixing.jacobians import (
    Stream,
    chi_square_interval,
    exact_block,
    exact_columns,
    probed_squares,
    probed_squares_reverse,
    probes,
    spectral_norm,
)

LENGTH = 7


def dense(stream: Stream) -> torch.Tensor:
    """[layer, i, out, j, in], by reverse mode."""
    found: Any = torch.autograd.functional.jacobian(stream, stream.start, vectorize=True)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma3", "neox", "phi3", "falcon", "bert", "opt", "olmo2"])
def test_blocks_and_probed_norms_are_those_of_the_dense_jacobian(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    stream = Stream(model, ids)
    whole = dense(stream)
    scale = float(whole.abs().max())
    assert (exact_block(stream, 2) - whole[:, :, :, 2]).abs().max() < 1e-5 * scale
    columns = exact_columns(stream, [2, 1], chunk=5)
    for n, j in enumerate((2, 1)):
        naive = whole[:, :, :, j].double().square().sum((2, 3))
        assert (columns[..., n] - naive).abs().max() < 1e-5 * float(naive.max())
    squares = probed_squares(stream, [0, 2], count=3, chunk=2)
    for n, j in enumerate((0, 2)):
        naive = torch.einsum("lioe,pe->plio", whole[:, :, :, j], probes(j, 3, whole.shape[-1])).square().sum(-1)
        assert (squares[..., n] - naive).abs().max() < 1e-4 * float(naive.max())
    top = torch.linalg.matrix_norm(whole[1, 5, :, 2], 2)
    assert spectral_norm(stream, 1, 5, 2, steps=300, tolerance=1e-9) == pytest.approx(float(top), rel=1e-3)
    if sl.models.capabilities(model).causal:
        assert float(squares[:, :, :2, 1].abs().max()) == 0.0  # nothing before a token depends on it


@pytest.mark.parametrize("mode", ["renormalize", "zero", "mean_value"])
def test_edited_models_have_the_jacobian_of_the_edited_model(mode: Any) -> None:
    model = sl.load_model(build("gpt2").double())
    ids = torch.stack(random_rows((LENGTH,)))
    options: dict[str, Any] = {"reference": torch.stack(random_rows((20, 20)))} if mode == "mean_value" else {}
    hooks = sl.ablate_sinks(model, [0], mode, **options)
    stream = Stream(model, ids, hooks)
    block = exact_block(stream, 3)
    eps = 1e-4
    for out in (0, 7):
        tangent = torch.zeros_like(stream.start)
        tangent[3, out] = eps
        with torch.no_grad():
            central = (stream(stream.start + tangent) - stream(stream.start - tangent)) / (2 * eps)
        assert (block[..., out] - central).abs().max() < 1e-3
    assert (exact_block(Stream(model, ids), 3) - block).abs().max() > 1e-2


def test_reverse_and_forward_routes_estimate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = build_pair("llama")
    stream = Stream(model, torch.stack(random_rows((LENGTH,))))
    forward = probed_squares(stream, list(range(LENGTH)), count=400, chunk=200).mean(0)
    reverse = probed_squares_reverse(stream, [1], [4, 6], count=400).mean(0)
    exact = dense(stream).square().sum((2, 4))
    for n, i in enumerate((4, 6)):
        assert torch.allclose(reverse[0, n], exact[1, i].double(), rtol=0.25)
        assert torch.allclose(forward[1, i], exact[1, i].double(), rtol=0.25)


def test_hosts_without_forward_mode_are_named_and_go_backwards() -> None:
    _, model = build_pair("gpt-oss")
    stream = Stream(model, torch.stack(random_rows((LENGTH,))))
    with pytest.raises(sl.UnsupportedModelError, match="reverse"):
        probed_squares(stream, [1], count=1)
    w = torch.eye(stream.start.shape[1])
    block = stream.pulled(1, 5, w)[:, 2]
    eps = 1e-2
    tangent = torch.zeros_like(stream.start)
    tangent[2, 4] = eps
    with torch.no_grad():
        central = (stream(stream.start + tangent) - stream(stream.start - tangent))[1, 5] / (2 * eps)
    assert (block[:, 4] - central).abs().max() < 0.05 * float(block.abs().max())


def test_frozen_attention_is_linear_in_the_values() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    live, frozen = (Stream(model, ids, frozen_attention=f) for f in (False, True))
    assert torch.allclose(live.outputs, frozen.outputs, atol=1e-5)
    assert (exact_block(live, 2) - exact_block(frozen, 2)).abs().max() > 1e-2
    shown: list[torch.Tensor] = []
    model.run_with_hooks(
        ids, fwd_hooks=[*frozen.hooks, ("blocks.1.attn.hook_pattern", lambda t, hook: shown.append(t.detach()))]
    )
    moved = frozen.start + torch.randn(frozen.start.shape, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    last: Any = ("blocks.1.attn.hook_pattern", lambda t, hook: seen.append(t.detach()))
    frozen.hooks.append(last)
    with torch.no_grad():
        frozen(moved)
    assert torch.equal(seen[0], shown[0])
    with pytest.raises(sl.UnsupportedModelError, match="frozen"):
        Stream(build_pair("opt")[1], ids, frozen_attention=True)
    with pytest.raises(sl.BadInputError, match="out of range"):
        Stream(model, ids, layer=9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "neox", "falcon", "olmo2", "bert", "opt"])
def test_frozen_norms_are_affine(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    live, frozen = (Stream(model, ids, frozen_norms=f) for f in (False, True))
    assert torch.allclose(live.outputs, frozen.outputs, atol=1e-4)
    assert (exact_block(live, 2) - exact_block(frozen, 2)).abs().max() > 1e-4
    norms = sorted({n.rsplit(".", 1)[0] for n, _ in frozen.hooks})
    present = [n for n in ("ln1", "ln1_post", "ln2", "ln2_post") if f"blocks.1.{n}.hook_out" in model.hook_dict]
    assert [n for n in norms if n.startswith("blocks.1.")] == [f"blocks.1.{n}" for n in present]
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        seen.setdefault(hook.name, []).append(tensor.detach().clone())

    frozen.hooks += [(f"{n}.hook_{end}", keep) for n in norms for end in ("in", "out")]
    with torch.no_grad():
        frozen(frozen.start)
        frozen(torch.randn(frozen.start.shape, generator=torch.Generator().manual_seed(0)))
    for norm in norms:  # the module's own output, with the first run's scale in the place of its own
        (x0, x1), y1 = seen[f"{norm}.hook_in"], seen[f"{norm}.hook_out"][1]
        module: Any = original(model.get_submodule(norm))
        centred = isinstance(module, torch.nn.LayerNorm)
        bias = module.bias if centred else torch.zeros(x0.shape[-1])
        scales = [x.std(-1, correction=0) if centred else x.square().mean(-1).sqrt() for x in (x0, x1)]
        with torch.no_grad():
            expected = (module(x1) - bias) * (scales[1] / scales[0])[..., None] + bias
        assert (y1 - expected).abs().max() < 1e-3 * float(expected.abs().max()), norm


def test_later_layers_can_be_the_input() -> None:
    _, model = build_pair("gpt2")
    stream = Stream(model, torch.stack(random_rows((LENGTH,))), layer=1)
    assert stream.outputs.shape[0] == model.cfg.n_layers - 1
    whole = dense(stream)
    assert (exact_block(stream, 4) - whole[:, :, :, 4]).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_intervals_cover_at_their_rate(rank: int) -> None:
    """2000 simulated maps of known stable rank, 16 probes each."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.ones(rank, dtype=torch.float64)
    squares = (torch.randn(16, 2000, rank, generator=draw, dtype=torch.float64).square() * weights).sum(-1)
    low, high = chi_square_interval(squares)
    covered = ((low <= rank) & (rank <= high)).double().mean()
    assert 0.93 <= float(covered) <= 0.98


def test_kernels_without_derivatives_are_left_out_in_this_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def kernel() -> str:
        return str(torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn)

    def elsewhere() -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(kernel).result()

    fused = kernel()
    assert "FlashAttention" in fused
    _, model = build_pair("llama")
    stream = Stream(model, torch.stack(random_rows((LENGTH,))))
    inside = []
    called = Stream.__call__

    def watched(self: Stream, start: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            inside.append(("FlashAttention" in kernel(), "FlashAttention" in elsewhere()))
        return called(self, start)

    monkeypatch.setattr(Stream, "__call__", watched)
    probed_squares(stream, [1], count=2)
    stream.pulled(1, 3, torch.eye(stream.start.shape[1])[:1])
    assert set(inside) == {(False, True)}
    assert "FlashAttention" in kernel()

    def broken(self: Stream, start: torch.Tensor) -> torch.Tensor:
        raise ValueError("stop")

    monkeypatch.setattr(Stream, "__call__", broken)
    with pytest.raises(ValueError, match="stop"):
        probed_squares(stream, [1], count=2)
    assert "FlashAttention" in kernel()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_attention_with_derivatives_is_torchs_own_without_fused_kernels(mask: str, grouped: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 6, 8, generator=draw), torch.randn(2, 2 if grouped else 4, 6, 8, generator=draw)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    given = {"bool": seen, "added": torch.randn(6, 6, generator=draw)}.get(mask)
    options: Any = {"attn_mask": given, "is_causal": mask == "causal", "scale": 0.3, "enable_gqa": grouped}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, k, **options)
    with PlainAttention():
        ours = torch.nn.functional.scaled_dot_product_attention(q, k, k, **options)
    assert torch.equal(ours, theirs)
