"""load_images: every kind of picture becomes what the model should see, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_models import build_pair, picture

import sinklens as sl
from sinklens.bridge.unbridged import PlainModel


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return build_pair("dinov2")[1]


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_pixels_are_the_picture_normalised(model: PlainModel) -> None:
    array = picture()
    images = sl.load_images(model, array)
    expected = (array.transpose(2, 0, 1) / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    torch.testing.assert_close(images.pixels[0], torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert images.grid == (8, 8)
    assert images.labels[0][:2] == ("[CLS]", "patch 0,0")
    assert images.labels[0][8 * 3 + 7 + 1] == "patch 3,7"
    assert images.special[0].nonzero().flatten().tolist() == [0]
    values = torch.arange(65.0)
    assert images.patches(values)[3, 7] == 8 * 3 + 7 + 1


def test_paths_pil_images_and_arrays_give_the_same(model: PlainModel, tmp_path: Path) -> None:
    array = picture(40, 52)
    path = saved(Image.fromarray(array), tmp_path / "a.png")
    images = sl.load_images(model, [path, str(path), Image.fromarray(array), array])
    assert all(torch.equal(images.pictures[0], images.pictures[i]) for i in range(4))
    assert images.sources == ("a.png", "a.png", "image 2", "image 3")


def test_a_wide_picture_is_cropped_in_the_middle(model: PlainModel) -> None:
    array = np.zeros((32, 64, 3), dtype=np.uint8)
    array[:, 16:48] = 200
    assert (sl.load_images(model, array).pictures == 200).all()


def test_a_preprocessor_that_squeezes_is_followed(model: PlainModel) -> None:
    array = np.zeros((32, 64, 3), dtype=np.uint8)
    array[:, :32] = 200
    model.preprocessing.update({"size": {"height": 32, "width": 32}})
    try:
        pictures = sl.load_images(model, array).pictures[0]
    finally:
        model.preprocessing.clear()
    assert (pictures[:, :12] == 200).all()
    assert (pictures[:, 20:] == 0).all()


def test_a_training_crop_is_followed(model: PlainModel) -> None:
    array = np.zeros((64, 64, 3), dtype=np.uint8)
    array[16:48, 16:48] = 200
    about = {"do_center_crop": True, "size": {"shortest_edge": 64}, "crop_size": {"height": 32, "width": 32}}
    model.preprocessing.update(about)
    try:
        assert (sl.load_images(model, array).pictures == 200).all()
    finally:
        model.preprocessing.clear()


def test_transparent_grey_and_deep_pictures_become_colour(model: PlainModel, tmp_path: Path) -> None:
    clear = np.zeros((32, 32, 4), dtype=np.uint8)
    grey = np.full((32, 32), 77, dtype=np.uint8)
    deep = saved(Image.fromarray(np.full((32, 32), 77 * 257, dtype=np.uint16)), tmp_path / "deep.png")
    palette = Image.fromarray(grey).convert("P")
    images = sl.load_images(model, [clear, grey, grey[..., None], deep, palette])
    assert (images.pictures[0] == 255).all()
    assert all((images.pictures[i] == 77).all() for i in range(1, 5))


def test_a_cameras_rotation_is_followed(model: PlainModel, tmp_path: Path) -> None:
    array = picture()
    marked = Image.Exif()
    marked[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    path = saved(Image.fromarray(array), tmp_path / "turned.png", exif=marked)
    assert torch.equal(sl.load_images(model, path).pictures[0], torch.tensor(np.rot90(array, -1).copy()))


def test_a_thin_picture_does_not_fill_the_memory(model: PlainModel) -> None:
    assert sl.load_images(model, np.zeros((1, 20_000, 3), dtype=np.uint8)).pictures.shape == (1, 32, 32, 3)


def broken(kind: str, folder: Path) -> Any:
    path = folder / "broken.png"
    if kind == "text":
        path.write_text("no picture at all")
    elif kind == "half":
        saved(Image.fromarray(picture(200, 200)), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "moving":
        frames = [Image.fromarray(picture(seed=i)) for i in range(3)]
        path = folder / "moving.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "absent":
        path = folder / "absent.png"
    return {
        "empty": [],
        "floats": np.zeros((32, 32, 3)),
        "channels first": np.zeros((3, 32, 32), dtype=np.uint8),
        "no pixels": np.zeros((0, 32, 3), dtype=np.uint8),
        "a number": 3,
        "no path": "\x00",
        "unknown grey": Image.fromarray(np.zeros((4, 4), dtype=np.float32)),
    }.get(kind, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "no picture that Pillow can read"),
        ("half", "half of one"),
        ("moving", "moving picture of 3 frames"),
        ("absent", "no picture at"),
        ("empty", "no pictures"),
        ("floats", "uint8"),
        ("channels first", r"\[height, width\]"),
        ("no pixels", r"\[height, width\]"),
        ("a number", "a path, a PIL image or a numpy array"),
        ("no path", "null byte"),
        ("unknown grey", "floating-point grey"),
    ],
)
def test_what_is_no_picture_is_refused(kind: str, message: str, model: PlainModel, tmp_path: Path) -> None:
    with pytest.raises(sl.BadInputError, match=message):
        sl.load_images(model, broken(kind, tmp_path))


def test_a_picture_too_large_to_unpack_is_refused(model: PlainModel, tmp_path: Path, monkeypatch) -> None:
    path = saved(Image.fromarray(picture(64, 64)), tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(sl.BadInputError, match="too large to unpack safely"):
        sl.load_images(model, path)


def test_sizes_follow_the_patch_and_what_the_model_can(model: PlainModel) -> None:
    images = sl.load_images(model, picture(64, 64), size=(16, 24))
    assert images.grid == (4, 6)
    assert sl.sink_scores(model, images).alpha.shape == (1, 2, 4, 25)
    with pytest.raises(sl.BadInputError, match="no multiple of the patch"):
        sl.load_images(model, picture(), size=33)


def test_images_of_another_model_and_texts_are_refused(model: PlainModel) -> None:
    other = build_pair("dinov2-registers")[1]
    with pytest.raises(sl.BadInputError, match="made for another model"):
        sl.sink_scores(other, sl.load_images(model, picture()))
    with pytest.raises(sl.BadInputError, match="reads images: pass load_images"):
        sl.sink_scores(model, torch.tensor([[1, 2]]))
    with pytest.raises(sl.UnsupportedModelError, match="reads images: load_images"):
        sl.load_tokens(model, ["text"])


def test_a_batch_can_be_chosen_from_joined_and_saved(model: PlainModel, tmp_path: Path) -> None:
    images = sl.load_images(model, [picture(seed=i) for i in range(3)])
    some = images[[2, 0]]
    assert torch.equal(some.pictures, images.pictures[[2, 0]])
    joined = sl.inputs.Images.concatenate([images[0], images[1:]])
    assert joined.digest == images.digest != some.digest
    again = sl.Tokens.load(images.save(tmp_path / "images.safetensors"))
    assert isinstance(again, sl.inputs.Images)
    assert again.digest == images.digest
    assert again.labels == images.labels
    with pytest.raises(sl.BadInputError, match="no padding"):
        images.pad("left", 1)
    with pytest.raises(sl.BadInputError, match="no picture"):
        images.first(3)
    with pytest.raises(sl.BadInputError, match="one size"):
        sl.inputs.Images.concatenate([images, sl.load_images(model, picture(), size=16)])


def test_scores_and_sinks_keep_the_pictures(model: PlainModel, tmp_path: Path) -> None:
    images = sl.load_images(model, [picture(seed=1), picture(seed=2)])
    scores = sl.sink_scores(model, images)
    again = sl.SinkScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert isinstance(again.tokens, sl.inputs.Images)
    figure: Any = again.plot_image(1, layers=[1])
    drawn = torch.tensor(figure.data[0].z)
    share = scores.alpha[1, 1].double().mean(0)[1:].view(8, 8) * 65
    torch.testing.assert_close(drawn.double(), share.log2(), atol=1e-6, rtol=0)
    assert len(figure.to_dict()["layout"]["images"]) == 2
    sinks = sl.find_sinks(model, images, scores=scores, activity=0.01)
    assert isinstance(sl.SinkMap.load(sinks.save(tmp_path / "sinks.safetensors")).tokens, sl.inputs.Images)


@pytest.mark.parametrize("wrong", [{"image": 2}, {"layers": [2]}, {"layers": []}, {"heads": [9]}])
def test_a_map_of_what_is_not_there_is_refused(wrong: dict, model: PlainModel) -> None:
    scores = sl.sink_scores(model, sl.load_images(model, picture()))
    with pytest.raises(sl.BadInputError, match="out of range|must be|must lie"):
        sl.find.image_map(scores, **wrong)


def test_without_pillow_the_extra_is_named(model: PlainModel, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(sl.SinklensError, match=r"pip install 'sinklens\[images\]'"):
        sl.load_images(model, [picture()])


def test_the_page_holds_a_map_per_picture(model: PlainModel, tmp_path: Path) -> None:
    images = sl.load_images(model, [picture(seed=1), picture(seed=2)])
    paths = sl.find.write_images(sl.sink_scores(model, images), sl.find.register_tokens(model, images), tmp_path)
    page = paths["images.html"].read_text()
    assert page.count("Attention on the patches of image") == 2
    assert "data:image/png;base64" in page
    assert "[CLS]" in paths["tokens.csv"].read_text()
