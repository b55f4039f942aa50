"""``check_model``: which functions are exact on a model, each against its formula written out, with measured errors.

The load-time proof says how a model's attention works; this says what the package makes of it. Every public function
that runs a model is called on two short sequences, and its result compared with a plain computation that shares no
kernel and no edit with it (:mod:`sinklens.check`): whole patterns in float64, loops over queries, automatic
differentiation of plain forwards. A function is

- **exact**: every part that ran agrees with its reference (parts of it may be refused, and are named),
- **refused**: it raises UnsupportedModelError, whose message says why and what to do,
- **wrong**: it disagrees, or
- **failed**: it raises something else.

The last two are faults: of this package, or of a host that changed. Please report them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import record
from sinklens.bridge.unbridged import PlainModel
from sinklens.check import (
    attention_checks as reading,
    cause_checks as causes,
    edit_checks as edits,
    head_checks as heads,
    mixing_checks as mixing,
    unbridged_checks as plain,
)
from sinklens.check.subject import LENGTH, Parts, Subject
from sinklens.core.errors import BadInputError, SinklensError, SinklensWarning, UnsupportedModelError
from sinklens.core.storage import atomic_path
from sinklens.core.validation import public, public_methods
from sinklens.inputs.images import Images, load_images
from sinklens.inputs.load import as_tokens, load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import vocabulary
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

CHECKS: dict[str, Callable[[Subject, Parts], None]] = {
    "load_model": reading.check_model_runs,
    "load_tokens": reading.check_tokens,
    "load_images": plain.check_no_images,
    "named_tokens": reading.check_named,
    "capabilities": reading.check_capabilities,
    "sink_scores": reading.check_scores,
    "find_sinks": reading.check_find,
    "compare_methods": reading.check_methods,
    "compare_contexts": reading.check_contexts,
    "attention_statistics": reading.check_statistics,
    "attention_map": reading.check_map,
    "attention_grid": reading.check_grid,
    "attention_view": heads.check_view,
    "head_activity": heads.check_activity,
    "sink_anatomy": reading.check_anatomy,
    "flash": reading.check_flash,
    "register_tokens": plain.check_no_registers,
    "token_loss": reading.check_loss,
    "ablate_sinks": edits.check_ablate,
    "ablate_residual": edits.check_residual,
    "patch_bos": edits.check_patch,
    "bos_variants": edits.check_variants,
    "swap_attention": edits.check_swap,
    "restrict_attention": edits.check_restrict,
    "run_experiment": edits.check_experiment,
    "sweep_ablation": edits.check_sweep,
    "matched_damage": edits.check_damage,
    "decompose_sinks": causes.check_decompose,
    "trace_sinks": causes.check_trace,
    "writer_neurons": causes.check_neurons,
    "plant_sinks": causes.check_planting,
    "writer_subspace": causes.check_subspace,
    "measure_mixing": mixing.check_mixing,
    "compare_mixing": mixing.check_compare,
    "mixing_conditions": heads.check_conditions,
    "mixing_by_length": mixing.check_lengths,
    "jacobian_norms": mixing.check_norms,
    "path_sums": mixing.check_paths,
    "perturbation_spread": mixing.check_perturbation,
    "measure_collapse": mixing.check_collapse,
}
WITHOUT_BRIDGE: dict[str, Callable[[Subject, Parts], None]] = {
    "load_model": plain.check_plain_loads,
    "sink_scores": plain.check_plain_scores,
    "find_sinks": plain.check_plain_find,
    "compare_methods": plain.check_plain_methods,
    "compare_contexts": plain.check_plain_contexts,
    "flash": plain.check_plain_flash,
}
IMAGES: dict[str, Callable[[Subject, Parts], None]] = {
    "load_images": plain.check_images,
    "register_tokens": plain.check_registers,
}
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
ROUGH = 0.1  # half precision


@dataclass(frozen=True)
class Checked:
    """One function on one model.

    Attributes:
        function, outcome: "exact", "refused", "wrong" or "failed".
        errors: by part, the largest difference from the reference: for edits as a share of what the edit changes, for
            other numbers over the largest of them (at least 1), for counts and ids how many differ.
        refused: by part, why.
        reason: why the whole function is refused, or how it failed.
    """

    function: str
    outcome: str
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def error(self) -> float:
        """The largest of all parts; NaN where none ran."""
        return max(self.errors.values(), key=lambda x: math.inf if x != x else x, default=math.nan)


@public_methods
@dataclass(frozen=True, eq=False)
class SelfTest(ShownInJupyter):
    """What :func:`check_model` found.

    Attributes:
        rows: one per function.
        tolerance: up to which an error counts as exact.
        info: model, capability record, versions.
    """

    rows: tuple[Checked, ...]
    tolerance: float
    info: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every function is exact or refused."""
        return all(row.outcome in ("exact", "refused") for row in self.rows)

    def __repr__(self) -> str:
        counts = {
            kind: sum(row.outcome == kind for row in self.rows) for kind in ("exact", "refused", "wrong", "failed")
        }
        told = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        lines = [f"SelfTest of {self.info['capabilities']['model']}: {told}"]
        for row in self.rows:
            note = row.reason or "; ".join(f"{part} refused: {why}" for part, why in row.refused.items())
            error = "" if row.error != row.error else f"{row.error:.1e}"
            lines.append(f"  {row.function:22}{row.outcome:9}{error:9}{note[:200]}".rstrip())
        return "\n".join(lines)

    def __getitem__(self, function: str) -> Checked:
        """One function's row."""
        for row in self.rows:
            if row.function == function:
                return row
        raise BadInputError(f"{function!r} was not checked; there are {', '.join(r.function for r in self.rows)}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per function and part: outcome of the function, error of the part, or why it is refused."""
        rows = []
        for row in self.rows:
            parts = [(p, e, "") for p, e in row.errors.items()] + [(p, math.nan, w) for p, w in row.refused.items()]
            for part, error, why in parts or [("", math.nan, row.reason)]:
                rows.append(
                    {"function": row.function, "outcome": row.outcome, "part": part, "error": error}
                    | {"reason": why or row.reason}
                )
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as CSV, whole or not at all."""
        with atomic_path(path) as partial:
            self.to_dataframe().to_csv(partial, index=False)
        return Path(path)


@public
def check_model(
    model: TransformerBridge | PlainModel,
    tokens: str | Sequence[str] | Tensor | Tokens | None = None,
    *,
    mask_id: int | None = None,
    functions: Sequence[str] | None = None,
    tolerance: float | None = None,
    progress: bool | None = None,
) -> SelfTest:
    """Run every function on two short sequences and compare it with its formula, written out.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: at least four sequences of 56 tokens (two are looked at, two are the reference of means); default: the
            first tokens of four documents of python-docs, or random ids where the model has no tokenizer or one that
            knows hardly any word of them; of image models pictures of random squares (two images of one size, or more).
        mask_id: the id of an encoder's [MASK], where its tokenizer names none.
        functions: some of ``sinklens.check.check.CHECKS``; default all.
        tolerance: default 1e-3 in float32 and float64, 0.1 in half precision.
        progress: show a bar.

    Cost: about 300 short forwards, and ``10 d_model`` tangents or backward passes of 8 tokens; minutes on a CPU for a
    model of 100M parameters. Memory: every layer's pattern of 112 tokens in float64, twice the logits.

    Raises:
        BadInputError: unknown functions, or too few or too short sequences.
    """
    facts = record(model)
    chosen = list(CHECKS if functions is None else functions)
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown or not chosen:
        raise BadInputError(f"no check of {', '.join(unknown) or 'nothing'}; there are {', '.join(CHECKS)}")
    dtype = model.dtype if isinstance(model, PlainModel) else model.cfg.dtype
    limit = tolerance if tolerance is not None else TOLERANCES.get(dtype, ROUGH)
    subject = _subject(model, tokens, mask_id)
    checks = CHECKS | (WITHOUT_BRIDGE if isinstance(model, PlainModel) else {})
    checks |= IMAGES if isinstance(subject.tokens, Images) else {}
    rows = []
    with progress_bar("self-test", len(chosen), progress) as advance:
        for name in chosen:
            rows.append(_checked(name, checks[name], subject, limit))
            advance()
    info: dict[str, Any] = {"capabilities": asdict(facts), "dtype": str(dtype)}
    info |= {name: version(name) for name in ("sinklens", "transformer-lens", "transformers", "torch")}
    return SelfTest(tuple(rows), limit, info)


def _subject(model: Any, tokens: Any, mask_id: int | None) -> Subject:
    if isinstance(model, PlainModel) and model.capabilities.reads == "images":
        pictures = plain.pictures() if tokens is None else tokens
        images = pictures if isinstance(pictures, Images) else load_images(model, pictures)
        if len(images) < 2:
            raise BadInputError("the self-test needs two images at least")
        return Subject(model, images[:2], images[:2])
    if tokens is None:
        source = "random" if vocabulary(model).tokenizer is None else "python-docs"
        batch = load_tokens(model, source, n_seqs=4, seq_len=LENGTH)
        ordinary = batch.ids.masked_fill(batch.special, -1)
        if min(len(row.unique()) for row in ordinary) < LENGTH // 3:  # a tokenizer that knows hardly any word
            batch = load_tokens(model, "random", n_seqs=4, seq_len=LENGTH)
    else:
        batch = as_tokens(model, tokens).to("cpu")
        if len(batch) < 4 or int(batch.lengths.min()) < LENGTH:
            raise BadInputError(f"the self-test needs four sequences of at least {LENGTH} tokens")
        batch = batch[:4].first(LENGTH)
    return Subject(model, batch[:2], batch[2:], mask_id)


def _checked(name: str, check: Callable[[Subject, Parts], None], subject: Subject, tolerance: float) -> Checked:
    parts = Parts()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            check(subject, parts)
    except UnsupportedModelError as error:
        parts.refused[""] = str(error)
    except (SinklensError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
            ArithmeticError, NotImplementedError) as error:  # fmt: skip
        return Checked(name, "failed", parts.errors, parts.refused, f"{type(error).__name__}: {str(error)[:400]}")
    if not parts.errors:
        reasons = list(dict.fromkeys(parts.refused.values()))
        return Checked(name, "refused", {}, parts.refused, reasons[0] if reasons else "nothing was measured")
    good = all(error <= tolerance for error in parts.errors.values())
    return Checked(name, "exact" if good else "wrong", parts.errors, parts.refused)
