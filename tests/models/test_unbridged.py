"""Models without a bridge: the numbers are those of their own eager attention, and nothing else pretends to work."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from architectures import build as build_bridged
from naive import eager_patterns, naive_scores
from plain_models import IMAGES, REFUSED, TEXT, WINDOW, build, build_pair, picture, stack_of
from public_names import FUNCTIONS, named
from typer.testing import CliRunner
from wording import word_tokenizer

import sinklens as sl
from sinklens.attention.unbridged import NAME, run_stack
from sinklens.cli import app
from sinklens.forward.states import block_inputs, block_outputs

LENGTHS = (60, 41, 52)
CLOSE = {"atol": 2e-6, "rtol": 0, "equal_nan": True}


@pytest.fixture(scope="module")
def distilbert() -> sl.models.PlainModel:
    return build_pair("distilbert")[1]


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def ragged(texts: list[torch.Tensor], side: str) -> sl.Tokens:
    """The rows padded on one side, by hand."""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, row in enumerate(texts):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    labels = tuple(tuple(map(str, row.tolist())) for row in texts)
    return sl.Tokens(ids, mask, labels, tuple("abc"), (0, 1, 2), ~mask)


@pytest.mark.parametrize("name", TEXT)
def test_text_scores_equal_loops_over_eager_patterns_whatever_the_padding(name: str) -> None:
    host, model = build_pair(name)
    facts = model.capabilities
    texts = rows()
    found = {side: sl.sink_scores(model, ragged(texts, side)) for side in ("left", "right")}
    for b, row in enumerate(texts):
        for layer, pattern in enumerate(eager_patterns(stack_of(host), row)):
            alpha, beta, uniform, _ = naive_scores(pattern, facts.causal, facts.windows[layer])
            for scores in found.values():
                torch.testing.assert_close(scores.alpha[b, layer, :, : len(row)].double(), alpha, **CLOSE)
                torch.testing.assert_close(scores.beta[b, layer, :, : len(row)].double(), beta, **CLOSE)
                torch.testing.assert_close(scores.uniform[b, layer, : len(row)].double(), uniform, **CLOSE)
                assert scores.alpha[b, layer, :, len(row) :].isnan().all()


def test_local_and_global_layers_of_modernbert_are_told_apart() -> None:
    _, model = build_pair("modernbert")
    assert model.capabilities.windows == (None, WINDOW, WINDOW)
    assert model.capabilities.windows_proven
    assert not model.capabilities.causal
    assert build_pair("clip-text")[1].capabilities.causal


@pytest.mark.parametrize("name", IMAGES)
def test_image_scores_equal_loops_over_eager_patterns(name: str) -> None:
    host, model = build_pair(name)
    images = sl.load_images(model, [picture(seed=1), picture(seed=2)])
    scores = sl.sink_scores(model, images)
    host.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = stack_of(host)(images.pixels, output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        alpha, beta, uniform, _ = naive_scores(pattern[1].double(), False, None)
        torch.testing.assert_close(scores.alpha[1, layer].double(), alpha, **CLOSE)
        torch.testing.assert_close(scores.beta[1, layer].double(), beta, **CLOSE)
        torch.testing.assert_close(scores.uniform[1, layer].double(), uniform, **CLOSE)


def test_few_positions_are_the_same_numbers() -> None:
    _, model = build_pair("dinov2")
    images = sl.load_images(model, picture())
    whole, some = sl.sink_scores(model, images), sl.sink_scores(model, images, positions=[0, 7])
    assert some.info["kernels"] == ["fused"]
    torch.testing.assert_close(some.alpha[..., [0, 7]], whole.alpha[..., [0, 7]], atol=1e-6, rtol=0)
    assert some.alpha[..., 1:7].isnan().all()


@pytest.mark.parametrize("name", ["distilbert", "dinov2", "clip-text"])
def test_the_residual_methods_read_the_hidden_states_of_transformers(name: str) -> None:
    host, model = build_pair(name)
    images = name in IMAGES
    batch = sl.load_images(model, picture()) if images else ragged(rows((40, 40, 40)), "right")[0]
    with torch.no_grad():
        out = stack_of(host)(
            batch.pixels if isinstance(batch, sl.inputs.Images) else batch.ids, output_hidden_states=True
        )
    states = torch.stack(out.hidden_states)[:, 0]
    torch.testing.assert_close(block_inputs(model, batch), states[:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(block_outputs(model, batch)[:-1], states[1:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(block_outputs(model, batch)[-1], out.last_hidden_state[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["attention", "direction", "wong"])
@pytest.mark.filterwarnings("ignore::sinklens.SinklensWarning")
def test_find_sinks_runs_by_every_method(method: Any, distilbert: sl.models.PlainModel) -> None:
    found = sl.find_sinks(distilbert, ragged(rows((120, 90, 100)), "left"), method=method, activity=0.001)
    assert found.method == method
    assert found.mass.shape == (3, 2, 120)


def test_flash_runs_the_users_own_forward_and_leaves_the_model_as_it_was(distilbert: sl.models.PlainModel) -> None:
    host, ids = distilbert.original_model, rows((30,))[0][None]
    before, attention = host(ids).last_hidden_state, host.config._attn_implementation
    with sl.flash(distilbert) as run, sl.flash(distilbert):
        within = distilbert(ids).last_hidden_state
    assert run.paths == {}  # the inner context ran
    torch.testing.assert_close(within, before, atol=1e-5, rtol=0)
    with sl.flash(distilbert) as run:
        distilbert(ids)
        with pytest.raises(sl.BadInputError, match="cannot run"):
            run_stack(host, {"input_ids": ids + 97})
    assert run.paths == {f"transformer.layer.{i}.attention": "fused" for i in range(2)}
    assert host.config._attn_implementation == attention != NAME
    assert torch.equal(host(ids).last_hidden_state, before)


def test_gradients_and_another_mask_than_the_proven_one_raise(distilbert: sl.models.PlainModel) -> None:
    ids = rows((12,))[0][None]
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with sl.flash(distilbert), torch.no_grad(), pytest.raises(sl.UnsupportedModelError, match="own mask is not"):
        distilbert(ids, attention_mask=causal)
    bias = torch.zeros(1, 1, 12, 12).index_fill(3, torch.tensor([3]), -2.0)
    with sl.flash(distilbert), torch.no_grad(), pytest.raises(sl.UnsupportedModelError, match="adds a bias"):
        distilbert(ids, attention_mask=bias)
    model = build_pair("distilbert")[1]
    model.original_model.requires_grad_(True)
    with sl.flash(model), pytest.raises(sl.UnsupportedModelError, match="no gradients"):
        model(ids)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(sl.UnsupportedModelError, match=REFUSED[name][1]):
        sl.load_model(build(name))


def test_a_layer_whose_eager_attention_is_something_else_is_refused(monkeypatch) -> None:
    """What the registered function computes is compared with the model's own code, not believed."""
    module = inspect.getmodule(type(build("distilbert")))
    honest = module.eager_attention_forward  # type: ignore[union-attr]

    def sharper(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return honest(module, 1.001 * query, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", sharper)
    with pytest.raises(sl.UnsupportedModelError, match="differs by"):
        sl.load_model(build("distilbert"))


def test_a_window_that_the_model_does_not_have_is_refused() -> None:
    model = build("modernbert")
    for layer in model.base_model.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window += 1  # declares one key more than the mask shows
    with pytest.raises(sl.UnsupportedModelError, match="never attends at distances|own mask is not|attends outside"):
        sl.load_model(model)


def test_patches_in_another_order_are_refused(monkeypatch) -> None:
    model = build("dinov2")
    embed = model.embeddings.patch_embeddings
    straight = embed.forward
    monkeypatch.setattr(embed, "forward", lambda pixels: straight(pixels).flip(1))
    with pytest.raises(sl.UnsupportedModelError, match=r"patch \(\d, \d\) reach tokens"):
        sl.load_model(model)


def test_nan_weights_are_named() -> None:
    model = build("dinov2")
    with torch.no_grad():
        model.layernorm.weight[3] = torch.nan
    with pytest.raises(sl.BadInputError, match=r"layernorm\.weight holds 1 NaN"):
        sl.load_model(model)


def test_a_headless_text_model_is_measured_like_the_same_weights_with_a_head() -> None:
    whole: Any = build_bridged("bert")
    plain = sl.load_model(copy.deepcopy(whole.bert))
    assert isinstance(plain, sl.models.PlainModel)
    ids = rows((50, 30, 30))[0]
    bridged = sl.sink_scores(sl.load_model(whole), ids)
    torch.testing.assert_close(sl.sink_scores(plain, ids).alpha, bridged.alpha, atol=1e-6, rtol=0)


def test_a_folder_with_a_tokenizer_loads_and_reads_text(tmp_path: Path) -> None:
    build("distilbert").save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    model = sl.load_model(tmp_path)
    tokens = sl.load_tokens(model, ["the cat sat on the mat", "a dog"])
    assert tokens.labels[0][-1].strip() == "mat"
    assert sl.sink_scores(model, "the cat sat").alpha.shape[-1] == 3
    assert sl.load_tokens(model, "random", n_seqs=2, seq_len=9).ids.shape == (2, 9)
    with pytest.raises(sl.BadInputError, match="without a tokenizer"):
        sl.load_tokens(build_pair("distilbert")[1], ["the cat"])


def test_an_image_folder_loads_with_its_preprocessing(tmp_path: Path) -> None:
    build("dinov2").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    images = sl.load_images(sl.load_model(tmp_path), picture())
    assert images.mean == images.std == (0.5, 0.5, 0.5)


def test_results_say_what_was_measured_and_survive_saving(tmp_path: Path, distilbert: sl.models.PlainModel) -> None:
    scores = sl.sink_scores(distilbert, rows((60,))[0])
    assert scores.info["backend"] == "flash"
    again = sl.SinkScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert sl.find_sinks(distilbert, rows((60,))[0][None], scores=again, activity=0.01).info == again.info
    with pytest.raises(sl.BadInputError, match="another model"):
        sl.find_sinks(build_pair("clip-text")[1], rows((60,))[0][None], scores=again)


def test_the_context_window_and_the_vocabulary_are_checked(distilbert: sl.models.PlainModel) -> None:
    with pytest.raises(sl.BadInputError, match="past the context window"):
        sl.sink_scores(distilbert, torch.ones(1, 129, dtype=torch.long))
    with pytest.raises(sl.BadInputError, match="token id 97 is outside"):
        sl.sink_scores(distilbert, torch.tensor([[5, 97]]))


WORKING = {
    "check_model",
    "compare_contexts",  # counts sinks, nothing else
    "compare_methods",
    "find_sinks",
    "flash",
    "load_tokens",
    "named_tokens",
    "sink_scores",
    "write_report",  # leaves out what a plain model cannot do, and says so
}
ABOUT_IMAGES = {"load_images", "register_tokens"}
ARGUMENTS: dict[str, Any] = {
    "tokens": torch.arange(3, 43)[None],
    "sinks": object.__new__(sl.SinkMap),  # the model is refused before anything reads it
    "text": torch.arange(3, 43)[None],
    "mode": "massive_zero",
    "layer": 0,
    "head": 0,
    "conditions": {},
    "interventions": {},
    "pairs": [(0, 0, 1)],
    "lengths": [8],
    "hooks": [],
    "source": torch.arange(3, 43)[None],
    "kind": "off-by-one",
    "trace": object.__new__(sl.trace.SinkTrace),
}


def test_what_only_counts_sinks_works_too(distilbert: sl.models.PlainModel) -> None:
    ids = rows((100,))[0][None]
    methods = sl.find.compare_methods(distilbert, ids)
    assert methods.method.tolist() == ["attention", "direction", "wong"]
    reader = sl.load_model(build("distilbert"), tokenizer=word_tokenizer(adds_bos=False))
    contexts = sl.find.compare_contexts(reader, contexts=("random", "repeat"), lengths=(64,), n_seqs=2)
    assert contexts.context.tolist() == ["random", "repeat"]


def test_the_command_line_scans_a_folder_without_a_bridge(tmp_path: Path) -> None:
    build("distilbert").save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    options = ["scan", "--model", str(tmp_path), "--context", "random", "--seq-len", "64", "--n-seqs", "2"]
    done = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "scan.html").is_file()


def takes_a_model() -> list[str]:
    found = []
    for name in FUNCTIONS:
        if name.startswith(("lab.", "streaming.")):
            continue  # about models of their own, and a context: tested there
        if next(iter(inspect.signature(named(name)).parameters), "") == "model":
            found.append(name)
    return found


@pytest.mark.parametrize("name", [n for n in takes_a_model() if n.rpartition(".")[2] not in WORKING | ABOUT_IMAGES])
def test_everything_else_refuses_and_says_what_works(name: str, distilbert: sl.models.PlainModel, monkeypatch) -> None:
    """Without the tests' type checks, which users do not run: the functions themselves must notice."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    function = named(name)
    given = {
        key: [0] if key == "sinks" and parameter.annotation != "SinkMap" else ARGUMENTS[key]
        for key, parameter in list(inspect.signature(function).parameters.items())[1:]
        if parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    refusal = "no adapter for DistilBertModel.*sink_scores, find_sinks and flash work on it.*booted with an adapter"
    with pytest.raises(sl.UnsupportedModelError, match=refusal):
        function(distilbert, **given)


def test_functions_of_images_tell_text_models_so(distilbert: sl.models.PlainModel) -> None:
    with pytest.raises(sl.UnsupportedModelError, match="reads text"):
        sl.load_images(distilbert, picture())
    images = sl.load_images(build_pair("dinov2")[1], picture())
    with pytest.raises(sl.UnsupportedModelError, match="reads text"):
        sl.find.register_tokens(distilbert, images)
    with pytest.raises(sl.BadInputError, match="reads text and these are images"):
        sl.sink_scores(distilbert, images)
    bridge = sl.load_model(build_bridged("gpt2"))
    with pytest.raises(sl.BadInputError, match="reads text and these are images"):
        sl.sink_scores(bridge, images)
    with pytest.raises(sl.UnsupportedModelError, match="reads images"):
        sl.find.register_tokens(bridge, images)


def test_hooks_of_a_plain_model_are_asked_for_in_vain(distilbert: sl.models.PlainModel) -> None:
    assert not hasattr(distilbert, "hook_dict")
    with pytest.raises(sl.UnsupportedModelError, match="asked for 'run_with_hooks'"):
        distilbert.run_with_hooks(torch.tensor([[3, 4]]))
    with pytest.raises(sl.UnsupportedModelError, match="backend='hooks' reads hooks"):
        sl.sink_scores(distilbert, torch.arange(3, 43)[None], backend="hooks")
