"""``plant_sinks``: sufficiency. A writer's output, added at an ordinary token, should make a sink of it."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.residual.batched_edits import Row, check_writing, run_rows
from sinklens.residual.components import component_name
from sinklens.residual.contributions import stream_parts
from sinklens.show.progress import progress_bar
from sinklens.trace.phases import WRITER
from sinklens.trace.result import SinkTrace

PLANTED = ("writer", "random", "flipped")


@public
def plant_sinks(
    model: TransformerBridge,
    trace: SinkTrace,
    *,
    positions: tuple[int, ...] | None = None,
    n_positions: int = 2,
    n_random: int = 3,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Add what the writer of each traced phase wrote at its sink to the same component's output at ordinary tokens.

    Args:
        model: the traced model.
        trace: from :func:`sinklens.trace_sinks` on this model.
        positions: the tokens to plant at; default: drawn from those that are no sink and leave 32 queries behind them.
        n_positions: how many are drawn per phase.
        n_random: how many random vectors of the same norm stand beside each.
        seed: of the draws.
        progress: show a bar.

    Returns:
        One row per (phase, writer, planted position, what was added): ``writer``, ``random`` (equal norm, means over
        ``n_random``) or ``flipped`` (the writer's output with its sign turned); ``alpha``, ``beta``, ``margin``: means
        over the phase's layers behind the writer, ``d_``: against the same token unplanted.

    Cost: one forward per sequence and one batch of (2 + n_random) rows per planted position.

    Raises:
        BadInputError: no writer in the trace, or positions that are sinks or out of range.
    """
    capabilities(model)  # refuses a model without hooks
    if not any(share >= WRITER and c[0] != "embed" for one in trace.traced for c, share in one.shares()):
        raise BadInputError("this trace names no writer, so there is nothing to plant")
    draw = torch.Generator().manual_seed(seed)
    rows = []
    checked: set[str] = set()
    with progress_bar("planting sinks", len(trace.traced), progress) as advance:
        for one in trace.traced:
            ids = trace.tokens[one.sequence].trim().ids.to(model.cfg.device)
            length = ids.shape[1]
            sinks = [s.position for s in trace.sinks if s.sequence == one.sequence]
            no_sink = torch.ones(length, dtype=torch.bool, device=ids.device)
            no_sink[sinks] = False
            for component, share in one.shares():
                if share < WRITER or component[0] not in ("attn", "mlp"):
                    continue
                chosen = _chosen(positions, no_sink, n_positions, draw)
                parts = stream_parts(model, ids, [one.position, *chosen], no_sink)
                if component[0] not in checked:
                    check_writing(model, ids, component, one.position)
                    checked.add(component[0])
                vector = parts.added[parts.components.index(component), 0]
                for n, p in enumerate(chosen):
                    added = _vectors(vector, n_random, draw)
                    batch = [Row(None), *(Row(component, (p,), v[None]) for _, v in added)]
                    seen = run_rows(model, ids, batch, [p], no_sink, last=one.phase.end)
                    inside = slice(max(one.phase.onset, component[1] + 1), one.phase.end + 1)
                    for what in PLANTED:
                        mine = [r + 1 for r, (name, _) in enumerate(added) if name == what]
                        row = {
                            "sequence": one.sequence,
                            "sink": one.position,
                            "kind": one.kind,
                            "phase": one.number,
                            "writer": component_name(component),
                            "position": p,
                            "token": trace.tokens.labels[one.sequence][p],
                            "added": what,
                            "norm": float(vector.norm()),
                            "norm_before": float(parts.states[component[1], n + 1].norm()),
                        }
                        for name in ("alpha", "beta", "margin"):
                            values = getattr(seen, name)[:, 0, inside].nanmean(-1)
                            row[name] = float(values[mine].mean())
                            row[f"d_{name}"] = row[name] - float(values[0])
                        rows.append(row)
            advance()
    return pd.DataFrame(rows)


def _chosen(positions: tuple[int, ...] | None, no_sink: Tensor, n_positions: int, draw: torch.Generator) -> list[int]:
    length = len(no_sink)
    if positions is not None:
        wrong = [p for p in positions if not 0 <= p < length or not bool(no_sink[p])]
        if wrong:
            raise BadInputError(
                f"positions {wrong} are sinks or out of range: plant at ordinary tokens, 0 to {length - 1}"
            )
        return list(positions)
    free = [p for p in no_sink.nonzero().flatten().tolist() if p < length - 48] or no_sink.nonzero().flatten().tolist()
    order = torch.randperm(len(free), generator=draw).tolist()
    return sorted(free[i] for i in order[:n_positions])


def _vectors(
    vector: Float[Tensor, " d_model"], n_random: int, draw: torch.Generator
) -> list[tuple[str, Float[Tensor, " d_model"]]]:
    found = [("writer", vector), ("flipped", -vector)]
    for _ in range(n_random):
        noise = torch.randn(vector.shape, generator=draw).to(vector)
        found.append(("random", noise * (vector.norm() / noise.norm())))
    return found
