"""Interventions by name: the public builders of hooks, and users' own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sinklens.ablate.ablate import ablate_sinks
from sinklens.ablate.patch_bos import patch_bos
from sinklens.ablate.residual import ablate_residual
from sinklens.ablate.swap import restrict_attention, swap_attention
from sinklens.core.errors import BadInputError
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import named_tokens
from sinklens.sweep.specs import FOUND, InterventionSpec, TextSpec, spec_of

if TYPE_CHECKING:
    from sinklens.sweep.measurement import Measurement

BUILDERS: dict[str, Any] = {
    "ablate_sinks": ablate_sinks,
    "ablate_residual": ablate_residual,
    "swap_attention": swap_attention,
    "restrict_attention": restrict_attention,
    "patch_bos": patch_bos,
}
AT_SINKS = ("ablate_sinks", "ablate_residual", "restrict_attention")
_GIVEN = {"model", "tokens", "sinks", "progress"}
_MEANS = ("mean_value", "fixed_key", "fixed_logit", "massive_mean", "project")


def check_edit(spec: InterventionSpec) -> None:
    """Refuse an unknown builder or parameter before anything runs.

    Raises:
        BadInputError: as said.
    """
    if spec.build == "none":
        return
    if ":" in spec.build:
        function_of(spec.build)
        return
    if spec.build not in BUILDERS:
        raise BadInputError(
            f"no intervention {spec.build!r}; there are none, {', '.join(BUILDERS)}, and package.module:function"
        )
    known = set(inspect.signature(BUILDERS[spec.build]).parameters) - _GIVEN
    unknown = sorted(set(spec.parameters) - known)
    if unknown:
        raise BadInputError(f"{spec.build} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    wants = spec.build in AT_SINKS
    if (spec.sinks is not None) != wants and spec.build != "restrict_attention":
        raise BadInputError(f"{spec.build} needs sinks=" if wants else f"{spec.build} takes no sinks=")
    if isinstance(spec.sinks, str) and spec.sinks not in (*FOUND, "learned"):
        raise BadInputError(f"sinks={spec.sinks!r} is unknown; take {', '.join(FOUND)}, learned, or positions")
    mode = spec.parameters.get("mode")
    needs = mode in _MEANS or (mode == "rescale" and spec.parameters.get("g") is None)
    if needs and spec.finds and not isinstance(spec.parameters.get("reference"), dict):
        raise BadInputError(
            f"{spec.label}: a job takes means over a text of its own, or pieces of a split text would differ; give "
            f"reference: {{source: python-docs, n_seqs: 16, seq_len: 128}}"
        )


def function_of(name: str) -> Any:
    """A user's ``package.module:function``.

    Raises:
        BadInputError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInputError(f"cannot import {name!r}: {error}") from error
    if not callable(found):
        raise BadInputError(f"{name!r} is no function")
    return found


def build_edit(spec: InterventionSpec, measured: Measurement) -> Sequence[Any]:
    """The hooks of an intervention for the sequences of a piece."""
    model, tokens = measured.model, measured.tokens
    parameters = {name: _value(name, value, measured) for name, value in spec.parameters.items()}
    if ":" in spec.build:
        return function_of(spec.build)(model, tokens, **parameters)
    if spec.build == "patch_bos":
        return patch_bos(model, tokens, **parameters)
    if spec.build == "swap_attention":
        return swap_attention(model, **parameters)
    if spec.build == "restrict_attention":
        given = {} if spec.sinks is None else {"sinks": _sinks(spec, measured)}
        return restrict_attention(model, **given, **parameters)
    return BUILDERS[spec.build](model, _sinks(spec, measured), **parameters, progress=False)


def _sinks(spec: InterventionSpec, measured: Measurement) -> Any:
    if spec.finds:
        return measured.chosen
    if isinstance(spec.sinks, dict):
        return named_tokens(measured.model, *spec.sinks.get("tokens", ()))
    return spec.sinks


def _value(name: str, value: Any, measured: Measurement) -> Any:
    if name == "heads" and isinstance(value, list):
        return [tuple(head) if isinstance(head, list) else head for head in value]
    if name == "reference" and isinstance(value, dict):
        return _reference(spec_of(TextSpec, value), measured)
    return value


def _reference(spec: TextSpec, measured: Measurement) -> Tokens:
    """The reference, without documents that the measured text (all of it, not the piece alone) holds."""
    found = load_text(measured.model, spec, measured.seed if spec.seed is None else spec.seed)
    corpus = found.info.get("corpus_sha256")
    if corpus is None or corpus != measured.whole.info.get("corpus_sha256"):
        return found
    kept = [b for b, document in enumerate(found.documents) if document not in set(measured.whole.documents)]
    if not kept:
        raise BadInputError("every document of reference= is in the measured text too; take more, or another seed")
    return found[kept]


def load_text(model: Any, spec: TextSpec, seed: int) -> Tokens:
    """The tokens of a text, all sequences."""
    options = {"n_seqs": spec.n_seqs, "seq_len": spec.seq_len, "min_len": spec.min_len}
    source = spec.source if spec.texts is None else list(spec.texts)
    assert source is not None  # a TextSpec has one of the two
    return load_tokens(model, source, **options, seed=seed, prepend_bos=spec.prepend_bos)
