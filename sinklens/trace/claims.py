"""The claims of Wong et al. 2025 about secondary sinks that a trace answers, each as a function with a verdict.

(1) the writer's output at the sink lies along the primary's direction; (2) its norm sets the sink's mass and lifetime;
(3) the primary weakens where secondary sinks are alive; (4) sinks come in few levels of (onset, lifetime). The fifth,
the input subspace, needs the model: :func:`sinklens.trace.writer_subspace`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import rank_correlation
from sinklens.core.validation import public
from sinklens.find.lifetimes import Kind
from sinklens.find.sinkmap import Sink, SinkMap
from sinklens.residual.components import component_name
from sinklens.trace.doses import dose_table, of_kind, sink_label
from sinklens.trace.phases import Traced
from sinklens.trace.result import SinkTrace
from sinklens.trace.verdicts import Verdict, above, every, quantity

ALIGNED = 0.5  # smallest mean cosine that is called aligned
SAME = 0.1  # nats within which the competitor-free margin is called unchanged
NEAR = 3  # layers on either side of the secondary sinks' lives that the primary is compared with
LEVELS = 6  # the most levels that were published for one model
SMALL = 0.05  # share of the sinks below which a cluster is no level
COVER = 0.9


@public
def writer_alignment(trace: SinkTrace, *, kind: Kind = "secondary") -> Verdict:
    """Claim 1: ``cos(out, u)`` at the sink of the MLP with the largest share, against the same id where it is no sink.

    Holds if the mean cosine's interval lies above 0.5 and that of its difference to the same id's above 0.
    """
    rows = []
    for one, writer in _written(trace, kind):
        at = one.components.index(writer)
        rows.append(
            sink_label(one)
            | {
                "writer": component_name(writer),
                "share": one.share(writer),
                "cosine": float(one.cosines[at]),
                "norm": float(one.norms[at]),
            }
            | {"same_id_cosine": float(one.same_cosines[at]), "same_id_norm": float(one.same_norms[at])}
            | {"difference": float(one.cosines[at] - one.same_cosines[at]), "same_id": one.same}
        )
    details = pd.DataFrame(rows)
    numbers = [
        _mean(rows, "cosine"),
        _mean(rows, "same_id_cosine"),
        _mean(rows, "difference"),
        _mean(rows, "norm"),
        _mean(rows, "same_id_norm"),
        _mean(rows, "share"),
        quantity("cosines above 0.9", [float(r["cosine"] > 0.9) for r in rows], _documents(rows)),
    ]
    holds = every([above(numbers[0], ALIGNED), above(numbers[2], 0.0)])
    return Verdict(
        "alignment",
        "the writer maps the sink to the primary's direction, and tokens of the same id elsewhere not",
        holds,
        pd.DataFrame(numbers),
        details,
        f"mean cosine above {ALIGNED} and above that of the same id",
    )


@public
def norm_and_mass(trace: SinkTrace, *, kind: Kind = "secondary") -> Verdict:
    """Claim 2: the norm of what the MLP with the largest share adds, against the sink's mass and lifetime.

    Spearman's correlations within that layer over sinks (whoever is no sink is not seen, which narrows the
    range and weakens them), for the norm and for ``rho = <x, u> / |x - <x, u> u|``; and, where the trace was made with
    ``doses``, mass and life with the writer's output rescaled, which is the causal answer. RMSNorm makes keys
    scale-free, so both saturate: ``saturation`` is ``(alpha(x 2) - alpha(x 1)) / (alpha(x 1) - alpha(x 0.5))``.

    Holds if all intervals of the norm's correlations lie above 0.
    """
    rows = []
    for one, writer in _written(trace, kind):
        masses = trace.sinks[one.sink].masses[one.phase.onset : one.phase.end + 1]
        rows.append(
            sink_label(one)
            | {"writer": component_name(writer), "norm": float(one.norms[one.components.index(writer)])}
            | {"rho": one.rho, "mass": sum(masses) / len(masses), "life": len(masses)}
        )
    numbers = []
    for cause in ("norm", "rho"):
        for effect in ("mass", "life"):
            mean, low, high = rank_correlation(
                [r[cause] for r in rows],
                [float(r[effect]) for r in rows],
                [r["writer"] for r in rows],
                _documents(rows),
            )
            number = {"quantity": f"Spearman of {cause} and {effect}", "mean": mean, "low": low, "high": high}
            numbers.append(number | {"n": len(rows), "documents": len(set(_documents(rows)))})
    holds = every([above(number, 0.0) for number in numbers[:2]])
    by_dose = dose_table(trace, kind)
    for effect in ("alpha", "life", "margin"):
        for dose in dict.fromkeys(r["dose"] for r in by_dose):
            mine = [r for r in by_dose if r["dose"] == dose]
            numbers.append(quantity(f"{effect} at dose {dose:g}", [float(r[effect]) for r in mine], _documents(mine)))
    alpha = {n["quantity"]: n["mean"] for n in numbers}
    doses = [alpha.get(f"alpha at dose {d}", math.nan) for d in ("0.5", "1", "2")]
    if not any(math.isnan(a) for a in doses) and doses[1] != doses[0]:
        ratio = (doses[2] - doses[1]) / (doses[1] - doses[0])
        known = _documents([r for r in by_dose if r["dose"] == 1])
        row = {"quantity": "saturation", "mean": ratio, "low": math.nan, "high": math.nan}
        numbers.append(row | {"n": len(known), "documents": len(set(known))})
    return Verdict(
        "norm",
        "the norm of what the writer adds sets the sink's mass and lifetime",
        holds,
        pd.DataFrame(numbers),
        pd.DataFrame(rows),
        "both correlations above 0 within the writing layer",
    )


@public
def primary_weakening(trace: SinkTrace) -> Verdict:
    """Claim 3: does the primary weaken where secondary sinks are alive, and is that competition or real?

    ``dip``: of the primary's attention (mean over heads) and of its competitor-free margin, in the layers where a
    secondary sink is alive, against up to 3 layers of the primary's own life on either side. ``recovered``: how they
    change in those layers when the secondary sinks are not written (whatever writes 5 % of them or more is replaced
    by its mean over tokens of the same id). Competition takes attention and leaves the margin; real weakening lowers
    the margin. ``recovered_logit``: the log odds of the primary's mean attention, in nats as the margin is; what the
    margin does not recover of it is competition.

    Holds if the attention dips, recovers, and the margin does too; attention that recovers with an unchanged margin
    (within 0.1 nat) is competition, and the claim in its strong sense does not hold.
    """
    if not trace.primaries:
        raise BadInputError("no sequence has a primary and a secondary sink whose writer is known (causal=True)")
    rows = []
    for entry in trace.primaries:
        alive = [n for n, count in enumerate(entry["alive"]) if count and entry["active"][n]]
        span = [n for n, active in enumerate(entry["active"]) if active and not entry["alive"][n]]
        near = [n for n in span if alive and min(abs(n - a) for a in alive) <= NEAR]
        row = {"sequence": entry["sequence"], "document": entry["document"], "layers": len(alive), "near": len(near)}
        for name in ("alpha", "margin"):
            curve, without = entry[name], entry[f"{name}_without"]
            inside = _average(curve, alive)
            row[f"dip_{name}"] = inside - _average(curve, near)
            row[f"recovered_{name}"] = _average(without, alive) - inside
            if name == "alpha":
                row["recovered_logit"] = _logit(_average(without, alive)) - _logit(inside)
        row["secondary_alpha"] = _average(entry["secondary_alpha"], alive)
        row["secondary_alpha_without"] = _average(entry["secondary_alpha_without"], alive)
        rows.append(row)
    names = ["dip_alpha", "dip_margin", "recovered_alpha", "recovered_logit", "recovered_margin", "secondary_alpha"]
    numbers = [_mean(rows, name) for name in [*names, "secondary_alpha_without"]]
    found = {n["quantity"]: n for n in numbers}
    weakened = above(found["recovered_margin"], SAME)
    back = above(found["dip_alpha"], 0.0)
    dips = None if back is None else not back
    return Verdict(
        "weakening",
        "the primary itself weakens where secondary sinks are alive, because of them",
        every([dips, above(found["recovered_alpha"], 0.0), weakened]),
        pd.DataFrame(numbers),
        pd.DataFrame(rows),
        f"attention dips and recovers without them, and so does the competitor-free margin, by more than {SAME} nat",
    )


@public
def sink_levels(sinks: SinkMap | SinkTrace, *, kind: Kind = "secondary") -> Verdict:
    """Claim 4: clusters of (onset, lifetime), and how deterministic they are.

    Clusters join levels that differ by at most 1 in both numbers; a level is a cluster with at least 5 % of the sinks.
    ``covered``: share of the sinks in such levels; ``same level``: for a sink, the share of the sinks of other
    documents that share its cluster; ``same level, same token``: of those with its token id.

    Holds if levels cover 90 % of the sinks and there are at most 6 of them, the most that was published for one model.
    """
    tokens = sinks.tokens
    traced = set(range(len(sinks.sinks))) if isinstance(sinks, SinkMap) else {one.sink for one in sinks.traced}
    mine: list[Sink] = [s for n, s in enumerate(sinks.sinks) if s.kind == kind and n in traced]
    if not mine:
        raise BadInputError(f"there is no {kind} sink, so there are no levels")
    counts = Counter((s.onset, s.lifetime) for s in mine)
    clusters = _clusters(counts)
    size = Counter(clusters[s.onset, s.lifetime] for s in mine)
    levels = [c for c, n in size.items() if n >= SMALL * len(mine)]
    documents = [tokens.documents[s.sequence] for s in mine]
    of = [clusters[s.onset, s.lifetime] for s in mine]
    alike: dict[str, list[float]] = {"same level": [], "same level, same token": []}
    for i, sink in enumerate(mine):
        others = [j for j in range(len(mine)) if documents[j] != documents[i]]
        same = [j for j in others if mine[j].token_id == sink.token_id]
        for name, chosen in (("same level", others), ("same level, same token", same)):
            alike[name].append(sum(of[j] == of[i] for j in chosen) / len(chosen) if chosen else math.nan)
    numbers = [quantity("covered", [float(c in levels) for c in of], documents)]
    numbers += [quantity(name, values, documents) for name, values in alike.items()]
    numbers.append(
        {"quantity": "levels", "mean": len(levels), "low": math.nan, "high": math.nan}
        | {"n": len(mine), "documents": len(set(documents))}
    )
    details = pd.DataFrame(
        [
            {"onset": onset, "lifetime": lifetime, "count": n, "level": levels.index(c) if c in levels else -1}
            for (onset, lifetime), n in counts.most_common()
            for c in [clusters[onset, lifetime]]
        ]
    )
    covered = above(numbers[0], COVER)
    if numbers[0]["low"] == numbers[0]["high"] == 1.0:
        covered = True
    return Verdict(
        "levels",
        "secondary sinks come in few levels of (onset, lifetime)",
        every([covered, len(levels) <= LEVELS]),
        pd.DataFrame(numbers),
        details,
        f"at most {LEVELS} levels cover {COVER:.0%} of the sinks",
    )


def _clusters(counts: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Number of the cluster of every level: those within 1 of each other in both numbers, chained."""
    found: dict[tuple[int, int], int] = {}
    for start in counts:
        if start in found:
            continue
        number, waiting = len(set(found.values())), [start]
        while waiting:
            level = waiting.pop()
            if level in found:
                continue
            found[level] = number
            waiting += [o for o in counts if o not in found and max(abs(o[0] - level[0]), abs(o[1] - level[1])) <= 1]
    return found


def _written(trace: SinkTrace, kind: str) -> list[tuple[Traced, Any]]:
    """Every phase with the MLP that has the largest share in it, a writer or not."""
    found = []
    for one in of_kind(trace, kind):
        mlps = [(share, component) for component, share in one.shares() if component[0] == "mlp"]
        if mlps and max(mlps)[0] > 0:
            found.append((one, max(mlps)[1]))
    if not found:
        raise BadInputError(f"no MLP writes a {kind} sink in this trace")
    return found


def _documents(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["document"] for row in rows]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return quantity(name, [row[name] for row in rows], _documents(rows))


def _logit(share: float) -> float:
    return math.log(share / (1 - share)) if 0 < share < 1 else math.nan


def _average(values: Sequence[float], layers: Sequence[int]) -> float:
    kept = [values[n] for n in layers if values[n] == values[n]]
    return sum(kept) / len(kept) if kept else math.nan
