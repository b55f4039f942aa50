"""``Images``: pictures as tokens, [CLS] and registers first, then the patches row by row.

Pillow reads and resizes them (extra ``images``). What is kept are the 8-bit pixels that the model sees, after resizing
and cropping: results draw on them, and the model's input is computed from them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sinklens.bridge.unbridged import PlainCapabilities, PlainModel
from sinklens.core.errors import BadInputError, SinklensError, UnsupportedModelError
from sinklens.core.validation import public, public_methods
from sinklens.inputs.tokens import STORED, Tokens, reads_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformer_lens.model_bridge import TransformerBridge

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Picture: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray"


@public_methods
@dataclass(frozen=True, eq=False)
class Images(Tokens):
    """A batch of pictures of one size; a :class:`Tokens` wherever attention is measured.

    ``ids`` number a picture's tokens; ``special`` marks [CLS] and registers; ``labels`` are "[CLS]", "register 1",
    "patch 3,7" (row, column, from 0). Positions count in that order, so the "far" of far importance (16 tokens) is
    along rows: a patch's neighbour above is one row of tokens away.

    Attributes:
        pictures: 8-bit red, green and blue, as the model sees them.
        grid: rows and columns of patches.
        prefix: tokens before the first patch.
        mean, std: the model's input is ``(pictures / 255 - mean) / std``, per colour.
    """

    pictures: UInt8[Tensor, "batch height width 3"] = field(kw_only=True)
    grid: tuple[int, int] = field(kw_only=True)
    prefix: int = field(kw_only=True)
    mean: tuple[float, ...] = field(kw_only=True)
    std: tuple[float, ...] = field(kw_only=True)

    @property
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """The model's input."""
        mean, std = (torch.tensor(v, device=self.pictures.device) for v in (self.mean, self.std))
        return ((self.pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    @cached_property
    def digest(self) -> str:
        """A hash of the pictures and of how they are normalised."""
        about = repr((tuple(self.pictures.shape), self.grid, self.prefix, self.mean, self.std))
        return hashlib.sha256(about.encode() + self.pictures.cpu().numpy().tobytes()).hexdigest()

    def __getitem__(self, index: int | slice | Sequence[int]) -> Images:
        """Some of the pictures, in the order asked for."""
        everything = range(len(self))
        rows = everything[index] if isinstance(index, slice) else [index] if isinstance(index, int) else list(index)
        chosen = super().__getitem__(index)
        assert isinstance(chosen, Images)
        return replace(chosen, pictures=self.pictures[list(rows)])

    def to(self, device: torch.device | str) -> Images:
        """The same batch on another device."""
        moved = super().to(device)
        assert isinstance(moved, Images)
        return replace(moved, pictures=self.pictures.to(device))

    def patches(self, values: Float[Tensor, "*rest pos"]) -> Float[Tensor, "*rest row column"]:
        """Values per token as maps over the patches; those of [CLS] and registers are dropped."""
        if values.ndim == 0 or values.shape[-1] != self.ids.shape[1]:
            raise BadInputError(
                f"patches needs values of {self.ids.shape[1]} tokens, got the shape {list(values.shape)}"
            )
        return values[..., self.prefix :].unflatten(-1, self.grid)

    def pad(self, side: Literal["left", "right"], columns: int, pad_id: int = 0) -> Images:  # noqa: ARG002
        """Pictures are not padded.

        Raises:
            BadInputError: any padding was asked for.
        """
        if columns:
            raise BadInputError("images have no padding: all pictures of a batch have one size")
        return self

    def first(self, columns: int) -> Images:
        """Pictures are not cut.

        Raises:
            BadInputError: fewer tokens than the picture has.
        """
        if columns < self.ids.shape[1]:
            raise BadInputError("the first tokens of a picture are no picture; crop it and load it again")
        return self

    @classmethod
    def concatenate(cls, parts: Sequence[Tokens]) -> Tokens:
        """Several batches of pictures as one.

        Raises:
            BadInputError: their sizes, grids or normalisations differ.
        """
        images = [part for part in parts if isinstance(part, Images)]
        kinds = {(tuple(p.pictures.shape[1:]), p.grid, p.prefix, p.mean, p.std) for p in images}
        if len(kinds) != 1 or len(images) != len(parts):
            raise BadInputError("only images of one size, made for one model, can be joined")
        whole = Tokens.concatenate([_without_pictures(part) for part in images])
        return _with_pictures(whole, images[0], torch.cat([part.pictures for part in images]))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the batch, for saving."""
        return {**super().tensors(), "pictures": self.pictures}

    def meta(self) -> dict[str, Any]:
        """Everything else, as JSON."""
        about = {"grid": list(self.grid), "prefix": self.prefix, "mean": list(self.mean), "std": list(self.std)}
        return {**super().meta(), "images": about}


def _without_pictures(images: Images) -> Tokens:
    return Tokens(images.ids, images.mask, images.labels, images.sources, images.documents, images.special, images.info)


def _with_pictures(tokens: Tokens, like: Images, pictures: Tensor) -> Images:
    return Images(
        tokens.ids, tokens.mask, tokens.labels, tokens.sources, tokens.documents, tokens.special, tokens.info,
        pictures=pictures, grid=like.grid, prefix=like.prefix, mean=like.mean, std=like.std,
    )  # fmt: skip


def images_from_parts(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Images:
    """The inverse of :meth:`Images.tensors` and :meth:`Images.meta`."""
    about = meta["images"]
    return Images(
        ids=tensors["ids"],
        mask=tensors["mask"],
        labels=tuple(tuple(row) for row in meta["labels"]),
        sources=tuple(meta["sources"]),
        documents=tuple(meta["documents"]),
        special=tensors["special"],
        info=meta["info"],
        pictures=tensors["pictures"],
        grid=(int(about["grid"][0]), int(about["grid"][1])),
        prefix=int(about["prefix"]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
    )


STORED["pictures"] = images_from_parts


@public
def load_images(
    model: PlainModel | TransformerBridge,
    sources: Picture | Sequence[Picture],
    *,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Images:
    """Pictures as tokens of an image model.

    As the model's ``preprocessor_config.json`` says, a picture is resized and its centre cropped, or squeezed to the
    size; without one, the largest centred piece of the right shape is resized. Cameras' rotation marks (EXIF) are
    followed, transparent pixels become white, grey becomes colour.

    Args:
        model: from :func:`sinklens.load_model`, of an image model.
        sources: a path, a PIL image, or an array of 8-bit [height, width], [height, width, 3 or 4]; or several.
        size: pixels of the square, or (height, width), multiples of the patch; default what the model was trained
            with. Others need position embeddings that follow, as DINOv2's do.
        mean, std: of the normalisation, per colour; default the model's own, else ImageNet's.

    Raises:
        BadInputError: no picture, a file that is none or half of one, a moving picture, a shape or type that is no
            picture, a size that the model cannot take.
        UnsupportedModelError: a text model.
        SinklensError: Pillow is not installed.
    """
    if not isinstance(model, PlainModel) or not reads_images(model):
        raise UnsupportedModelError(
            "load_images needs a model that reads images; this one reads text (use load_tokens)"
        )
    facts = model.capabilities
    given: list[Any] = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if not given:
        raise BadInputError("no pictures: give at least one path, PIL image or array")
    height, width = _checked_size(facts, size)
    about = model.preprocessing
    crop, resample = _crop_share(about, (height, width)), int(about.get("resample", 3))
    pictures, names = [], []
    for number, source in enumerate(given):
        image, name = _read(source, number)
        pictures.append(_fitted(image, height, width, crop, resample))
        names.append(name)
    if about.get("rescale_factor", 1 / 255) != 1 / 255 or not about.get("do_rescale", True):
        raise BadInputError(f"{facts.model} wants pixels on another scale than 0 to 1, which load_images does not make")
    normalised = about.get("do_normalize", True)
    mean = tuple(mean or (about.get("image_mean", IMAGENET_MEAN) if normalised else (0.0, 0.0, 0.0)))
    std = tuple(std or (about.get("image_std", IMAGENET_STD) if normalised else (1.0, 1.0, 1.0)))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BadInputError(f"mean and std are three numbers each, std above 0; got {mean}, {std}")
    info = {"source": "images", "model": facts.model, "size": [height, width], "kept": crop, "resample": resample}
    return _batch(torch.from_numpy(np.stack(pictures)), names, facts, mean, std, info)


def as_images(model: PlainModel, tokens: Any) -> Images:
    """The batch, if it was made for this model.

    Raises:
        BadInputError: something else.
    """
    facts = model.capabilities
    if not isinstance(tokens, Images):
        raise BadInputError(
            f"{facts.model} reads images: pass load_images(model, [path, ...]), got {type(tokens).__name__}"
        )
    assert facts.patch is not None
    height, width = tokens.pictures.shape[1:3]
    if tokens.prefix != len(facts.prefix) or tokens.grid != (height // facts.patch[0], width // facts.patch[1]):
        raise BadInputError(f"these images were made for another model than {facts.model}; load them again for it")
    _checked_size(facts, (height, width))
    return tokens.to(model.device)


def _batch(
    pictures: Tensor,
    names: list[str],
    facts: PlainCapabilities,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    info: dict[str, Any],
) -> Images:
    assert facts.patch is not None
    count = len(pictures)
    grid = (pictures.shape[1] // facts.patch[0], pictures.shape[2] // facts.patch[1])
    labels = facts.prefix + tuple(f"patch {row},{column}" for row in range(grid[0]) for column in range(grid[1]))
    ids = torch.arange(len(labels)).expand(count, -1).contiguous()
    return Images(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        labels=(labels,) * count,
        sources=tuple(names),
        documents=tuple(range(count)),
        special=ids < len(facts.prefix),
        info=info,
        pictures=pictures,
        grid=grid,
        prefix=len(facts.prefix),
        mean=mean,
        std=std,
    )


def _checked_size(facts: PlainCapabilities, size: int | tuple[int, int] | None) -> tuple[int, int]:
    assert facts.patch is not None
    assert facts.image_size is not None
    wanted = facts.image_size if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])
    if any(w < p or w % p for w, p in zip(wanted, facts.patch, strict=True)):
        raise BadInputError(f"size {wanted} is no multiple of the patch of {facts.model}, {facts.patch} pixels")
    if wanted != facts.image_size and not facts.any_size:
        raise BadInputError(
            f"{facts.model} has places for {facts.image_size} pixels only and cannot interpolate them: leave size out"
        )
    return wanted


def _crop_share(about: dict[str, Any], size: tuple[int, int]) -> float | None:
    """How much of the largest centred piece is kept: 224 / 256 where that was the training's way; None: squeeze."""
    declared, crop = about.get("size"), about.get("crop_size")
    if isinstance(declared, dict) and "shortest_edge" not in declared and not about.get("do_center_crop", False):
        return None
    shortest = declared.get("shortest_edge") if isinstance(declared, dict) else declared
    edge = crop.get("height") if isinstance(crop, dict) else crop
    if about.get("do_center_crop", False) and shortest and edge and size[0] == size[1]:
        return min(1.0, edge / shortest)
    return 1.0


def _read(source: Any, number: int) -> tuple[Any, str]:
    """An RGB picture, turned upright, and its name."""
    try:
        from PIL import Image, ImageOps  # optional
    except ImportError as error:
        raise SinklensError("pictures need Pillow: pip install 'sinklens[images]'") from error
    name = f"image {number}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, (str, os.PathLike)):
                name = Path(source).name
                image = Image.open(source)
            elif isinstance(source, np.ndarray):
                image = Image.fromarray(_checked_array(source, name))
            elif isinstance(source, Image.Image):
                image = source
            else:
                raise BadInputError(
                    f"{name}: a picture is a path, a PIL image or a numpy array of 8-bit numbers, got "
                    f"{type(source).__name__}"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # cameras put a preview behind the picture
                raise BadInputError(f"{name} is a moving picture of {frames} frames; pass one of them: frame.copy()")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image), name), name
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{name} is too large to unpack safely ({error}); make it smaller first") from error
    except FileNotFoundError as error:
        raise BadInputError(f"no picture at {str(source)!r}") from error
    except BadInputError:
        raise
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow's readers raise all of them on damaged files
        raise BadInputError(f"{str(source)!r} is no picture that Pillow can read, or half of one ({error})") from error


def _checked_array(array: np.ndarray, name: str) -> np.ndarray:
    flat = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if flat.dtype != np.uint8:
        raise BadInputError(f"{name}: an array must hold 8-bit numbers from 0 to 255 (uint8), got {array.dtype}")
    if flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[-1] not in (3, 4)) or 0 in flat.shape:
        raise BadInputError(f"{name}: an array is [height, width] or [height, width, 3 or 4], got {array.shape}")
    return np.ascontiguousarray(flat)


def _as_rgb(image: Any, name: str) -> Any:
    from PIL import Image  # optional

    if image.mode.startswith("I"):  # 16 bits of grey
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadInputError(f"{name} has more than 16 bits of grey; convert it to 8 bits first")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadInputError(f"{name} holds floating-point grey without a known range; convert it to 8 bits first")
    if "A" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def _fitted(image: Any, height: int, width: int, crop: float | None, resample: int) -> np.ndarray:
    """The picture at the model's size: its centred piece of the right shape, or all of it squeezed (crop None)."""
    box = (0.0, 0.0, float(image.width), float(image.height))
    if crop is not None:
        scale = min(image.width / width, image.height / height) * crop
        half = (scale * width / 2, scale * height / 2)
        middle = (image.width / 2, image.height / 2)
        box = (middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1])
        box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((width, height), resample, box=box))
