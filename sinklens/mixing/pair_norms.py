"""Jacobian norms of chosen pairs of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.mixing.jacobians import Stream, exact_columns, fitting_chunk, spectral_norm
from sinklens.show.progress import progress_bar

STEPS = 200


@public
def jacobian_norms(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    pairs: Sequence[tuple[int, int, int]],
    *,
    hooks: Sequence[Any] = (),
    spectral: bool = True,
    layer: int = 0,
    frozen_attention: bool = False,
    frozen_norms: bool = False,
    chunk: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Exact norms of chosen blocks ``J[l,i,j]`` of one sequence.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: one sequence.
        pairs: (layer l, row i, column j).
        hooks: edits in force.
        spectral: also the spectral norm, by power iteration to a relative change of 1e-6 (or 200 steps).
        layer, frozen_attention, frozen_norms, chunk: as for :func:`sinklens.measure_mixing`.
        progress: show a bar.

    Returns:
        One row per pair: ``layer, row, column, frobenius, spectral, stable_rank`` = (frobenius / spectral)^2.

    Cost: d_model tangents per distinct column; per spectral norm up to 200 tangents and backwards.

    Raises:
        BadInputError: several sequences, or a pair out of range.
        UnsupportedModelError: no forward mode on this host.
    """
    batch = as_tokens(model, tokens)
    if len(batch) != 1:
        raise BadInputError(f"give one sequence, got {len(batch)}")
    ids = batch.trim().ids.to(model.cfg.device)
    length, n_layers = ids.shape[1], int(model.cfg.n_layers)
    wrong = [p for p in pairs if not (layer <= p[0] < n_layers and 0 <= p[1] < length and 0 <= p[2] < length)]
    if wrong or not pairs:
        raise BadInputError(
            f"pairs are (layer, row, column) with layers {layer} to {n_layers - 1} and positions below {length}; got "
            f"{wrong or 'none'}"
        )
    stream = Stream(
        model, ids, hooks, layer=layer, frozen_attention=frozen_attention, frozen_norms=frozen_norms
    )  # fmt: skip
    columns = list(dict.fromkeys(j for _, _, j in pairs))
    rows = []
    with progress_bar("Jacobian norms", len(columns) + len(pairs) * spectral, progress) as advance:
        squares = {}
        for j in columns:
            squares[j] = exact_columns(stream, [j], chunk=fitting_chunk(stream, chunk))[..., 0]
            advance()
        for n, i, j in pairs:
            row: dict[str, Any] = {"layer": n, "row": i, "column": j}
            row["frobenius"] = float(squares[j][n - layer, i]) ** 0.5
            if spectral:
                row["spectral"] = spectral_norm(stream, n, i, j, steps=STEPS)
                row["stable_rank"] = (row["frobenius"] / row["spectral"]) ** 2 if row["spectral"] else float("nan")
                advance()
            rows.append(row)
    return pd.DataFrame(rows)
