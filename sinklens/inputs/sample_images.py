"""Three photographs that are always at hand: they lie in scikit-image's wheel, which is fetched once for them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from sinklens.core.validation import public
from sinklens.models.cache import build_folder, cache_dir, is_complete
from sinklens.models.catalogue import Wheel
from sinklens.models.fetch import fetch_wheel, wheel_path

NAMES = ("astronaut", "chelsea", "coffee")
_WHEEL = Wheel(
    "scikit-image==0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64", "--python-version", "3.11"),
)


@public
def sample_images() -> list[Path]:
    """A portrait (NASA, public domain), a cat (by S. van der Walt, CC0) and a cup of coffee (by R. Michetti, CC0).

    PNG files in the cache; 14 MB are fetched with pip on first use, and the three pictures of it kept. They come with
    scikit-image, which is not installed.

    Raises:
        SinklensError: pip could not fetch the wheel, or its checksum differs.
    """
    folder = cache_dir() / "pictures"
    if not is_complete(folder):

        def build(partial: Path) -> None:
            with zipfile.ZipFile(fetch_wheel(_WHEEL, "three photographs")) as archive:
                for name in NAMES:
                    (partial / f"{name}.png").write_bytes(archive.read(f"skimage/data/{name}.png"))

        build_folder(folder, build)
        wheel_path(_WHEEL).unlink(missing_ok=True)
    return [folder / f"{name}.png" for name in NAMES]
