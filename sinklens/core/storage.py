"""How results are written and read: one safetensors file, its metadata as JSON in the header, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sinklens.core.errors import BadInputError

FORMAT = 1
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # other machines' processes are not ours to judge


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes when it does not.

    Raises:
        BadInputError: nothing can be written there, or the disk is full.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise BadInputError(f"{os.fspath(path)!r} is a folder; give a file name in it")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.{_HOST}-{os.getpid()}.")
    except BadInputError:
        raise
    except (OSError, ValueError) as error:
        raise BadInputError(f"cannot write {os.fspath(path)!r}: {error}") from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp makes private files; a result is an ordinary one
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # safetensors' writer has its own error for a full disk
        raise BadInputError(f"cannot write {os.fspath(path)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there.

    Raises:
        BadInputError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot write {os.fspath(path)!r}: {error}") from error
    return Path(path)


def _remove_orphans(target: Path) -> None:
    """Remove what killed processes of this machine were writing in place of this file."""
    begin = f".{target.name}.{_HOST}-"
    for orphan in target.parent.iterdir():
        owner = orphan.name.removeprefix(begin).split(".")[0]
        if orphan.name.startswith(begin) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            orphan.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any]
) -> Path:
    """Write named tensors and JSON-able metadata as one safetensors file, whole or not at all."""
    kept: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        kept[name] = plain.clone() if memory in memories else plain  # the format holds no two names of one memory
        memories.add(memory)
    header = {"sinklens": json.dumps({"format": FORMAT, "kind": kind, "sha256": _digest(kept, meta), "meta": meta})}
    with atomic_path(path) as partial:
        save_file(kept, partial, metadata=header)
    return Path(path)


def _digest(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> str:
    """A hash of everything in the file, so that a changed bit is noticed and never becomes a wrong number."""
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of result that a file holds, from its header alone.

    Raises:
        BadInputError: no such file, half a file, or one that sinklens did not write.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BadInputError(f"path must be the path of a saved result, got a {type(path).__name__}")
    name = os.fspath(path)
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("sinklens", "null"))
    except (SafetensorError, OSError, ValueError):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))  # a Reproductions is a JSON file
        except (OSError, ValueError) as error:
            there = os.path.exists(name) if "\0" not in name else False
            raise BadInputError(
                f"{name!r} is no complete file of a result ({error})" if there else f"no result file at {name!r}"
            ) from error
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise BadInputError(f"{name!r} was not written by a result's save: no header says what it holds")
    return content["kind"]


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        BadInputError: no such file, half a file, a changed bit, or a result of another kind.
    """
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # what can be no name of a file
        there = False
    if not there:
        raise BadInputError(f"no result file at {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("sinklens")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"{os.fspath(path)!r} is not a complete safetensors file ({error}); save the result again"
        ) from error
    if header is None:
        raise BadInputError(f"{os.fspath(path)!r} was not written by sinklens: it has no sinklens header")
    try:
        content = json.loads(header)
        found, written, meta = content["kind"], int(content["format"]), content["meta"]
        expected = content.get("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"the sinklens header of {os.fspath(path)!r} is damaged ({error}); save it again"
        ) from error
    if found != kind:
        raise BadInputError(f"{os.fspath(path)!r} holds a {found}, not a {kind}")
    if written > FORMAT:
        raise BadInputError(f"{os.fspath(path)!r} was written by a newer sinklens; upgrade to read it")
    if expected is not None and expected != _digest(tensors, meta):  # files of earlier versions have none
        raise BadInputError(f"{os.fspath(path)!r} is damaged: its content has another SHA-256; save the result again")
    return tensors, meta
