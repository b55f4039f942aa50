"""Every architecture x every public function: exact by its formula or refused, as written down here and in the docs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import architecture_table
import jaxtyping
import plain_models
import pytest
import torch
from architecture_table import NAMES, TABLE
from architectures import build_pair
from public_names import FUNCTIONS, named

import sinklens as sl
from sinklens.check import check as self_test
from sinklens.check.check import CHECKS

_FORWARD_MODE = {"jacobian_norms", "path_sums"}  # mixtures of experts and Bloom have no forward-mode derivative
_ENCODER = {"sweep_ablation", "trace_sinks", "plant_sinks", "writer_subspace", "path_sums"}
_OF_IMAGES = {"load_images", "register_tokens"}
_PLAIN = set(CHECKS) - {
    "load_model", "load_tokens", "named_tokens", "sink_scores", "find_sinks", "compare_methods", "compare_contexts",
    "flash",
}  # fmt: skip
_IMAGES = (_PLAIN | {"load_tokens", "named_tokens", "compare_contexts"}) - _OF_IMAGES
REFUSED: dict[str, set[str]] = {
    "falcon": {"flash"},
    "opt": {"writer_subspace", "path_sums"},
    "bloom": {"flash", "writer_neurons", "writer_subspace", *_FORWARD_MODE},
    "mixtral": {"writer_neurons", *_FORWARD_MODE},
    "gpt-oss": {"writer_neurons", *_FORWARD_MODE},
    "deepseek-v3": {"decompose_sinks", "writer_neurons", *_FORWARD_MODE},
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "gpt-neo": {
        "flash", "ablate_sinks", "swap_attention", "restrict_attention", "run_experiment", "sweep_ablation",
        "compare_mixing", "mixing_conditions", "path_sums", "perturbation_spread",
    },
    "modernbert": _PLAIN,
    "distilbert": _PLAIN,
    "vit": _IMAGES,
    "dinov2": _IMAGES,
}  # fmt: skip
PARTLY: dict[str, dict[str, set[str]]] = {
    "neox": {"ablate_sinks": {"fixed_key"}},
    "phi3": {"ablate_sinks": {"fixed_key"}},
    "falcon": {"ablate_sinks": {"fixed_key"}},
    "opt": {"attention_map": {"logits"}},
    "bloom": {"measure_mixing": {"blocks and indices"}, "compare_mixing": {"blocks"}},
    "mixtral": {"measure_mixing": {"blocks and indices"}, "compare_mixing": {"blocks"}},
    "gpt-oss": {"measure_mixing": {"blocks and indices"}, "compare_mixing": {"blocks"}},
    "deepseek-v3": {
        "ablate_sinks": {"fixed_key"}, "measure_mixing": {"blocks and indices"}, "compare_mixing": {"blocks"},
    },
    "bert": {"attention_map": {"logits"}, "mixing_conditions": {"losses"}},
    "roberta": {"attention_map": {"logits"}, "mixing_conditions": {"losses"}},
    "gpt-neo": {"attention_map": {"logits"}},
}  # fmt: skip


WITHOUT_BRIDGE = ("vit", "modernbert", "distilbert", "dinov2")


@pytest.mark.parametrize("name", NAMES)
def test_every_function_is_exact_or_refused_as_expected(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not run it: functions must notice
    model = (plain_models.build_pair if name in WITHOUT_BRIDGE else build_pair)(name)[1]
    found = sl.check_model(model, mask_id=5 if name in ("bert", "roberta") else None, progress=False)
    request.config.stash.setdefault(TABLE, {})[name] = found
    assert found.tolerance == 1e-3
    refused = REFUSED.get(name, set()) | (set() if name in ("vit", "dinov2") else _OF_IMAGES)
    outcomes = {row.function: row.outcome for row in found.rows}
    assert outcomes == {f: "refused" if f in refused else "exact" for f in CHECKS}, repr(found)
    partly = {row.function: set(row.refused) for row in found.rows if row.outcome == "exact" and row.refused}
    assert partly == PARTLY.get(name, {})
    for row in found.rows:
        assert row.outcome == "refused" or all(error <= 1e-4 for error in row.errors.values()), row
        assert all(len(why) > 20 for why in row.refused.values()), row
    if not request.config.getoption("--architectures-table"):
        written = architecture_table.read()
        cells = {function: architecture_table.mark(found, function) for function in CHECKS}
        assert written[name] == cells, "docs/architectures.md is out of date: make architectures"


def test_no_public_function_that_runs_a_model_is_left_out() -> None:
    taking = set()
    for name in FUNCTIONS:
        if not name.startswith(("streaming.", "lab.")) and "model" in inspect.signature(named(name)).parameters:
            taking.add(name.rpartition(".")[2])
    # These call functions that are checked here, choose texts themselves, and leave out what a model refuses; a twin
    # runs nothing.
    composed = {"reproduce", "untrained_twin", "write_report"}
    assert taking - {"check_model"} - composed == set(CHECKS) - {"load_model"}
    assert set(self_test.WITHOUT_BRIDGE) | set(self_test.IMAGES) <= set(CHECKS)


def _alpha(means: Any) -> Any:
    return dataclasses.replace(means, alpha=means.alpha * 1.01)


def _pair(pair: Any) -> Any:
    known = {f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)}
    return dataclasses.replace(pair, **{k: v * 1.01 for k, v in known.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize(
    ("home", "broken", "off", "function"),
    [
        ("find.scores", "column_means", _alpha, "sink_scores"),
        ("mixing.collapse", "collapse_measures", lambda values: values * 1.01, "measure_collapse"),
        ("mixing.perturbation", "swap_changes", lambda pair: (pair[0] * 1.01, pair[1]), "perturbation_spread"),
        ("ablate.sink_edit", "pair", _pair, "ablate_sinks"),
        ("heads.activity", "by_head", lambda values: values * 1.01, "head_activity"),
        (
            "heads.maps",
            "collect",
            lambda seen: {name: values * 0.99 for name, values in seen.items()},
            "attention_view",
        ),
        ("mixing.conditions", "token_loss", lambda losses: losses * 1.01, "mixing_conditions"),
        ("mixing.mixing", "exact_columns", lambda values: values * 1.01, "measure_mixing"),
    ],
)
def test_one_per_cent_off_is_called_wrong(
    monkeypatch: pytest.MonkeyPatch, home: str, broken: str, off: Any, function: str
) -> None:
    module = importlib.import_module(f"sinklens.{home}")
    right = getattr(module, broken)
    monkeypatch.setattr(module, broken, lambda *args, **kwargs: off(right(*args, **kwargs)))
    _, model = build_pair("llama")
    found = sl.check_model(model, functions=[function], progress=False)
    assert found[function].outcome == "wrong"
    assert 1e-3 < found[function].error < 1
    assert not found.ok


def test_an_error_that_is_no_refusal_is_called_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sinklens.check.edit_checks as edits

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(edits, "patch_bos", broken)
    _, model = build_pair("gpt2")
    found = sl.check_model(model, functions=["patch_bos", "flash"], progress=False)
    assert (found["patch_bos"].outcome, found["flash"].outcome) == ("failed", "exact")
    assert "TypeError: unexpected" in found["patch_bos"].reason
    assert "1 exact, 1 failed" in repr(found)


def test_a_tokenizer_that_knows_no_word_does_not_make_the_texts_too_dull_to_check() -> None:
    from wording import model_with

    functions = ["ablate_sinks", "perturbation_spread", "writer_subspace"]
    found = sl.check_model(model_with(adds_bos=True), functions=functions, progress=False)
    assert [row.outcome for row in found.rows] == ["exact"] * 3, repr(found)


def test_tables_files_and_bad_requests(tmp_path: Any) -> None:
    _, model = build_pair("opt")
    found = sl.check_model(model, functions=["attention_map", "path_sums"], progress=False)
    rows = found.to_dataframe().to_dict("records")
    assert [(r["function"], r["part"]) for r in rows[:2]] == [("attention_map", p) for p in ("probabilities", "logits")]
    assert rows[-1]["outcome"] == "refused"
    assert "path-sum bound" in rows[-1]["reason"]
    assert found.save(tmp_path / "check.csv").read_text().count("attention_map") == 2
    with pytest.raises(sl.BadInputError, match="no check of nonsense"):
        sl.check_model(model, functions=["nonsense"])
    with pytest.raises(sl.BadInputError, match="four sequences"):
        sl.check_model(model, torch.randint(3, 90, (3, 60)))
    with pytest.raises(sl.BadInputError, match="was not checked"):
        found["flash"]
