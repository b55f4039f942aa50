"""DINOv2-small's real weights on photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sinklens as sl
from sinklens.cli import app

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def dinov2() -> sl.models.PlainModel:
    model = sl.load_model("dinov2-s")
    assert isinstance(model, sl.models.PlainModel)
    return model


@pytest.fixture(scope="module")
def small(dinov2: sl.models.PlainModel) -> sl.inputs.Images:
    """The three photographs at 224 pixels: 16 x 16 patches."""
    return sl.load_images(dinov2, sl.inputs.sample_images(), size=224)


@pytest.fixture(scope="module")
def scores(dinov2: sl.models.PlainModel, small: sl.inputs.Images) -> sl.SinkScores:
    return sl.sink_scores(dinov2, small)


def test_the_converted_weights_compute_what_the_graph_does(dinov2: sl.models.PlainModel) -> None:
    """The numbers are onnxruntime 1.32's, for the graph's own backbone on this input (largest gap anywhere 1.4e-5)."""
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.01).float().view(1, 3, 224, 224)
    with torch.no_grad():
        out = dinov2(pixel_values=pixels).last_hidden_state[0]
    torch.testing.assert_close(out[0, :5], torch.tensor([1.0568, -0.2619, 1.0568, -4.0879, -0.7044]), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        out[137, :5], torch.tensor([1.4676, 1.6184, 0.1505, -4.2672, -0.9691]), atol=2e-4, rtol=0
    )
    assert float(out.std()) == pytest.approx(2.6417, abs=1e-3)


def test_alpha_is_the_column_mean_of_the_eager_patterns(
    dinov2: sl.models.PlainModel, small: sl.inputs.Images, scores: sl.SinkScores
) -> None:
    from sinklens.attention.unbridged import implementation

    with torch.no_grad(), implementation(dinov2.original_model, "eager"):
        patterns = dinov2(pixel_values=small[:1].pixels, output_attentions=True).attentions
    expected = torch.stack([pattern[0].double().mean(1) for pattern in patterns])
    torch.testing.assert_close(scores.alpha[0].double(), expected, atol=1e-6, rtol=0)


def test_cls_is_a_mild_sink_and_no_patch_is_a_register(
    dinov2: sl.models.PlainModel, small: sl.inputs.Images, scores: sl.SinkScores
) -> None:
    cls = scores.alpha[..., 0].double().mean((0, 2))
    assert (cls > 1 / 257).all()
    assert (cls < 0.25).all()
    registers = sl.find.register_tokens(dinov2, small)
    assert not registers.high.any()
    assert float(registers.relative[..., 1:].max()) < 2.7
    assert {sink.token for sink in sl.find_sinks(dinov2, small, scores=scores, activity=0.1)} <= {"[CLS]"}


def test_at_full_size_cls_takes_what_was_measured(dinov2: sl.models.PlainModel) -> None:
    """Layer 0: 0.05 of all attention, the uniform share being 0.0007; no patch's norm reaches 2.7 x the median."""
    images = sl.load_images(dinov2, sl.inputs.sample_images()[1])
    assert images.grid == (37, 37)
    scores = sl.sink_scores(dinov2, images)
    cls = scores.alpha[0, ..., 0].double().mean(1)
    assert float(cls[0]) == pytest.approx(0.05, abs=0.005)
    assert all(0.0015 < value < 0.1 for value in cls[1:].tolist())
    assert float(scores.uniform[0, 0, 0]) == pytest.approx(1 / 1370)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    path = str(sl.inputs.sample_images()[2])
    done = CliRunner().invoke(app, ["images", path, "--size", "112", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "0 of 64 patches" in done.output
    assert "Attention on the patches of coffee.png" in (tmp_path / "images.html").read_text()
    assert "[CLS]" in (tmp_path / "tokens.csv").read_text()
    wrong = CliRunner().invoke(app, ["images", str(tmp_path / "absent.png")])
    assert wrong.exit_code == 2
