"""What a job is made of, as plain data: a model, a text, an intervention, a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sinklens.core.errors import BadInputError

FOUND = ("all", "primary", "secondary")
Spec = TypeVar("Spec", "ModelSpec", "TextSpec", "InterventionSpec", "TaskSpec")


def exists(path: Path) -> bool:
    """Whether there is something at a path; False for what can be no path at all, such as a long text."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how it is loaded: the arguments of :func:`sinklens.load_model`.

    Attributes:
        name: an embedded model, a folder, a .gguf file or a hub id.
        dtype, device, device_map, max_memory, offload_folder: as there; ``device_map`` is for models larger than one
            device.
        label: what tables call it; default the last part of the name.
    """

    name: str
    dtype: str = "float32"
    device: str | None = None
    device_map: Any = None
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: str | None = None
    label: str = ""
    main: ClassVar[str] = "name"

    def __post_init__(self) -> None:
        path = Path(self.name).expanduser()
        there = exists(path)
        if there:  # workers run elsewhere
            object.__setattr__(self, "name", str(path.resolve()))
        for plain in ("device_map", "max_memory"):
            object.__setattr__(self, plain, _plain(getattr(self, plain)))
        if not self.label:
            object.__setattr__(self, "label", Path(self.name).name if there else self.name)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``load_model``."""
        given = {"device": self.device, "device_map": self.device_map, "offload_folder": self.offload_folder}
        if self.max_memory is not None:  # JSON has made strings of the numbers of devices
            given["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in self.max_memory.items()}
        return {"dtype": self.dtype, **{name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True)
class TextSpec:
    """A text: the arguments of :func:`sinklens.load_tokens`, and which of its sequences a job takes.

    Attributes:
        source: a corpus, a text or .jsonl file, a dataset id, ``random`` or ``repeat``; or
        texts: the texts themselves.
        n_seqs, seq_len, min_len, prepend_bos: as there.
        seed: of the choice of documents or random ids; default the job's seed.
        rows: (first, end) of the sequences of this piece; None: all.
        label: what tables call it.
    """

    source: str | None = None
    texts: Sequence[str] | None = None
    n_seqs: int | None = None
    seq_len: int | None = None
    min_len: int | None = None
    prepend_bos: bool | None = None
    seed: int | None = None
    rows: Sequence[int] | None = None
    label: str = ""
    main: ClassVar[str] = "source"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.texts is None):
            raise BadInputError(
                "a text needs source= (a corpus or file) or texts= (the texts themselves), and not both"
            )
        if self.texts is not None:
            if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
                raise BadInputError("texts= must be a list of strings")
            object.__setattr__(self, "texts", tuple(self.texts))
        if self.rows is not None:
            if len(self.rows) != 2 or not 0 <= self.rows[0] < self.rows[1]:
                raise BadInputError(f"rows must be (first, end) with 0 <= first < end, got {self.rows}")
            object.__setattr__(self, "rows", tuple(self.rows))
        path = None if self.source is None else Path(self.source).expanduser()
        in_file = path is not None and exists(path) and path.is_file()
        if path is not None and in_file:
            object.__setattr__(self, "source", str(path.resolve()))
        if not self.label:
            written = "\0".join(self.texts or ())
            literal = f"texts {hashlib.sha256(written.encode()).hexdigest()[:8]}"
            name = literal if path is None else path.name if in_file else str(self.source)
            sizes = "x".join(str(n) for n in (self.n_seqs, self.seq_len) if n is not None)
            object.__setattr__(self, "label", f"{name} {sizes}".strip())

    @property
    def whole(self) -> TextSpec:
        """The text of which this is a piece."""
        return replace(self, rows=None)

    def split(self, pieces: int) -> tuple[TextSpec, ...]:
        """The text in so many pieces of nearly the same number of sequences, in order."""
        count = self.n_seqs or (len(self.texts) if self.texts is not None else None)
        if count is None or self.rows is not None or not 1 <= pieces <= count:
            raise BadInputError(
                f"{self.label!r} cannot be split into {pieces} pieces: give n_seqs= of at least as many sequences"
            )
        cuts = [count * n // pieces for n in range(pieces + 1)]
        return tuple(replace(self, rows=(a, b)) for a, b in zip(cuts, cuts[1:], strict=False))


@dataclass(frozen=True)
class InterventionSpec:
    """An edit by the name of its builder, or none.

    Attributes:
        build: ``none``, ``ablate_sinks``, ``ablate_residual``, ``swap_attention``, ``restrict_attention``,
            ``patch_bos``, or ``package.module:function`` called as ``function(model, tokens, **parameters)``.
        sinks: of the first two and of ``restrict_attention``: ``all``, ``primary`` or ``secondary`` sinks as
            :func:`sinklens.find_sinks` finds them in the piece's own sequences; positions; ``learned``; a number of
            first tokens (``restrict_attention``); or ``{"tokens": ["[CLS]", ...]}`` by name.
        parameters: the builder's others. ``reference`` is a text (:class:`TextSpec`, or a mapping of its fields); its
            documents that the measured text holds too are left out.
        label: what tables call it; default built from the above.
    """

    build: str = "none"
    sinks: Any = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    main: ClassVar[str] = "build"
    rest: ClassVar[str] = "parameters"

    def __post_init__(self) -> None:
        parameters = _plain(self.parameters)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "sinks", _plain(self.sinks))
        if self.build == "none" and (parameters or self.sinks is not None):
            raise BadInputError(f"the intervention 'none' takes nothing, got {parameters or self.sinks}")
        if not self.label:
            object.__setattr__(self, "label", _label(self.build, {"sinks": self.sinks, **parameters}))

    @property
    def finds(self) -> bool:
        """Whether it acts on sinks that are found first."""
        return isinstance(self.sinks, str) and self.sinks in FOUND


@dataclass(frozen=True)
class TaskSpec:
    """What is measured: one of :data:`sinklens.sweep.tasks.TASKS` or ``package.module:function``, with parameters.

    A function is called as ``function(model, tokens, hooks=hooks, seed=seed, **parameters)`` and gives a DataFrame, a
    list of mappings or one mapping; a column ``sequence`` counts within ``tokens``. A text that is split gives the same
    table as a whole one only if the function takes sequences one by one.
    """

    task: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    main: ClassVar[str] = "task"
    rest: ClassVar[str] = "parameters"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _plain(self.parameters))
        if not self.label:
            object.__setattr__(self, "label", _label(self.task, self.parameters))


def spec_of(kind: type[Spec], given: Any) -> Spec:
    """A spec from a spec, its main field alone, or a mapping of its fields.

    Raises:
        BadInputError: fields that there are not, or none of the above.
    """
    if isinstance(given, kind):
        return given
    make: Any = kind
    if isinstance(given, (str, Path)):
        return make(**{kind.main: str(given)})
    if not isinstance(given, Mapping):
        raise BadInputError(f"a {kind.__name__} must be a name or a mapping of its fields, got {given!r}")
    known = {f.name for f in fields(kind)}
    own = {name: value for name, value in given.items() if name in known}
    others = {name: value for name, value in given.items() if name not in known}
    rest = getattr(kind, "rest", None)
    if others and rest is None:
        raise BadInputError(
            f"a {kind.__name__} has no {', '.join(map(repr, others))}; it has {', '.join(sorted(known))}"
        )
    if others:
        own[str(rest)] = {**own.get(str(rest), {}), **others}
    if kind.main not in own and not (kind is TextSpec and "texts" in own):
        raise BadInputError(f"a {kind.__name__} needs {kind.main!r}, got {dict(given)}")
    return make(**own)


def _plain(value: Any) -> Any:
    """The value as JSON has it, so that a spec equals itself read back."""
    try:
        return json.loads(json.dumps(value, default=_as_mapping))
    except TypeError as error:
        raise BadInputError(f"parameters of a job must be plain data that JSON can hold ({error})") from error


def _as_mapping(value: Any) -> Any:
    if isinstance(value, TextSpec):
        return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) is not None}
    raise TypeError(f"{type(value).__name__} is no plain data")


def _label(name: str, parameters: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, Mapping):
            return "+".join(word(v) for v in value.values())
        return "+".join(map(word, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)

    given = ", ".join(f"{key}={word(value)}" for key, value in parameters.items() if value is not None)
    return f"{name}({given})" if given else name
