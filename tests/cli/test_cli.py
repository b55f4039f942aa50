"""The command line on a real model: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from command import run

import sinklens as sl


@pytest.mark.real
def test_scan_prints_the_finding_and_writes_three_files(tmp_path: Path, text_a: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text_a + "\n")
    code, shown = run("scan", "--text", str(file), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "('Attention') is a sink (alpha > 0.3) in a share of 0.541" in shown
    assert "loss 3.928" in shown
    assert "' the'" in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scan.html", "scores.parquet", "manifest.json"}
    page = (tmp_path / "out" / "scan.html").read_text()
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="', page), "opens offline: nothing is fetched"
    assert page.count("plotly.js v") == 1, "plotly's script stands in the page once"
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(table) == 30 * 9 * 97
    first = table[table.position == 0]
    assert (first.alpha > 0.3).mean() == pytest.approx(0.541, abs=0.005)
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["versions"]["transformer-lens"].startswith("4.")
    assert facts["tokens"]["seed"] == 0
    assert len(facts["tokens"]["corpus_sha256"]) == 64
    assert facts["result"]["sink_rate"] == pytest.approx(0.541, abs=0.005)
    assert facts["model"]["capabilities"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.real
def test_scan_of_sixteen_documents_gives_an_interval(tmp_path: Path) -> None:
    code, shown = run("scan", "--seq-len", "64", "--n-seqs", "16", "--epsilon", "0.3")
    assert code == 0
    assert re.search(r"share of 0\.\d{3} of smollm2-135m's heads \[0\.\d{3}, 0\.\d{3}\], 95 % bootstrap-t", shown)


@pytest.mark.real
@pytest.mark.parametrize("context", ["random", "repeat"])
def test_scan_of_made_up_context(context: str) -> None:
    code, shown = run("scan", "--context", context, "--seq-len", "64", "--n-seqs", "2")
    assert code == 0
    assert f"2 sequence(s) of up to 64 tokens from {context}" in shown


@pytest.mark.real
def test_scan_reads_standard_input_and_an_encoder_has_no_loss(text_a: str) -> None:
    code, shown = run("scan", "--model", "minilm-l6", "--text", "-", input=text_a)
    assert code == 0
    assert "[CLS]" in shown
    assert "loss" not in shown


@pytest.mark.real
def test_sinks_prints_the_sinks_and_writes_page_tables_and_manifest(tmp_path: Path, text_a: str) -> None:
    code, shown = run("sinks", "--text", "-", "--out", str(tmp_path / "out"), input=text_a)
    assert code == 0
    assert "1 primary, 2 secondary sinks in 1 sequence(s), by attention" in shown
    line = next(line for line in shown.splitlines() if line.split()[:2] == ["0", "10"])
    assert line.split()[4:6] == ["secondary", "early_end"]
    names = {"sinks.html", "sinks.csv", "layers.parquet", "heads.parquet", "use.parquet", "manifest.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert pd.read_csv(tmp_path / "out" / "sinks.csv").position.tolist() == [0, 10, 46]
    page = (tmp_path / "out" / "sinks.html").read_text()
    assert "early_end" in page
    assert page.count("plotly.js v") == 1
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["result"]["secondary"] == 2


@pytest.mark.real
def test_sinks_of_a_short_text_says_why_there_are_none(tmp_path: Path) -> None:
    code, shown = run("sinks", "--model", "minilm-l6", "--text", "-", "--out", str(tmp_path), input="a short text")
    assert code == 0
    assert "too few queries" in shown
    assert "No sink was found" in (tmp_path / "sinks.html").read_text()
    code, shown = run("sinks", "--method", "magic", "--text", "-", input="a short text")
    assert code == 2
    assert "method must be one of" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "--text", "absent.txt"], "no file at 'absent.txt'"),
        (["scan", "--text", "a", "--corpus", "b"], "not both"),
        (["scan", "--context", "random", "--corpus", "b"], "makes its own ids"),
        (["scan", "--epsilon", "1.5"], "epsilon must lie in"),
    ],
)
def test_bad_options_end_with_status_2_and_one_line(arguments: list[str], message: str) -> None:
    code, shown = run(*arguments)
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.real
@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (["--text", "-"], "", "text is empty"),
        (["--text", "-"], "hi", "has 1 token"),
        (["--seq-len", "9000"], None, "past the context window"),
        (["--position", "500", "--text", "-"], "a few words", "position 500 is out of range"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(options: list[str], given: str | None, message: str) -> None:
    code, shown = run("scan", *options, input=given)
    assert code == 2
    assert message in shown


def test_models_lists_names_sizes_licences_and_cache() -> None:
    code, shown = run("models")
    assert code == 0
    for name, licence in (("smollm2-135m", "Apache-2.0"), ("gemma3-270m", "Gemma Terms of Use")):
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert licence in line
        assert "MB" in line
        assert line.split()[-1] in ("yes", "no")


def test_version() -> None:
    assert run("--version") == (0, f"sinklens {sl.__version__}\n")


def test_ctrl_c_ends_with_status_130(monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sinklens.models.load.fetch", interrupted)
    code, shown = run("scan")
    assert code == 130
    assert "interrupted" in shown


@pytest.mark.real
def test_tokens_that_look_like_markup_are_escaped_on_the_page(tmp_path: Path) -> None:
    text = "</script><script>alert(1)</script> [bold]x[/bold] & <b>tags</b> " * 4
    code, _ = run("scan", "--text", "-", "--out", str(tmp_path), input=text)
    assert code == 0
    page = (tmp_path / "scan.html").read_text()
    assert "<script>alert" not in page
    assert "alert(1)</script>" not in page


def test_an_output_folder_that_is_a_file_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sinklens.models.load.fetch", lambda name: pytest.fail("work was done"))
    (tmp_path / "file").write_text("x")
    for command in ("scan", "sinks"):
        code, shown = run(command, "--out", str(tmp_path / "file"))
        assert code == 2
        assert "is a file; give a folder" in shown


def test_bytes_that_are_no_text_are_refused() -> None:
    code, shown = run("scan", "--text", "-", input=b"\xff\xfe abc")
    assert code == 2
    assert "standard input is not UTF-8" in shown
    code, shown = run("scan", "--text", "a " * 200)
    assert code == 2
    assert "no file at" in shown


@pytest.mark.real
def test_paths_with_brackets_are_shown_as_they_are(tmp_path: Path, text_a: str) -> None:
    code, shown = run("scan", "--text", "-", "--out", str(tmp_path / "o[bold]x"), input=text_a[:200])
    assert code == 0
    assert "o[bold]x/scan.html" in shown


@pytest.mark.real
def test_ablate_prints_effects_beside_controls_and_writes_everything(tmp_path: Path, text_a: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text_a)
    out = tmp_path / "out"
    command = [
        "ablate",
        "--text",
        str(file),
        "--mode",
        "renormalize",
        "--mode",
        "scale",
        "--g",
        "0.5",
        "--layers",
        "3-10",
    ]
    code, shown = run(*command, "--kind", "secondary", "--control", "random", "--out", str(out))
    assert code == 0
    assert "scale(0.5)" in shown
    assert "random" in shown
    assert re.search(r"renormalize: of 0\.\d{3} attention freed per query, 0\.\d{3} to other sinks", shown)
    names = {"experiment.html", "effects.csv", "side_effects.csv", "experiment.safetensors", "manifest.json"}
    assert {p.name for p in out.iterdir()} == names
    effects = pd.read_csv(out / "effects.csv")
    assert effects.label.tolist() == ["base", "renormalize", "renormalize", "scale(0.5)", "scale(0.5)"]
    assert abs(effects.d_loss[1]) < 0.3  # secondary sinks hardly matter
    page = (out / "experiment.html").read_text()
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="', page)
    assert page.count("plotly.js v") == 1
    assert sl.experiment.Experiment.load(out / "experiment.safetensors").to_dataframe().shape[0] == 5


@pytest.mark.real
def test_bos_shows_what_removal_costs_gemma(tmp_path: Path, text_a: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text_a)
    code, shown = run("bos", "--model", "gemma3-270m", "--text", str(file), "--out", str(tmp_path))
    assert code == 0
    assert "first token '<bos>'" in shown
    table = pd.read_csv(tmp_path / "bos_variants.csv").set_index("variant")
    assert table.difference["removed"] == pytest.approx(1.61, abs=0.02)


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "--layers", "3-x"], "--layers takes numbers"),
        (["ablate", "--kind", "strange"], "--kind must be"),
        (["ablate", "--mode", "erase", "--n-seqs", "1", "--seq-len", "64"], "mode must be"),
        (["ablate", "--control", "middle", "--n-seqs", "1", "--seq-len", "64"], "controls must be"),
        (["ablate", "--model", "minilm-l6", "--n-seqs", "1", "--seq-len", "64"], "predicts no next token"),
        (["bos", "--source", "zero", "--site", "pattern", "--n-seqs", "1", "--seq-len", "64"], "site must be"),
    ],
)
def test_bad_interventions_end_with_one_line(arguments: list[str], message: str) -> None:
    code, shown = run(*arguments)
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown


def test_check_prints_every_outcome_and_says_when_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from architectures import build
    from wording import word_tokenizer

    import sinklens.check.edit_checks as edits

    build("opt").save_pretrained(tmp_path / "model")
    word_tokenizer(adds_bos=True).save_pretrained(tmp_path / "model")
    command = ["check", str(tmp_path / "model"), "--only", "load_model,flash,patch_bos,path_sums"]
    code, shown = run(*command, "--out", str(tmp_path / "check.csv"))
    assert code == 0, shown
    assert "2 layers x 4 heads, causal, full attention; patterns read-only" in " ".join(shown.split())
    assert "3 exact, 1 refused" in shown
    assert "path-sum bound is not defined" in " ".join(shown.split())  # long reasons wrap
    assert (tmp_path / "check.csv").read_text().count("patch_bos,exact") == 3
    monkeypatch.setattr(edits, "patch_bos", lambda *args, **kwargs: [])
    code, shown = run(*command)
    assert code == 1
    assert "Please report this" in shown
    assert run("check", str(tmp_path / "model"), "--only", "nonsense")[0] == 2
