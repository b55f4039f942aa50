"""Training in the lab: it resumes exactly, and on the toy task sinks come and go as the field says, or do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lab_configs import SHORT
from typer.testing import CliRunner

import sinklens as sl
from sinklens.cli import app
from sinklens.lab import (
    LabConfig,
    LabModel,
    LabRun,
    ModelConfig,
    Recall,
    Study,
    Text,
    TrainConfig,
    compare,
    load_lab_model,
    load_runs,
    read_study,
    run_study,
    save_lab_model,
    studies,
    train,
)
from sinklens.lab.schedule import TrainConfig as Schedule
from sinklens.lab.training import CHECKPOINT, Steps, Training, evaluation_batch


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let training die after so many steps, as a killed process does: nothing of it runs any more."""
    advance, left = Training.advance, [steps]

    def counting(self: Training, batch: Any) -> None:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        advance(self, batch)

    monkeypatch.setattr(Training, "advance", counting)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole = train(SHORT, 1)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped):
            train(SHORT, 1, tmp_path)
    assert (tmp_path / CHECKPOINT).is_file() == (steps >= 2)
    resumed = train(SHORT, 1, tmp_path)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert whole.rows == resumed.rows
    assert [row["step"] for row in whole.rows if row["head"] == -1] == [0, 3, 6, 9]


def test_a_checkpoint_of_another_run_or_half_of_one_is_refused(tmp_path: Path) -> None:
    train(SHORT, 1, tmp_path)
    with pytest.raises(sl.BadInputError, match="another configuration"):
        train(SHORT, 2, tmp_path)
    with pytest.raises(sl.BadInputError, match="another configuration"):
        train(replace(SHORT, train=replace(SHORT.train, lr=1e-3)), 1, tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sl.BadInputError, match="complete safetensors"):
        train(SHORT, 1, tmp_path)


def test_seeds_of_data_and_weights_are_separate() -> None:
    other_data = replace(SHORT, train=replace(SHORT.train, data_seed=5))
    other_weights = replace(SHORT, train=replace(SHORT.train, init_seed=5))
    first = [Training(config, 0) for config in (SHORT, other_data, other_weights)]
    weights = [run.model.tok_embed.weight for run in first]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    batches = [Steps(config, 0)[0].ids for config in (SHORT, other_data, other_weights)]
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(evaluation_batch(SHORT).ids, evaluation_batch(other_data).ids)


def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    one = Training(replace(SHORT, task=Recall(seq_len=24), train=replace(SHORT.train, batch_size=8)), 0)
    two = Training(replace(SHORT, task=Recall(seq_len=24), train=replace(SHORT.train, batch_size=4, accumulate=2)), 0)
    batch = Steps(one.config, 0)[0]
    one.advance(batch)
    two.advance(batch)
    for a, b in zip(one.parameters, two.parameters, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_schedule_rises_and_falls() -> None:
    config = Schedule(steps=300, warmup=50, lr=3e-3, final_lr=0.1)
    rates = [config.rate(step) for step in range(301)]
    assert rates[0] == pytest.approx(3e-3 / 50)
    assert rates[49] == rates[50] == pytest.approx(3e-3)
    assert rates[175] == pytest.approx(3e-3 * 0.55)
    assert rates[300] == pytest.approx(3e-4)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_training_that_diverges_says_so() -> None:
    wild = replace(SHORT, train=replace(SHORT.train, lr=1e30, warmup=0, steps=30))
    with pytest.raises(sl.SinklensError, match="lower lr"):
        train(wild, 0)


def test_bfloat16_and_workers_train_the_same_task() -> None:
    half = replace(SHORT, train=replace(SHORT.train, dtype="bfloat16", workers=1))
    run = train(half, 0)
    plain = train(SHORT, 0)
    assert run.model.tok_embed.weight.dtype == torch.float32
    assert run.rows[-3]["loss"] == pytest.approx(plain.rows[-3]["loss"], abs=0.1)


def test_text_is_learned() -> None:
    config = LabConfig("text", ModelConfig(position="rope"), Text(seq_len=64),
                       TrainConfig(steps=40, batch_size=8, warmup=5, evaluate_every=40, evaluation_size=8))  # fmt: skip
    rows = [row["loss"] for row in train(config, 0).rows if row["head"] == -1]
    assert 5.4 < rows[0] < 6.5  # log 257 is 5.55
    assert rows[-1] < 3.6


def test_lab_models_are_kept_and_read_whole(tmp_path: Path) -> None:
    model = LabModel(SHORT.fitted(), seed=4)
    path = save_lab_model(model, SHORT, 4, tmp_path / "model.safetensors")
    ids = evaluation_batch(SHORT).ids
    assert torch.allclose(load_lab_model(path)(ids), model(ids), atol=1e-5)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(sl.BadInputError, match="complete safetensors"):
        load_lab_model(path)


def test_an_untrained_twin_has_other_weights_of_the_same_shape(tmp_path: Path) -> None:
    bridge = load_lab_model(save_lab_model(LabModel(SHORT.fitted(), 4), SHORT, 4, tmp_path / "model.safetensors"))
    from sinklens.models.load import untrained_twin

    twin = untrained_twin(bridge, seed=7)
    assert sl.models.capabilities(twin) == sl.models.capabilities(bridge)
    ids = evaluation_batch(SHORT).ids
    assert not torch.allclose(twin(ids), bridge(ids), atol=1e-3)


# --- what sinks do on the toy task, one seed (docs/findings/lab.md has three)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LabRun]:
    """Settings P and B, the value drain and two layers of two heads, on seed 0."""
    operations, bos, mechanisms = read_study("operations"), read_study("bos"), read_study("mechanisms")
    wanted = {"softmax", "sigmoid", "kv_bias", "fixed BOS", "value drain", "two layers of two heads"}
    variants = [v for study in (operations, bos, mechanisms) for v in study.variants if v.name in wanted]
    runs = run_study(Study("targets", tuple(variants), (0,)), tmp_path_factory.mktemp("lab"), analysis=False)
    return {run.config.name: run for run in runs}


def test_softmax_grows_a_sink_on_the_first_token(trained: dict[str, LabRun]) -> None:
    last = trained["softmax"].last
    assert last["relative_sink"] > 0.9
    assert last["loss"] < last["floor"] + 0.05


def test_sigmoid_has_no_sink_at_the_same_loss(trained: dict[str, LabRun]) -> None:
    last = trained["sigmoid"].last
    assert last["relative_sink"] < 0.05
    assert last["row_sum"] > 3  # so raw weights would say nothing
    assert abs(last["loss"] - trained["softmax"].last["loss"]) < 0.02


def test_a_kv_bias_takes_the_sink_at_no_worse_loss(trained: dict[str, LabRun]) -> None:
    last = trained["kv_bias"].last
    assert last["sink"] < 0.1
    assert last["slot_sink"] > 0.9
    assert last["loss"] < trained["softmax"].last["loss"] + 0.01


def test_without_its_bos_a_model_that_always_had_one_breaks(trained: dict[str, LabRun]) -> None:
    fixed, free = trained["fixed BOS"].dropped, trained["softmax"].dropped
    assert fixed["loss_without"] - fixed["loss_with"] > 1
    assert fixed["relative_sink_with"] > 0.9
    assert fixed["relative_sink_without"] < 0.1
    assert abs(free["loss_without"] - free["loss_with"]) < 0.05
    assert free["relative_sink_without"] > 0.9  # it grows again, on the new first token


def costs(run: LabRun) -> dict[str, float]:
    """Loss added by each edit of the first token."""
    model, ids = run.model(), run.batch().ids[:16]
    base = float(sl.token_loss(model, ids).nanmean())
    edits = {mode: sl.ablate_sinks(model, [0], mode) for mode in ("zero", "value_only", "renormalize")}
    return {mode: float(sl.token_loss(model, ids, hooks=hooks).nanmean()) - base for mode, hooks in edits.items()}


def test_one_sink_writes_and_another_only_takes(trained: dict[str, LabRun]) -> None:
    writes, takes = costs(trained["softmax"]), costs(trained["value drain"])
    assert trained["value drain"].last["value_ratio"] < 0.2 < 1 < trained["softmax"].last["value_ratio"]
    assert trained["value drain"].last["sink"] > 0.9
    assert writes["renormalize"] > 1
    assert takes["renormalize"] > 1
    assert writes["value_only"] < 0.05  # what it writes is enough
    assert takes["value_only"] > 1  # what it writes is nothing
    assert max(writes["zero"], takes["zero"]) < 0.2  # the share that it takes is enough in both


def test_in_a_deeper_model_one_head_has_the_sink_and_others_work(trained: dict[str, LabRun]) -> None:
    heads = trained["two layers of two heads"].heads()
    assert len(heads) == 4
    assert heads["sink"].max() > 0.9
    assert heads["sink"].min() < 0.1


def test_the_emergence_figure_shows_the_sink_come_with_training(trained: dict[str, LabRun]) -> None:
    found = compare([trained["softmax"], trained["sigmoid"]])
    table = found.emergence()
    softmax = pd.DataFrame(table[table["variant"] == "softmax"]).set_index("step")["sink"]
    assert float(softmax.loc[0]) == 0.0
    assert float(softmax.loc[300]) > 0.9
    lines: Any = found.plot().data
    assert {trace.name for trace in lines if trace.showlegend} == {"softmax", "sigmoid"}
    marks: Any = found.plot("sinks").data
    assert len(marks) == 3


# --- studies and the command line

TINY = """
name: tiny
seeds: [0, 1]
task: {name: Backcopy, seq_len: 48}
model: {d_model: 16}
train: {steps: 6, batch_size: 4, warmup: 2, evaluate_every: 3, evaluation_size: 16}
variants:
  softmax: {}
  sigmoid: {model: {attention: sigmoid}}
"""


def test_the_command_line_runs_a_study_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "out"
    runner = CliRunner()
    first = runner.invoke(app, ["lab", "run", str(tmp_path / "tiny.yaml"), "--out", str(out)])
    assert first.exit_code == 0, first.output
    runs = load_runs(out)
    assert [(run.config.name, run.seed) for run in runs] == [
        ("sigmoid", 0),
        ("sigmoid", 1),
        ("softmax", 0),
        ("softmax", 1),
    ]
    assert set(runs[2].analysis) >= {"losses", "square", "mixing", "refused"}
    assert "not a softmax" in runs[0].analysis["refused"]["losses"]
    written = {path.name for path in (out / "tiny").iterdir()}
    assert written >= {"lab.html", "runs.csv", "operations.csv", "bos.csv", "manifest.json", "emergence.csv"}
    before = (out / "tiny" / "softmax" / "seed-0" / "result.json").stat().st_mtime_ns
    assert runner.invoke(app, ["lab", "run", str(tmp_path / "tiny.yaml"), "--out", str(out)]).exit_code == 0
    assert (out / "tiny" / "softmax" / "seed-0" / "result.json").stat().st_mtime_ns == before
    compared = runner.invoke(app, ["lab", "compare", str(out), "--out", str(tmp_path / "page")])
    assert compared.exit_code == 0, compared.output
    table = pd.read_csv(tmp_path / "page" / "operations.csv")
    assert list(table["variant"]) == ["sigmoid", "softmax"]
    assert all(str(cell).count("/") == 1 for cell in table["loss"])
    assert runner.invoke(app, ["lab", "studies"]).exit_code == 0
    changed = TINY.replace("d_model: 16", "d_model: 32")
    (tmp_path / "tiny.yaml").write_text(changed)
    refused = runner.invoke(app, ["lab", "run", str(tmp_path / "tiny.yaml"), "--out", str(out)])
    assert refused.exit_code == 2


def test_every_study_that_comes_with_the_package_can_be_read() -> None:
    assert studies() == ["bos", "locked", "mechanisms", "operations", "race"]
    for name in studies():
        for variant in read_study(name).variants:
            LabModel(variant.fitted())
            variant.task.sample(2, torch.Generator())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"modell": {}}, "no field modell"),
        ({"model": {"attention": "linear"}}, "attention must be"),
        ({"model": {"heads": 2}}, "no field heads"),
        ({"model": {"n_heads": "two"}}, "n_heads must be int"),
        ({"task": {"name": "Parity"}}, "task must be one of"),
        ({"variants": ["softmax"]}, "map names"),
        ({"variants": {"a": {"lr": 3}}}, "may differ in"),
        ({"variants": {"a/b": {}}}, "become folders"),
        ({"seeds": "all"}, "whole numbers"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"train": {"steps": 0}}, "at least 1"),
        ({"train": {"lr": -1.0}}, "positive"),
        ({"train": {"dtype": "int8"}}, "dtype must be"),
    ],
)
def test_a_wrong_study_is_refused_with_the_field(content: dict[str, Any], word: str) -> None:
    with pytest.raises(sl.BadInputError, match=word):
        read_study(content)


def test_unreadable_studies_and_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name, word in (("broken.yaml", "no YAML"), ("list.yaml", "must hold fields"), ("absent.yaml", "no study at"),
                       ("x" * 5000, "cannot read a study"), ("bytes.yaml", "cannot read a study")):  # fmt: skip
        with pytest.raises(sl.BadInputError, match=word):
            read_study(tmp_path / name)
    with pytest.raises(sl.BadInputError, match="no finished run"):
        compare(tmp_path)
