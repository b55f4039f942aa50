"""``writer_subspace``: the few input directions that a writing MLP maps onto the sink direction.

Wong et al. 2025 take principal components of the MLP's inputs at sinks and feed them, alone and with either sign, to
the MLP. Here the components are fitted on one half of the documents, centred on tokens of the same id that are no
sink, and judged on the other half: how much of what the MLP adds along u does the input's part in the first k of them
carry, against k random directions?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import mlp_of, original
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.find.lifetimes import Kind
from sinklens.residual.components import component_name, writing_hook
from sinklens.residual.contributions import flat
from sinklens.show.progress import progress_bar
from sinklens.trace.phases import Traced
from sinklens.trace.result import SinkTrace
from sinklens.trace.verdicts import Verdict, above, every, quantity

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
PUBLISHED = 6  # principal components that DeepSeek-R1-Distill-Qwen-14B maps onto its direction
CARRIED = 0.9
FEWEST = 8  # sinks to fit on
LEAST = 0.1  # share of a sink that the MLP writes, below which its input is not looked at
TOLERANCE = 1e-3
SAME_ID = 16


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Inputs of one MLP: at sinks, and at tokens of their ids that are no sink."""

    sinks: Float[Tensor, "sink d_model"]
    owners: list[Traced]
    others: Float[Tensor, "other d_model"]


@public
def writer_subspace(
    model: TransformerBridge,
    trace: SinkTrace,
    *,
    kind: Kind = "secondary",
    layer: int | None = None,
    sizes: tuple[int, ...] = SIZES,
    n_random: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> Verdict:
    """Claim 5: a low-dimensional input subspace is what the writing MLP maps onto the sink direction.

    Args:
        model: the traced model.
        trace: from :func:`sinklens.trace_sinks`; sinks of two documents at least.
        kind: of the sinks.
        layer: the MLP; default: the one with the largest mean share before the reference layers. Sinks of which it
            writes less than a tenth are left out.
        sizes: how many principal components the input is reduced to.
        n_random: draws of as many random directions; their mean is reported.
        seed: of these, and of the halves of the documents.
        progress: show a bar.

    ``carried by k``: with c the mean input of tokens of the same id that are no sink and P the projection on the first
    k components of ``x - c``, ``<MLP(c + P(x - c)) - MLP(c), u> / <MLP(x) - MLP(c), u>``, over sinks of the test half.
    ``details``: every component's share of the sinks' and of the other tokens' spread around c, and the cosine with u
    and the norm of ``MLP(+PC)`` and ``MLP(-PC)`` for a component of length 1 (as published) and of the length that the
    sinks' inputs have along it.

    Holds if at most 6 components (as published) carry at least 90 % and more than as many random ones.

    Cost: one forward per sequence up to the MLP. Memory: one input per sink and at most 16 per id and sequence.

    Raises:
        BadInputError: no MLP writes such sinks, fewer than 8 of them in the fitted half, or no size up to 6.
        UnsupportedModelError: the host's MLP cannot be run on given inputs.
    """
    capabilities(model)  # refuses a model without hooks
    if not 1 <= min(sizes, default=0) <= PUBLISHED:
        raise BadInputError(f"sizes must begin at 1 to {PUBLISHED} components (as published), got {sizes}")
    shares = _mlp_shares(trace, kind)
    if layer is None:
        if not shares or max(sum(entry.values()) for entry in shares.values()) <= 0:
            raise BadInputError(f"no MLP writes a {kind} sink in this trace, so there is no input to look at")
        layer = max(shares, key=lambda n: sum(shares[n].values()))
    chosen = [one for one, share in shares.get(layer, {}).items() if share >= LEAST]
    fitted, tested = _halves(chosen, seed)
    if len(fitted) < FEWEST or not tested:
        raise BadInputError(
            f"MLP {layer} writes a tenth or more of {len(fitted)} {kind} sinks in the half of the documents that the "
            f"components are fitted on; {FEWEST} are needed: trace more documents"
        )
    mlp = _Mlp(model, layer)
    first, test = (_inputs(model, trace, half, mlp, progress) for half in (fitted, tested))
    if not len(first.others):
        raise BadInputError("every token of these ids is a sink, so there is nothing to compare inputs with")
    return _judged(mlp, first, test, sizes, n_random, seed)


def _mlp_shares(trace: SinkTrace, kind: str) -> dict[int, dict[Traced, float]]:
    """Per MLP its share of every phase before whose reference layer it writes."""
    found: dict[int, dict[Traced, float]] = {}
    for one in trace.traced:
        for (name, layer), share in one.shares() if one.kind == kind else ():
            if name == "mlp":
                found.setdefault(layer, {})[one] = share
    return found


def _judged(mlp: _Mlp, first: _Inputs, test: _Inputs, sizes: tuple[int, ...], n_random: int, seed: int) -> Verdict:
    """Components of the first half's inputs, judged on the other half's."""
    centre = first.others.mean(0)
    centred = first.sinks - centre
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    u = torch.stack([one.direction for one in first.owners]).to(centre).mean(0)
    u = u / u.norm()
    details = _components(mlp, axes, spread, centred, first.others - centre, u)
    draw = torch.Generator().manual_seed(seed)
    documents = [one.document for one in test.owners]
    numbers: list[dict[str, Any]] = []
    for k in (k for k in sizes if k <= len(axes)):
        numbers.append(quantity(f"carried by {k}", _carried(mlp, test, centre, axes[:k]), documents))
        noise = [torch.linalg.qr(torch.randn(axes.shape[1], k, generator=draw).to(axes))[0].T for _ in range(n_random)]
        random = torch.tensor([_carried(mlp, test, centre, q) for q in noise]).mean(0)
        numbers.append(quantity(f"carried by {k} random", random.tolist(), documents))
    by = {row["quantity"]: row for row in numbers}
    enough = [k for k in sizes if k <= len(axes) and by[f"carried by {k}"]["mean"] >= CARRIED]
    numbers.append(
        {"quantity": "components for 90 %", "mean": enough[0] if enough else math.nan, "low": math.nan}
        | {"high": math.nan, "n": len(test.owners), "documents": len(set(documents))}
    )
    most = max(k for k in sizes if k <= min(PUBLISHED, len(axes)))
    row, noise_row = by[f"carried by {most}"], by[f"carried by {most} random"]
    known = row["low"] == row["low"]
    return Verdict(
        "subspace",
        f"few input directions are what MLP {mlp.layer} maps onto the sink direction",
        every([above(row, CARRIED), row["low"] > noise_row["high"] if known else None]),
        pd.DataFrame(numbers),
        details.assign(component=[component_name(("PC", n + 1)) for n in range(len(details))]),
        f"the first {most} principal components carry {CARRIED:.0%} on held-out documents, and more than random ones",
    )


class _Mlp:
    """The host's MLP of one layer as a function of its (normalised) input, post-norm included."""

    def __init__(self, model: TransformerBridge, layer: int) -> None:
        block: Any = model.blocks[layer]
        self.layer = layer
        self.point = f"blocks.{layer}.mlp.hook_in"
        self.out = writing_hook(model, ("mlp", layer))
        self._inner = original(mlp_of(model, layer))
        self._post = original(block.ln2_post) if has_hook(model, f"blocks.{layer}.ln2_post.hook_out") else None
        self._name = model.cfg.model_name

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        with torch.no_grad():
            try:
                found = self._inner(x[None].to(next(self._inner.parameters()).dtype))
            except (TypeError, RuntimeError) as error:  # Bloom's adds the stream itself, others take flat rows
                raise UnsupportedModelError(
                    f"{self._name}: MLP {self.layer} cannot be run by itself on given inputs ({error})"
                ) from error
            found = found[0] if isinstance(found, tuple) else found
            return (found if self._post is None else self._post(found))[0].to(x)

    def check(self, x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"]) -> None:
        """What the host wrote must be what this function gives."""
        if (self(x) - y).abs().max() > TOLERANCE * (1 + y.abs().max()):
            raise UnsupportedModelError(f"{self._name}: MLP {self.layer} cannot be run by itself on given inputs")


def _inputs(
    model: TransformerBridge, trace: SinkTrace, owners: list[Traced], mlp: _Mlp, progress: bool | None
) -> _Inputs:
    sinks: list[Tensor] = []
    ordered: list[Traced] = []
    others: list[Tensor] = []
    sequences = list(dict.fromkeys(one.sequence for one in owners))
    ids_of = {one.token_id for one in owners}
    with progress_bar(f"inputs of MLP {mlp.layer}", len(sequences), progress) as advance:
        for b in sequences:
            ids: Int[Tensor, "1 pos"] = trace.tokens[b].trim().ids.to(model.cfg.device)
            length = ids.shape[1]
            seen: dict[str, Tensor] = {}

            def keep(name: str, seen: dict[str, Tensor] = seen, length: int = length) -> Any:
                def hook(tensor: Tensor, hook: Any) -> None:
                    seen[name] = flat(tensor.detach(), length)

                return hook

            run_blocks(model, ids, [(n, keep(n)) for n in (mlp.point, mlp.out)], until=f"blocks.{mlp.layer}.hook_out")
            x = seen[mlp.point]
            mlp.check(x[:4], seen[mlp.out][:4])
            taken = {s.position for s in trace.sinks if s.sequence == b}
            for one in owners:
                if one.sequence == b:
                    sinks.append(x[one.position].clone())
                    ordered.append(one)
            for token_id in ids_of:
                at = [p for p, i in enumerate(ids[0].tolist()) if i == token_id and p not in taken]
                others.append(x[at[:: max(1, math.ceil(len(at) / SAME_ID))]].clone())
            advance()
    return _Inputs(torch.stack(sinks), ordered, torch.cat(others))


def _components(
    mlp: _Mlp,
    axes: Float[Tensor, "component d_model"],
    spread: Float[Tensor, " component"],
    sinks: Float[Tensor, "sink d_model"],
    others: Float[Tensor, "other d_model"],
    u: Float[Tensor, " d_model"],
) -> pd.DataFrame:
    rows = []
    whole, elsewhere = spread.square().sum(), others.square().sum()
    for n, axis in enumerate(axes[: max(SIZES)]):
        size = float((sinks @ axis).abs().mean())
        row: dict[str, Any] = {"component": "", "sinks": float(spread[n] ** 2 / whole)}
        row["same_id"] = float((others @ axis).square().sum() / elsewhere)
        row["length"] = size
        for name, factor in (("unit", 1.0), ("sink", size)):
            plus, minus = mlp(torch.stack([factor * axis, -factor * axis]))
            row |= {f"{name}_plus_cosine": float(torch.cosine_similarity(plus, u, dim=0))}
            row |= {f"{name}_plus_norm": float(plus.norm())}
            row |= {f"{name}_minus_cosine": float(torch.cosine_similarity(minus, u, dim=0))}
            row |= {f"{name}_minus_norm": float(minus.norm())}
        rows.append(row)
    return pd.DataFrame(rows)


def _carried(
    mlp: _Mlp, inputs: _Inputs, centre: Float[Tensor, " d_model"], axes: Float[Tensor, "component d_model"]
) -> list[float]:
    """What the part of each sink's input in the axes carries of its contribution along its own u."""
    off = inputs.sinks - centre
    reduced = centre + (off @ axes.T) @ axes
    u = torch.stack([one.direction for one in inputs.owners]).to(centre)
    base = mlp(centre[None])
    part, full = (((mlp(x) - base) * u).sum(-1) for x in (reduced, inputs.sinks))
    return (part / full).tolist()


def _halves(owners: list[Traced], seed: int) -> tuple[list[Traced], list[Traced]]:
    documents = sorted({one.document for one in owners})
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {documents[i] for i in order[: (len(documents) + 1) // 2]}
    return [o for o in owners if o.document in chosen], [o for o in owners if o.document not in chosen]
