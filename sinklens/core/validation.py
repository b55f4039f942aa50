"""``@public``: what every public function checks first, in one place: what kind each argument is, and whose turn it is.

Arguments are compared with the function's own annotations, so that a wrong one is a BadInputError that names it before
anything runs. Functions of one model that run in several threads take turns: hooks and attention settings belong to the
model, and two functions that set them at once would each measure the other's edit.
"""

from __future__ import annotations

import collections.abc
import errno
import inspect
import math
import os
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from sinklens.core.errors import BadInputError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")
_BOUNDS = {
    "seed": (0, 2**32 - 1),
    "chunk": (1, 2**31),
    "columns": (-(2**24), 2**24),
}  # of numbers that mean the same in every function
_PATHS = ("path", "folder", "out", "runs", "resume")
_turns: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_hook_names: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
_guard = threading.Lock()


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Check arguments against the annotations, then run the function while no other thread runs one on its model.

    Raises:
        BadInputError: an argument of another kind, a number that is none (NaN), arguments that do not fit.
    """
    generator = inspect.isgeneratorfunction(inspect.unwrap(function))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        signature, hints = _described(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadInputError(f"{function.__name__}: {error}; its arguments are {signature}") from None
        model = bound.arguments.get("model")
        named = isinstance(model, (str, os.PathLike))  # where a function loads its model itself
        if named and "str" not in str(signature.parameters["model"].annotation):
            raise BadInputError(f"{function.__name__}: model must come from load_model, got the name {str(model)!r}")
        if model is not None and not named and not hasattr(model, "original_model") and not hasattr(model, "forward"):
            raise BadInputError(f"{function.__name__}: model must come from load_model, got a {type(model).__name__}")
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if (
                kind is inspect.Parameter.VAR_KEYWORD
                or name not in hints
                or (name, "Bridge" in _words(hints[name])) == ("model", True)
            ):
                continue
            values = value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)
            for one in values:
                _check(function.__name__, name, one, hints[name])
            if isinstance(value, Integral) and not isinstance(value, (bool, int)):
                bound.arguments[name] = int(value)  # numpy's
        if model is not None and not named:
            _check_hooks(model, bound.arguments)
        if generator or model is None or named:
            return function(*bound.args, **bound.kwargs)
        with turn(model):
            return function(*bound.args, **bound.kwargs)

    return checked


def public_methods(kind: type[C]) -> type[C]:
    """A class whose own methods with arguments check them as public functions do."""
    for name, member in list(vars(kind).items()):
        method = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        called = not name.startswith("_") or name in ("__getitem__", "__call__")
        if called and inspect.isfunction(method) and len(inspect.signature(method).parameters) > 1:
            checked = public(method)
            setattr(kind, name, type(member)(checked) if method is not member else checked)
    return kind


def _check_hooks(model: Any, given: Mapping[str, Any]) -> None:
    """Hook lists are pairs of a name that the model has (or a function on names) and a function."""
    lists = [("hooks", given.get("hooks"))]
    for several in ("conditions", "interventions"):
        value = given.get(several)
        lists += (
            [(f"{several}[{name!r}]", hooks) for name, hooks in value.items()] if isinstance(value, Mapping) else []
        )
    for what, hooks in lists:
        if hooks is None or callable(hooks) or isinstance(hooks, str):
            continue
        for item in hooks:
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not callable(item[1]):
                raise BadInputError(f"{what} must be a list of (hook name, function), got the item {item!r}")
            if isinstance(item[0], str) and not _has_hook(model, item[0]):
                raise BadInputError(f"{what}: the model has no hook {item[0]!r}; model.hook_dict lists them")


def _has_hook(model: Any, name: str) -> bool:
    """Whether a bridge has a hook of this name (its table is built anew at every look, so what was found is kept)."""
    if model is None or not hasattr(type(model), "hook_dict"):
        return True  # no bridge: the function itself says what it needs
    seen = _hook_names.setdefault(model, set())
    if name not in seen and name in model.hook_dict:
        seen.add(name)
    return name in seen


def turn(model: Any) -> threading.RLock:
    """The lock of a model: held by the thread whose function runs on it, again and again by the same one."""
    with _guard:
        return _turns.setdefault(model, threading.RLock())


def _check(function: str, name: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        shown = repr(value) if len(repr(value)) <= 80 else f"a {type(value).__name__}"
        raise BadInputError(f"{function}: {name} must be {_words(hint)}, got {shown}")
    if isinstance(value, float) and math.isnan(value):
        raise BadInputError(f"{function}: {name} is NaN; give a number")
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, Integral) and abs(int(one)) >= 2**63:
            raise BadInputError(f"{function}: {name} is beyond 64 bits: {one}")
    low, high = _BOUNDS.get(name, (-math.inf, math.inf))
    if isinstance(value, Integral) and not low <= int(value) <= high:
        raise BadInputError(f"{function}: {name} must be {low} to {high}, got {value}")
    if name in _PATHS and isinstance(value, (str, os.PathLike)):
        _check_path(function, name, os.fspath(value))


def _check_path(function: str, name: str, path: str) -> None:
    try:
        os.path.lexists(path)
        os.stat(path)
    except ValueError as error:
        raise BadInputError(f"{function}: {name} cannot be a path: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadInputError(f"{function}: {name} cannot be a path: {error.strerror}") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated kind. Numbers of numpy count as numbers, bool does not; unknown hints fit."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, Named):
        return hint.hold(value)
    if hint is Any or isinstance(hint, (str, TypeVar)):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return isinstance(value, (str, bool)) and any(isinstance(value, type(one)) and value == one for one in args)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        return all(fits(v, args[0]) for v in value) if args[-1:] == (...,) else _each(value, args)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
            return isinstance(value, str) and args[:1] == (str,)
        return not hasattr(value, "tolist") and all(fits(one, args[0]) for one in value)
    if origin is collections.abc.Iterable:
        listed = isinstance(value, (list, tuple))
        return all(fits(one, args[0]) for one in value) if listed else hasattr(value, "__next__")
    if origin is collections.abc.Callable or hint is Callable:
        return callable(value)
    if hasattr(hint, "array_type"):  # jaxtyping's own check would bind the names of axes for the caller too
        return isinstance(value, hint.array_type) and _array_fits(value, hint)
    plain = origin if origin is not None else hint
    return not isinstance(plain, type) or not _checkable(plain) or isinstance(value, plain)


def _array_fits(value: Any, hint: Any) -> bool:
    dtype = str(value.dtype).rpartition(".")[2]
    return dtype in hint.dtypes and (hint.index_variadic is not None or value.ndim == len(hint.dims))


def _checkable(plain: type) -> bool:
    return not getattr(plain, "_is_protocol", False) and not plain.__module__.startswith("jaxtyping")


def _each(value: Sequence[Any], kinds: Sequence[Any]) -> bool:
    return len(value) == len(kinds) and all(fits(v, k) for v, k in zip(value, kinds, strict=True))


def _words(hint: Any) -> str:
    args = get_args(hint)
    if isinstance(hint, Named):
        return " or ".join(hint.names)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if len(args) == 1 and get_origin(args[0]) is Literal:  # a list of choices
        return f"a list of {', '.join(map(str, get_args(args[0])))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(one) for one in args)
    if hint in (int, float, str, bool, None, type(None)):
        return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}.get(hint, "None")
    name = getattr(hint, "__name__", str(hint))
    return f"{name}[{', '.join(_words(one) for one in args if one is not ...)}]" if args else name


@dataclass(frozen=True)
class Named:
    """Classes by name, and None."""

    names: tuple[str, ...]

    def hold(self, value: Any) -> bool:
        """Whether the value is of one of them; names with brackets or dots are not compared."""
        if any(not name.isidentifier() for name in self.names):
            return True
        return ("None" in self.names and value is None) or any(
            one.__name__ in self.names for one in type(value).__mro__
        )


@cache
def _described(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The signature, and the annotations that mean something at run time."""
    plain = inspect.unwrap(function)
    hints = {}
    for name, written in getattr(plain, "__annotations__", {}).items():
        try:
            alone = types.SimpleNamespace(__annotations__={name: written})
            hints |= get_type_hints(alone, plain.__globals__)
        except NameError:  # a class that only type checkers import, to keep `import sinklens` quick: compared by name
            hints[name] = Named(tuple(part.strip() for part in str(written).split("|")))
        except TypeError:
            continue  # an alias that is itself a string
    hints.pop("return", None)
    return inspect.signature(function), hints


def shortened(text: str, most: int = 60) -> str:
    """A text as an error message may quote it."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"
