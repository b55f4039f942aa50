"""Folders of the cache: whole, as their manifests recorded them, or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from sinklens.core.errors import SinklensError
from sinklens.core.storage import write_text


def cache_dir() -> Path:
    """The cache of sinklens: ``SINKLENS_CACHE``, else the platform's user cache."""
    override = os.environ.get("SINKLENS_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("sinklens"))


def is_complete(folder: Path) -> bool:
    """Whether a converted model is whole: every file is as its manifest recorded it.

    Sizes and times of change are compared, and the SHA-256 of a file whose time differs; a damaged manifest, or one
    that names a file outside the folder, means no.
    """
    manifest = folder / "sinklens.json"
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
        sizes, hashes, times = dict(known["sizes"]), dict(known["sha256"]), dict(known.get("mtime_ns", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not sizes or any(Path(name).name != name or name in ("", "..") for name in sizes):
        return False
    now = {name: (folder / name).stat() for name in sizes if (folder / name).is_file()}
    if set(now) != set(sizes) or any(now[name].st_size != size for name, size in sizes.items()):
        return False
    touched = [name for name in sizes if times.get(name) != now[name].st_mtime_ns]
    if any(sha256_of(folder / name) != hashes.get(name) for name in touched):
        return False
    if touched:  # moved or copied, but whole: not hashed again next time
        with contextlib.suppress(SinklensError):
            write_text(manifest, json.dumps(known | {"mtime_ns": {n: s.st_mtime_ns for n, s in now.items()}}, indent=1))
    return True


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill a folder in a temporary place and rename it when it is whole; one process at a time."""
    make_writable(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_complete(folder):  # another process was faster
            return
        for stale in folder.parent.glob(f".{folder.name}.partial*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial"))
        try:
            build(partial)
            files = sorted(p for p in partial.iterdir() if p.is_file())
            manifest = {
                "sizes": {p.name: p.stat().st_size for p in files},
                "sha256": {p.name: sha256_of(p) for p in files},
                "mtime_ns": {p.name: p.stat().st_mtime_ns for p in files},
            }
            (partial / "sinklens.json").write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            raise SinklensError(
                f"cannot write to the cache {str(folder)!r} ({error}); make room, or set SINKLENS_CACHE elsewhere"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def make_writable(folder: Path) -> None:
    """A folder of the cache, or an error that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is read-only")
    except OSError as error:
        raise SinklensError(
            f"cannot write to the cache {str(folder)!r} ({error}); set SINKLENS_CACHE to a folder that can be written"
        ) from error
