"""Models larger than memory: blocks on disk give the same bits, and what cannot work says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows
from batches import planted_map
from offloading import BLOCKS, disk_map, offloaded_pair, on_disk, run
from torch import Tensor
from wording import word_tokenizer

import sinklens as sl
from sinklens.bridge.adapters import learned_sink_logits, output_weights, score_projection, value_bias
from sinklens.bridge.offload import input_device, offloaded, real_weights

NAMES = ("llama", "qwen2", "gpt2", "bert", "gpt-oss")


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return offloaded_pair(request.param, tmp_path_factory.mktemp(request.param))


def batch() -> Tensor:
    return torch.stack(random_rows((60, 60)))


def test_blocks_are_on_disk_and_outputs_are_the_same_bits(pair: tuple[Any, Any]) -> None:
    full, off = pair
    assert offloaded(off)
    assert not offloaded(full)
    assert len(on_disk(off)) > 10
    assert on_disk(full) == []
    assert str(off.cfg.device) == "cpu"
    assert sl.models.capabilities(off) == sl.models.capabilities(full)
    before = on_disk(off)
    for flash in (False, True):
        assert torch.equal(run(full, batch(), flash=flash), run(off, batch(), flash=flash))
    assert on_disk(off) == before


def test_scores_sinks_and_statistics_are_the_same_bits(pair: tuple[Any, Any]) -> None:
    full, off = pair
    for way in ("hooks", "flash"):
        a, b = (sl.sink_scores(model, batch(), backend=way) for model in pair)
        assert torch.equal(a.alpha, b.alpha)
        assert torch.equal(a.beta.nan_to_num(), b.beta.nan_to_num())
    a, b = (sl.find_sinks(model, batch(), activity=0.01, uniform_factor=0.5) for model in pair)
    assert a.sinks == b.sinks
    assert len(a) > 0
    tables = [sl.sink_anatomy(model, found).to_dataframe() for model, found in ((full, a), (off, b))]
    assert tables[0].equals(tables[1])
    tables = [sl.heads.attention_statistics(model, batch(), [0], entropy=True).to_dataframe() for model in pair]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("flash", [False, True], ids=["hooks", "flash"])
def test_interventions_are_the_same_bits(pair: tuple[Any, Any], flash: bool) -> None:
    ids = batch()[:, :14]
    causal = sl.models.capabilities(pair[0]).causal
    found: list[list[Tensor]] = []
    for model in pair:
        sinks = planted_map(model, list(ids), {(0, 0): ("primary", range(2)), (1, 3): ("secondary", range(1))})
        edits = [
            sl.ablate_sinks(model, [0, 2], "zero"),
            sl.ablate_sinks(model, sinks),
            sl.ablate_sinks(model, [2], "fixed_key", value="neutral", reference=batch()),
            sl.ablate_sinks(model, [2], "mean_value", reference=batch()),
            sl.patch_bos(model, ids, "zero"),
            *([sl.patch_bos(model, ids, 3, site="v")] if not flash else []),
            *([sl.restrict_attention(model, sinks=2, recent=4)] if causal else []),
            sl.swap_attention(model, "off-by-one"),
            sl.ablate_residual(model, [0], "rescale", g=0.5),
        ]
        found.append([run(model, ids, hooks, flash) for hooks in edits])
    plain = run(pair[0], ids, (), flash)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, plain)


def test_experiments_decompositions_and_sweeps_are_the_same(pair: tuple[Any, Any]) -> None:
    encoder = not sl.models.capabilities(pair[0]).causal
    more: dict[str, Any] = {"mask_id": 7, "most_scored": 4} if encoder else {}
    for way in ("hooks", "flash"):
        a, b = (
            sl.run_experiment(
                model, batch(), {"zero": sl.ablate_sinks(model, [0], "zero")}, backend=way, progress=False, **more
            )
            for model in pair
        )
        for metric in ("loss", "kl", "top1"):
            assert torch.equal(a.metrics[metric].nan_to_num(), b.metrics[metric].nan_to_num())
        assert a.side_effects().equals(b.side_effects())
        assert float(a.change("kl", "zero").min()) > 0
    if sl.models.capabilities(pair[0]).architecture != "LlamaForCausalLM":
        return  # what follows reads weights in ways that do not differ
    a, b = (sl.decompose_sinks(model, batch(), [0], progress=False).to_dataframe() for model in pair)
    assert a.equals(b)
    a, b = (
        sl.sweep_ablation(model, batch()[:, :12], [0], over="layer-head", estimate=True, progress=False)
        for model in pair
    )
    assert a.to_dataframe().equals(b.to_dataframe())


def test_weights_that_are_read_are_the_real_ones(pair: tuple[Any, Any]) -> None:
    full, off = pair
    n = sl.models.capabilities(full).n_heads
    readers: list[Any] = [
        lambda m: value_bias(m, 1, n),
        lambda m: output_weights(m, 1),
        lambda m: score_projection(m, 1, "k")[0],
        lambda m: score_projection(m, 1, "q")[1],
        lambda m: learned_sink_logits(m, 1),
    ]
    for reader in readers:
        a, b = reader(full), reader(off)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    before = on_disk(off)
    with real_weights(off.blocks[1]), real_weights(off.blocks[1]):
        assert not any(weight.is_meta for weight in off.blocks[1].parameters())
    assert on_disk(off) == before


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_exception_in_the_middle_of_a_forward_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    """BERT delegates attention: its edited call replaces a forward that accelerate has replaced before."""
    full, off = offloaded_pair(name, tmp_path)
    ids, before = batch(), on_disk(off)
    own = [block.attn.original_component.__dict__.get("forward") for block in off.blocks]
    assert all(forward is not None for forward in own)

    def fail(tensor: Tensor, hook: Any) -> None:
        raise KeyError(hook.name)

    for point in ("attn.q.hook_out", "attn.hook_in", "attn.hook_pattern", "mlp.hook_out"):
        for model_hooks in ([], sl.ablate_sinks(off, [0], "zero")):
            with pytest.raises(KeyError):
                run(off, ids, [*model_hooks, (f"blocks.1.{point}", fail)])
            if point != "attn.hook_pattern":
                with pytest.raises(KeyError):
                    run(off, ids, [*model_hooks, (f"blocks.1.{point}", fail)], flash=True)
    assert on_disk(off) == before
    assert torch.equal(run(off, ids), run(full, ids))
    edit = [sl.ablate_sinks(model, [0], "zero") for model in (full, off)]
    assert torch.equal(run(full, ids, edit[0]), run(off, ids, edit[1]))
    assert [block.attn.original_component.__dict__.get("forward") for block in off.blocks] == own


def test_bfloat16_on_disk_is_bfloat16_in_memory(tmp_path: Path) -> None:
    full, off = offloaded_pair("llama", tmp_path, dtype="bfloat16")
    assert next(full.original_model.parameters()).dtype == torch.bfloat16
    assert len(on_disk(off)) == 18
    edits = [sl.ablate_sinks(model, [0], "zero") for model in (full, off)]
    for flash in (False, True):
        assert torch.equal(run(full, batch(), edits[0], flash), run(off, batch(), edits[1], flash))
    a, b = (sl.sink_scores(model, batch()).alpha for model in (full, off))
    assert torch.equal(a, b)
    calls: tuple[Any, ...] = (
        lambda: sl.decompose_sinks(full, batch(), [0]),
        lambda: sl.trace_sinks(full, batch()),
        lambda: sl.mixing.path_sums(full, batch()[:, :8], sinks=[0], progress=False),
    )
    for call in calls:
        with pytest.raises(sl.UnsupportedModelError, match=r"takes float32 or float64"):
            call()


def test_the_embedding_may_be_on_disk_too(tmp_path: Path) -> None:
    full, _ = offloaded_pair("llama", tmp_path)
    found = {**disk_map(build("llama"), BLOCKS["llama"]), "model.embed_tokens": "disk", "model.layers.1": "cpu"}
    off = sl.load_model(tmp_path, device_map=found)
    assert any("embed" in name for name in on_disk(off))
    assert str(off.cfg.device) == "cpu" == str(input_device(off.original_model))
    assert torch.equal(run(full, batch()), run(off, batch()))
    assert torch.equal(sl.sink_scores(full, batch()).alpha, sl.sink_scores(off, batch()).alpha)


def test_nan_on_disk_is_found_and_named(tmp_path: Path) -> None:
    plain = build("llama")
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    plain.save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    with pytest.raises(sl.BadInputError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        sl.load_model(tmp_path, device_map=disk_map(plain, BLOCKS["llama"]))


def test_what_cannot_work_offloaded_is_refused(tmp_path: Path) -> None:
    _, off = offloaded_pair("llama", tmp_path)
    ids = batch()[:1, :12]
    for call in (
        lambda: sl.measure_mixing(off, ids, sinks=[0], progress=False),
        lambda: sl.mixing.path_sums(off, ids, progress=False),
        lambda: sl.mixing.jacobian_norms(off, ids, [(0, 3, 0)]),
    ):
        with pytest.raises(sl.UnsupportedModelError, match="needs all weights in memory"):
            call()
    bare = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(sl.UnsupportedModelError, match="nothing brings its values"), real_weights(bare):
        pass


def test_bad_options_say_what_to_do(tmp_path: Path) -> None:
    offloaded_pair("llama", tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "bf17"}, "dtype must be one of float32, bfloat16"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": torch.int64}, "dtype must be one of"),
        ({"max_memory": {"cpu": "1MB"}}, "go with device_map="),
        ({"offload_folder": tmp_path}, "go with device_map="),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"device_map": {"": "disk"}}, "everything on disk"),
        ({"device_map": {"model.layers.0": "disk", "model.layers.1": "cpu"}}, "cannot load"),
    ]
    for options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.load_model(tmp_path, **options)
    with pytest.raises(sl.BadInputError, match="for models loaded by name"):
        sl.load_model(build("llama"), offload_folder=tmp_path)
    assert sl.load_model(tmp_path, dtype="torch.float16").cfg.dtype == torch.float16


def test_an_automatic_map_within_a_memory_limit(tmp_path: Path) -> None:
    full, _ = offloaded_pair("llama", tmp_path)
    size = sum(p.numel() * 4 for p in full.original_model.parameters())
    off = sl.load_model(
        tmp_path, device_map="auto", max_memory={"cpu": int(0.75 * size)}, offload_folder=tmp_path / "auto"
    )
    assert on_disk(off)
    assert torch.equal(run(full, batch()), run(off, batch()))
    everything = sl.load_model(tmp_path, device_map="auto")
    assert on_disk(everything) == []
    assert torch.equal(run(full, batch()), run(everything, batch()))


def test_a_model_object_that_is_dispatched_already_is_taken(tmp_path: Path) -> None:
    import transformers as tf

    full, _ = offloaded_pair("gpt2", tmp_path)
    mapped = disk_map(build("gpt2"), BLOCKS["gpt2"])
    hf = tf.GPT2LMHeadModel.from_pretrained(tmp_path, device_map=mapped)
    off = sl.load_model(hf)
    assert on_disk(off)
    assert torch.equal(run(full, batch()), run(off, batch()))


def test_the_edited_call_of_a_delegating_host_keeps_a_forward_that_was_there() -> None:
    _, model = build_pair("opt")
    component = model.blocks[0].attn.original_component
    plain = type(component).forward
    calls: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(component, *args, **kwargs)

    ids = batch()[:, :10]
    hooks = sl.ablate_sinks(model, [0], "zero")
    expected = run(model, ids, hooks)
    component.__dict__["forward"] = own
    assert torch.equal(run(model, ids, hooks), expected)
    assert calls == [1]
    both = [*hooks, *sl.ablate_sinks(model, [2])]
    run(model, ids, both)
    assert calls == [1, 1]
    assert component.__dict__["forward"] is own
