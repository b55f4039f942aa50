"""Registers and patch sinks are found where they were planted, a per cent above and below each threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import build_pair, picture
from planted_images import COUNT, LAYERS, POSITION, WHITE, pictures, planted

import sinklens as sl

WRITER = 2


@pytest.fixture(scope="module")
def model() -> sl.models.PlainModel:
    return planted()


def test_a_planted_register_is_found_from_its_writer_on(model: sl.models.PlainModel) -> None:
    images = pictures(model, 2)
    registers = sl.find.register_tokens(model, images)
    assert registers.positions(0) == registers.positions(1) == [POSITION]
    table = registers.to_dataframe(sl.sink_scores(model, images))
    patches = table[table.patch]
    assert patches.token.tolist() == [f"patch {WHITE[0]},{WHITE[1]}"] * 2
    assert patches.onset.tolist() == [WRITER] * 2
    assert patches.layers.tolist() == [LAYERS - WRITER] * 2
    assert patches.relative.tolist() == pytest.approx([10.0] * 2, rel=1e-5)
    assert patches.alpha.tolist() == pytest.approx([0.5] * 2, rel=1e-4)
    assert patches.share.tolist() == pytest.approx([0.5 * COUNT] * 2, rel=1e-4)
    assert table[~table.patch].token.tolist() == ["[CLS]"] * 2
    by_layer = registers.by_layer()
    assert by_layer.high.tolist() == [0, 0, 2, 2, 2, 2]
    assert by_layer["first"].tolist() == pytest.approx([1.0] * LAYERS)
    assert "2 of 128 patches" in repr(registers)


@pytest.mark.parametrize(("factor", "found"), [(1.01, 1), (0.99, 0)])
def test_the_ratio_is_a_threshold(factor: float, found: int) -> None:
    near = planted(ratio=3 * factor)
    assert len(sl.find.register_tokens(near, pictures(near)).positions()) == found


@pytest.mark.parametrize(("factor", "found"), [(0.99, 1), (1.01, 0)])
def test_the_absolute_norm_and_the_standard_deviations_are_thresholds(
    factor: float, found: int, model: sl.models.PlainModel
) -> None:
    images = pictures(model)
    assert len(sl.find.register_tokens(model, images, norm=10 * factor).positions()) == found
    # one outlier among n lies (n - 1) / sqrt(n) standard deviations above the mean, whatever its size
    n = COUNT - 1
    registers = sl.find.register_tokens(model, images, sigmas=factor * (n - 1) / n**0.5)
    assert int(registers.unusual[0, -1].sum()) == found


def test_patches_are_judged_after_the_block_that_is_asked_for(model: sl.models.PlainModel) -> None:
    images = pictures(model)
    assert sl.find.register_tokens(model, images, layer=WRITER - 1).positions() == []
    assert sl.find.register_tokens(model, images, layer=WRITER).positions() == [POSITION]


@pytest.mark.parametrize(("factor", "found"), [(1.01, [POSITION]), (0.99, [])])
def test_a_planted_patch_sink_is_found_by_its_attention(factor: float, found: list[int]) -> None:
    near = planted(share=0.05 * factor)
    sinks = sl.find_sinks(near, pictures(near))
    assert sinks.positions() == found
    assert [sink.token for sink in sinks] == [f"patch {WHITE[0]},{WHITE[1]}"] * len(found)


def test_a_patch_sink_lives_where_it_was_planted_and_not_elsewhere() -> None:
    late = planted(share=0.3, layers=range(3, LAYERS))
    sink = next(iter(sl.find_sinks(late, pictures(late))))
    assert (sink.onset, sink.end, sink.kind) == (3, LAYERS - 1, "primary")
    assert sink.mass == pytest.approx(0.3, rel=1e-4)


def test_the_direction_method_sees_it_too(model: sl.models.PlainModel) -> None:
    sinks = sl.find_sinks(model, pictures(model), method="direction")
    assert sinks.positions() == [POSITION]
    assert next(iter(sinks)).onset == WRITER + 1  # before block 3 is after block 2


def test_registers_survive_saving(model: sl.models.PlainModel, tmp_path: Path) -> None:
    registers = sl.find.register_tokens(model, pictures(model), norm=7.0)
    again = sl.find.Registers.load(registers.save(tmp_path / "registers.safetensors"))
    assert again.to_dataframe().equals(registers.to_dataframe())
    assert again.rule == registers.rule == "norm > 7"
    assert torch.equal(again.tokens.pictures, registers.tokens.pictures)


@pytest.mark.parametrize(
    "wrong", [{"ratio": 0.0}, {"ratio": float("nan")}, {"norm": -1.0}, {"sigmas": 0.0}, {"layer": LAYERS}]
)
def test_thresholds_that_make_no_sense_are_refused(wrong: dict, model: sl.models.PlainModel) -> None:
    with pytest.raises(sl.BadInputError, match="positive number|out of range|is NaN"):
        sl.find.register_tokens(model, pictures(model), **wrong)


def test_scores_of_other_pictures_are_refused(model: sl.models.PlainModel) -> None:
    registers = sl.find.register_tokens(model, pictures(model))
    with pytest.raises(sl.BadInputError, match="other pictures"):
        registers.to_dataframe(sl.sink_scores(model, pictures(model, 2)))
    with pytest.raises(sl.BadInputError, match="image 1 is out of range"):
        registers.positions(1)


def test_a_models_own_registers_are_no_patches() -> None:
    _, plain = build_pair("dinov2-registers")
    images = sl.load_images(plain, picture())
    registers = sl.find.register_tokens(plain, images, ratio=1e-6)
    assert not registers.high[:, :, :4].any()
    assert registers.high[:, :, 4:].all()
    table = registers.to_dataframe()
    assert table.token.tolist()[:5] == ["[CLS]", "register 1", "register 2", "register 3", "patch 0,0"]


def test_the_norm_figure_shows_every_token_kind(model: sl.models.PlainModel) -> None:
    figure: Any = sl.find.register_tokens(model, pictures(model)).plot()
    names = [trace.name for trace in figure.data if trace.name]
    assert names == ["patches: median, 1 to 99 %", "largest patch", "[CLS]"]
    assert max(figure.data[2].y) == pytest.approx(10.0, rel=1e-5)
