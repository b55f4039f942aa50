"""The report: whole or not at all, resumed, never computed twice, honest where something cannot be told or done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as tf
from architectures import build
from plain_models import IMAGES, TEXT
from reporting import NASTY, SMALL, counted_forwards, files_of, nasty, planted, texts
from sweeping import SENTENCES, save_models
from typer.testing import CliRunner
from wording import word_tokenizer

import sinklens as sl
from sinklens.cli import app
from sinklens.report import export as exporting, write as writing
from sinklens.report.budget import text_of

STAGES = ("scores", "sinks", "experiment", "decomposition", "trace", "mixing")
SAID = {"index.html", "report.md", "manifest.json", "references.bib", "reproduce.py"}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a browser and seconds; where it is tested, it is asked for. Jacobians of a few tokens will do."""
    monkeypatch.setattr(exporting, "can_draw", lambda: False)
    monkeypatch.setattr(writing, "QUICK", SMALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, sl.Tokens]:
    model = planted()
    tokens = nasty(texts(model))
    folder = tmp_path_factory.mktemp("report") / "planted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "can_draw", lambda: False)
        patch.setattr(writing, "QUICK", SMALL)
        page = sl.write_report(model, tokens, folder, quick=True, command=["sinklens", "report"])
    assert page == folder / "index.html"
    return folder, model, tokens


def test_the_folder_is_complete(written: tuple[Path, Any, sl.Tokens]) -> None:
    folder, _, tokens = written
    there = files_of(folder)
    assert there >= SAID | {f"stages/{name}.safetensors" for name in (*STAGES, "tokens")}
    facts = json.loads((folder / "manifest.json").read_text())
    assert {f"tables/{name}" for name in facts["files"]["tables"]} <= there
    assert {f"attention/{name}" for name in facts["files"]["attention"]} <= there
    for name in ("effects", "sinks", "writers", "claims", "parts", "mixing", "layers"):
        assert f"tables/{name}.csv" in there
        table = pd.read_parquet(folder / "tables" / f"{name}.parquet")
        assert len(table) == len(pd.read_csv(folder / "tables" / f"{name}.csv")) > 0
    assert facts["command"] == ["sinklens", "report"]
    assert facts["tokens"]["sha256"] == tokens.digest
    assert len(facts["depends_on"]["weights_sha256"]) == 64
    assert set(facts["stages"]) == {*STAGES, "neurons"}
    assert all(stage["seconds"] >= 0 and stage["cpu_seconds"] >= 0 for stage in facts["stages"].values())
    assert facts["seed"] == 0
    assert {"sinklens", "torch", "transformer-lens"} <= set(facts["versions"])
    assert not [name for name in there if Path(name).name.startswith(".")], "no half file is left"
    bibliography = (folder / "references.bib").read_text()
    for key in ("gu2025", "xiao2024", "wong2025", "barbero2025", "hall1988"):
        assert f"{{{key}," in bibliography


def test_the_page_is_self_contained_and_small(written: tuple[Path, Any, sl.Tokens]) -> None:
    page = (written[0] / "index.html").read_text()
    assert len(page.encode()) < 6_000_000
    assert page.count("plotly.js v") == 1
    assert not re.search(r'<(script|link|img|iframe|source)[^>]+(src|href)="', page)
    own = page.replace(page[page.index("plotly.js v") : page.rindex("const template")], "")
    assert len(own.encode()) < 1_000_000
    assert "http://" not in own
    assert "https://" not in own


def test_numbers_on_the_page_are_those_of_the_tables_and_of_the_saved_results(
    written: tuple[Path, Any, sl.Tokens],
) -> None:
    folder, _, _ = written
    page = (folder / "index.html").read_text()
    effects = pd.read_parquet(folder / "tables" / "effects.parquet")
    experiment = sl.experiment.Experiment.load(folder / "stages" / "experiment.safetensors")
    pd.testing.assert_frame_equal(effects, experiment.to_dataframe())
    for row in effects.to_dict("records"):
        if row["label"] != "base":
            assert f"<td>{row['loss']:.4f}</td>" in page
    scores = sl.SinkScores.load(folder / "stages" / "scores.safetensors")
    assert f"in a share of {scores.sink_rate():.3f}" in page
    trace = sl.trace.SinkTrace.load(folder / "stages" / "trace.safetensors")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables" / "writers.parquet"), trace.writers())


def test_a_second_run_computes_nothing(written: tuple[Path, Any, sl.Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, tokens = written
    before = (folder / "report.md").read_text()
    left = folder / "stages" / "experiment-parts-that-a-killed-run-left"
    left.mkdir()
    for name in ("sink_scores", "run_experiment", "decompose_sinks", "trace_sinks", "compare_mixing"):
        monkeypatch.setattr(sl, name, lambda *_, **__: pytest.fail("computed again"))
    with counted_forwards(model) as forwards:
        sl.write_report(model, tokens, folder, quick=True)
    assert forwards == []
    assert (folder / "report.md").read_text() == before
    assert not left.exists()


def test_another_seed_or_other_weights_are_another_report(tmp_path: Path) -> None:
    model = planted()
    tokens = texts(model, 2)
    keys = []
    for seed in (0, 0, 1):
        with counted_forwards(model) as forwards:
            sl.write_report(model, tokens, tmp_path, quick=True, seed=seed)
        keys.append((json.loads((tmp_path / "manifest.json").read_text())["key"], bool(forwards)))
    assert keys[0][0] == keys[1][0] != keys[2][0]
    assert [ran for _, ran in keys] == [True, False, True]
    with torch.no_grad():
        next(model.original_model.parameters())[0, 0] += 0.01
    with counted_forwards(model) as forwards:
        sl.write_report(model, tokens, tmp_path, quick=True, seed=1)
    assert forwards, "a changed weight is another model"


def test_an_interrupted_run_leaves_no_half_file_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted()
    tokens = texts(model, 3)
    calls: list[str] = []
    for name in ("sink_scores", "run_experiment", "decompose_sinks"):
        whole = getattr(sl, name)
        monkeypatch.setattr(sl, name, lambda *a, _n=name, _f=whole, **k: (calls.append(_n), _f(*a, **k))[1])
    save = sl.decompose.SinkDecomposition.save

    def interrupted(self: Any, path: Any) -> Any:
        save(self, path)
        raise KeyboardInterrupt  # between the result and the file that says that it is finished

    monkeypatch.setattr(sl.decompose.SinkDecomposition, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sl.write_report(model, tokens, tmp_path, quick=True)
    assert not SAID & files_of(tmp_path)
    assert not [name for name in files_of(tmp_path) if Path(name).name.startswith(".")]
    assert calls == ["sink_scores", "run_experiment", "decompose_sinks"]
    monkeypatch.setattr(sl.decompose.SinkDecomposition, "save", save)
    sl.write_report(model, tokens, tmp_path, quick=True)
    assert calls == ["sink_scores", "run_experiment", "decompose_sinks", "decompose_sinks"]
    assert files_of(tmp_path) >= SAID


def test_an_experiment_goes_on_with_the_sequence_at_which_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sinklens.experiment.experiment as running

    model = planted()
    tokens = texts(model, 3)
    measure, seen = running.measure, []

    def stops(model: Any, plan: Any, group: list[int], *rest: Any) -> Any:
        if group == [2] and 2 not in seen:
            seen.extend(group)
            raise KeyboardInterrupt
        seen.extend(group)
        return measure(model, plan, group, *rest)

    monkeypatch.setattr("sinklens.experiment.runs.MOST_TOKENS", 0)  # each sequence a forward of its own
    monkeypatch.setattr(running, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        sl.write_report(model, tokens, tmp_path, quick=True)
    sl.write_report(model, tokens, tmp_path, quick=True)
    assert seen == [0, 1, 2, 2, 0, 1, 2], "the last three are those of the 2x2"
    assert not list((tmp_path / "stages").glob("*-parts-*")), "finished parts are put away"


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    model = planted()
    tokens = texts(model, 2)
    sl.write_report(model, tokens, tmp_path, quick=True)
    for name, content in (("scores.safetensors", b"half"), ("mixing.json", b"{")):
        (tmp_path / "stages" / name).write_bytes(content)
        with counted_forwards(model) as forwards:
            sl.write_report(model, tokens, tmp_path, quick=True)
        assert forwards
        sl.SinkScores.load(tmp_path / "stages" / "scores.safetensors")


def test_what_stands_in_a_token_is_never_markup(written: tuple[Path, Any, sl.Tokens]) -> None:
    folder, _, _ = written
    page = (folder / "index.html").read_text()
    said = (folder / "report.md").read_text()
    for label in NASTY:
        if "<" in label:
            assert label not in page
            assert label not in said
    assert page.count("</script>") == 2, "plotly's script and the page's own"
    assert "&lt;/script&gt;" in page
    for view in (folder / "attention").glob("*.html"):
        assert view.read_text().count("</script>") == 1


def test_padding_does_not_matter(written: tuple[Path, Any, sl.Tokens], tmp_path: Path) -> None:
    folder, model, tokens = written
    sl.write_report(model, tokens[:2].pad("left", 3), tmp_path / "left", quick=True)
    sl.write_report(model, tokens[:2].pad("right", 5), tmp_path / "right", quick=True)
    one, other = ((tmp_path / side / "report.md").read_text() for side in ("left", "right"))
    assert one == other


def test_one_short_text_gives_a_report_without_intervals_or_sinks(tmp_path: Path) -> None:
    save_models(tmp_path)
    page = sl.write_report(str(tmp_path / "llama"), "the cat sat on a mat", tmp_path / "out", quick=True)
    said = (tmp_path / "out" / "report.md").read_text()
    assert "With 1 document there are no intervals" in said
    assert "no sink was found" in said
    assert page.is_file()
    assert " rises " not in said
    assert " falls " not in said


def test_the_script_of_a_report_really_makes_its_figures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_models(tmp_path)
    out = tmp_path / "out"
    sl.write_report(str(tmp_path / "llama"), SENTENCES[:3], out, quick=True)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    source = (out / "reproduce.py").read_text()
    exec(compile(source.partition("\nfor name, figure")[0], "reproduce.py", "exec"), names)
    facts = json.loads((out / "manifest.json").read_text())
    assert names["experiment"].to_dataframe().loss.tolist() == pytest.approx(
        pd.read_csv("tables/effects.csv").loss.tolist(), abs=1e-6
    )
    page = (out / "index.html").read_text()
    drawn = json.loads(re.search(r"const drawings = (\{.*\});", page)[1])  # type: ignore[index]
    assert set(names["figures"]) == set(drawn)
    for name, figure in names["figures"].items():
        assert len(figure.data) == len(drawn[name]["data"]), name
    assert not facts["result"]["left_out"].keys() & {"scores", "sinks", "experiment", "decomposition", "mixing"}


def test_an_encoder_without_a_trained_head_gets_the_stages_that_it_can_do(tmp_path: Path) -> None:
    headless: Any = build("bert")
    headless.bert.save_pretrained(tmp_path / "model")
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path / "model")
    sl.write_report(str(tmp_path / "model"), SENTENCES[:3], tmp_path / "out", quick=True)
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    said = (tmp_path / "out" / "report.md").read_text()
    left_out = facts["result"]["left_out"]
    assert "scores" not in left_out
    for why in left_out.values():
        assert why
    assert "Left out (ablate" in said
    assert "trained" in left_out["experiment"]


def test_a_model_without_a_bridge_gets_the_scan_and_the_reasons(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sl.load_model(TEXT["distilbert"]())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 64), generator=generator)
    sl.write_report(model, ids, tmp_path, quick=True)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert set(facts["result"]["left_out"]) == {"experiment", "decomposition", "trace", "neurons", "mixing"}
    assert "need a TransformerLens bridge" in (tmp_path / "report.md").read_text()
    assert files_of(tmp_path) >= SAID


def test_models_of_images_are_sent_to_their_own_page(tmp_path: Path) -> None:
    with pytest.raises(sl.UnsupportedModelError, match="write_images"):
        sl.write_report(sl.load_model(IMAGES["vit"]()), "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_impossible_folders_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sl, "sink_scores", lambda *_, **__: pytest.fail("work"))
    model = planted()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(sl.BadInputError, match="is a file; give a folder"):
            sl.write_report(model, texts(model, 2), path)


def test_two_reports_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    model = planted()
    (tmp_path / "stages").mkdir()
    with FileLock(tmp_path / "stages" / "lock"), pytest.raises(sl.BadInputError, match="another report"):
        sl.write_report(model, texts(model, 2), tmp_path, quick=True)


def test_figures_are_drawn_once_and_those_of_another_report_put_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(writing, "QUICK", SMALL)
    assert exporting.can_draw(), "kaleido and a browser belong to the tests (apt-get install chromium)"
    model = planted()
    sl.write_report(model, texts(model, 2), tmp_path, quick=True)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert {f"figures/{name}" for name in facts["files"]["figures"]} <= files_of(tmp_path)
    drawn = tmp_path / "figures" / "where-heads.svg"
    assert drawn.read_text().lstrip().startswith("<svg")
    assert (tmp_path / "figures" / "where-heads.png").read_bytes()[:4] == b"\x89PNG"
    assert "![" in (tmp_path / "report.md").read_text()
    before = drawn.stat().st_mtime_ns
    mine = tmp_path / "figures" / "mine.svg"
    mine.write_text("kept")
    sl.write_report(model, texts(model, 2), tmp_path, quick=True)
    assert drawn.stat().st_mtime_ns == before
    sl.write_report(model, torch.full((1, 40), 3), tmp_path, quick=True)  # no sink: fewer figures
    assert not (tmp_path / "figures" / "where-lives.svg").exists()
    assert mine.read_text() == "kept"


def test_without_a_browser_the_report_says_how_to_get_figures(written: tuple[Path, Any, sl.Tokens]) -> None:
    folder, _, _ = written
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["files"]["figures"] == []
    assert any("apt-get install chromium" in note for note in facts["result"]["notes"])
    assert "apt-get install chromium" in (folder / "report.md").read_text()
    assert "apt-get install chromium" in (folder / "index.html").read_text()


@pytest.fixture(scope="module")
def reader() -> Any:
    return sl.load_model(build("llama"), tokenizer=word_tokenizer(adds_bos=False))


def test_texts_are_taken_by_document_in_sizes_that_suit(reader: Any, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps({"text": SENTENCES[i % 8] + f" {'a ' * (i % 3)}"}) for i in range(20)))
    quick = text_of(reader, str(many), quick=True)
    assert len(quick) == len(set(quick.documents)) == 16
    assert int(quick.lengths.max()) == 64
    mixed = tmp_path / "mixed.jsonl"
    lines = [" ".join(["the"] * n) for n in (200, 60, 50, 10)]
    mixed.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    found = text_of(reader, str(mixed))
    assert sorted(found.lengths.tolist()) == [50, 60, 128], "a document that is too short to hold a sink is left out"
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    assert text_of(reader, str(short)).lengths.tolist() == [3]
    assert text_of(reader, str(mixed), n_seqs=1, seq_len=32).ids.shape == (1, 32)
    assert len(text_of(reader, ["the cat", "a mat"])) == 2
    with pytest.raises(sl.BadInputError, match="no text source"):
        text_of(reader, "absent")


def test_the_command_writes_a_report_and_refuses_in_one_line(tmp_path: Path) -> None:
    save_models(tmp_path)
    runner = CliRunner()
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in SENTENCES[:3]))
    command = ["report", "--model", str(tmp_path / "gpt2"), "--text", str(tmp_path / "texts.jsonl"), "--quick"]
    done = runner.invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "[1/7] scan" in done.output
    assert f"load_model('{tmp_path / 'gpt2'}')" in (tmp_path / "out" / "reproduce.py").read_text()
    again = runner.invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert "[3/7] ablate: the sinks taken away, beside controls: already done" in again.output
    (tmp_path / "file").write_text("")
    for wrong, words in (
        (["--text", "absent.txt"], "no file at 'absent.txt'"),
        (["--text", "a", "--corpus", "b"], "not both"),
        (["--out", str(tmp_path / "file")], "give a folder"),
    ):
        refused = runner.invoke(app, ["report", "--model", str(tmp_path / "gpt2"), *wrong])
        assert refused.exit_code == 2
        assert words in " ".join(refused.output.split())
        assert "Traceback" not in refused.output


def test_neurons_are_saved_and_read_again(tmp_path: Path) -> None:
    tables = {
        name: pd.DataFrame({"sequence": [0, 1], "writer": ["mlp 2", "mlp 3"], "share": [0.5, float("nan")]})
        for name in ("neurons", "writers", "ablations", "feeds")
    }
    found = sl.trace.Neurons(**tables, notes=("a note",))
    again = sl.trace.Neurons.load(found.save(tmp_path / "neurons.safetensors"))
    assert again.notes == found.notes
    for name, table in tables.items():
        pd.testing.assert_frame_equal(getattr(again, name), table)


def test_the_tiny_models_of_these_tests_are_what_they_say() -> None:
    model = planted()
    found = sl.find_sinks(model, texts(model, 2))
    assert [(s.position, s.kind) for s in found] == [(0, "primary"), (3, "secondary"), (0, "primary"), (4, "secondary")]
    assert isinstance(model.original_model, tf.GPT2LMHeadModel)
