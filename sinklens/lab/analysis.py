"""What the rest of the package says of a trained lab model: does its sink write, and how much does it hold apart?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.ablate import ablate_sinks
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.decompose.decompose import decompose_sinks
from sinklens.find.anatomy import sink_anatomy
from sinklens.find.sinks import find_sinks
from sinklens.forward.metrics import token_loss
from sinklens.lab.tasks import Batch
from sinklens.mixing.indices import at_last_layer
from sinklens.mixing.mixing import compare_mixing
from sinklens.trace.trace import trace_sinks

SEQUENCES = 16


def analyse(model: TransformerBridge, batch: Batch, n: int = SEQUENCES) -> dict[str, Any]:
    """JSON-able figures of the first ``n`` sequences; where a function refuses, its reason under ``refused``.

    - ``sinks``: the positions of all sinks of all sequences.
    - ``losses``: the four cells of the 2x2 of the first token, in nats: base; ``zero`` (without what it writes);
      ``value_only`` (without the share that it takes from others); ``renormalize`` (without both).
    - ``square``: the parts of that with intervals, and the four claims (``decompose_sinks``).
    - ``heads``: each head's commonest class (nop, broadcast, mixed), and the size of what the first token writes over
      the others' (``sink_anatomy``).
    - ``mixing``: the three indices at the last layer, with and without the first token's attention.
    - ``writers``: what each component adds along the sink's direction (``trace_sinks``).
    """
    ids = batch.ids[:n]
    found: dict[str, Any] = {"refused": {}}
    parts: dict[str, Callable[[], Any]] = {
        "sinks": lambda: _sinks(model, ids),
        "losses": lambda: _losses(model, ids),
        "square": lambda: _square(model, ids),
        "heads": lambda: _heads(model, ids),
        "mixing": lambda: _mixing(model, ids[:4]),
        "writers": lambda: _writers(model, ids),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)
        for name, part in parts.items():
            try:
                found[name] = part()
            except (UnsupportedModelError, BadInputError) as error:
                found["refused"][name] = str(error)
    return found


def _sinks(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    found = find_sinks(model, ids, progress=False)
    return {"sequences": len(ids), "positions": [sink.position for sink in found]}


def _losses(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> dict[str, float]:
    edits = {"base": [], **{mode: ablate_sinks(model, [0], mode) for mode in ("renormalize", "zero", "value_only")}}
    return {
        label: float(token_loss(model, ids, hooks=hooks).double().nanmean().item()) for label, hooks in edits.items()
    }


def _square(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    found = decompose_sinks(model, ids, [0], reference=ids, metrics="loss", progress=False)
    tables = {name: table.to_dataframe().to_dict("records") for name, table in found.effects.items()}
    claims = found.claims.to_dataframe().to_dict("records") if found.claims is not None else []
    return {"effects": tables, "claims": claims}


def _heads(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> list[dict[str, Any]]:
    anatomy = sink_anatomy(model, find_sinks(model, ids, progress=False), progress=False)
    if anatomy.heads.empty:
        return []
    first = anatomy.heads[anatomy.heads["position"] == 0]
    ratios = first.groupby(["layer", "head"])["ov_ratio"].mean().to_dict()
    return [
        {**row, "ov_ratio": ratios.get((row["layer"], row["head"]))}
        for row in anatomy.head_classes().to_dict("records")
    ]


def _mixing(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> dict[str, dict[str, float]]:
    edits = {"without the first token": ablate_sinks(model, [0])}
    found = compare_mixing(model, ids, edits, sinks=[0], probes=8, progress=False)
    return {label: at_last_layer(one) for label, one in found.conditions.items()}


def _writers(model: TransformerBridge, ids: Int[Tensor, "batch pos"]) -> list[dict[str, Any]]:
    sinks = find_sinks(model, ids, progress=False)
    trace = trace_sinks(model, ids, sinks, reference=ids, causal=False, progress=False)
    added: dict[tuple[str, int], list[float]] = {}
    for row in trace.to_dataframe().to_dict("records"):
        added.setdefault((row["component"], row["layer"]), []).append(row["contribution"])
    return [{"component": c, "layer": n, "contribution": sum(v) / len(v)} for (c, n), v in added.items()]
