"""``sweep_ablation``: one ablation, layer by layer, head by head, or dose by dose.

A sweep over layers reuses the unedited prefix: one forward in a growing batch. Before each swept layer a copy of the
clean row 0 joins the batch, the edit acts on the newcomers only, and at the end row r is the run that was edited in
its layer alone; row 0 is the base. On average half of each forward is saved; memory grows with the rows, so long
sequences are taken in several passes.

The first-order estimate (attribution patching, Nanda 2023; Syed et al. 2023) replaces the exact change of the loss by
``sum_q <d loss / d z, z_edited - z>``: one forward and one backward for all layers and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.ablate import ablate_sinks
from sinklens.ablate.edit_hooks import delegates
from sinklens.ablate.hooks import Hooks
from sinklens.ablate.partition import Mode
from sinklens.attention.backend import hooked
from sinklens.bridge.adapters import attention_hook, block_input, grouped_by_head
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.experiment.ablation_sweep_result import Sweep
from sinklens.experiment.controls import slots
from sinklens.find.locations import Sinks, find_places
from sinklens.forward.follow import READERS, numbered
from sinklens.forward.metrics import METRICS, token_metrics
from sinklens.forward.predictions import drawn, scored_logits
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import has_trained_head
from sinklens.show.progress import progress_bar

Over = Literal["layer", "head", "layer-head", "dose"]
DOSES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
NUMBERS_AT_ONCE = 2**28  # of the largest activation of one growing batch: 1 GB in float32
LOGITS_AT_ONCE = 2**27  # 0.5 GB


@public
def sweep_ablation(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    sinks: Sinks,
    mode: Mode = "renormalize",
    *,
    over: Over = "layer",
    doses: Sequence[float] = DOSES,
    estimate: bool = False,
    most_scored: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Sweep:
    """The effect of an ablation on loss and KL, one layer, head, (layer, head) or dose at a time.

    Args:
        model: a causal model with a trained head.
        tokens: the sequences.
        sinks, mode, options: as for :func:`sinklens.ablate_sinks` (``layers``, ``heads`` restrict what is swept).
        over: ``"layer"`` (all heads of one layer), ``"head"`` (one head in all layers), ``"layer-head"``, or
            ``"dose"`` (``scale(g)`` for every g of ``doses``, everywhere at once).
        doses: for ``"dose"``.
        estimate: for ``"layer-head"``: also the first-order estimate of the change of loss, beside the exact one.
        most_scored: score at most so many predictions per sequence, drawn at random, the same in every run.
        seed: of that draw.
        progress: show a bar.

    Predictions made at edited tokens are not scored.

    Cost: over layers about half of L forwards per sequence (plus one), over layers and heads half of L x H (all of them
    on hosts that delegate attention, or with ALiBi); over heads and doses one forward each. Memory: one row of
    activations per edited layer (and head) in the batch.

    Raises:
        BadInputError: bad options, sequences without anything to edit.
        UnsupportedModelError: no next-token loss, or attention that cannot be edited.
    """
    facts = capabilities(model)
    if estimate and over != "layer-head":
        raise BadInputError("the first-order estimate is per (layer, head): over='layer-head'")
    if not facts.causal or not has_trained_head(model):
        raise UnsupportedModelError(
            f"{facts.model} predicts no next token, which a sweep is judged by; for the pseudo-loss of an encoder with "
            f"a trained head use run_experiment over ablate_sinks(layers=..., heads=...)"
        )
    if over == "dose" and (mode not in ("renormalize", "scale") or "g" in options or not len(doses)):
        raise BadInputError("over='dose' sweeps mode 'scale' over doses=; leave mode and g out")
    if estimate and delegates(model):
        raise UnsupportedModelError(
            f"{facts.model}: this host delegates attention, through which no first-order estimate is taken; sweep "
            f"without estimate=True"
        )
    batch = as_tokens(model, tokens).to("cpu")
    places = find_places(sinks)
    everything = ablate_sinks(model, places, "scale" if over == "dose" else mode, **_first_dose(over, doses), **options)
    keys, runner = _runner(model, everything, places, mode, over, doses, options)
    metrics = {name: torch.full((len(keys), len(batch)), math.nan, dtype=torch.float64) for name in ("loss", "kl")}
    base = torch.full((len(batch),), math.nan, dtype=torch.float64)
    guess = torch.full((len(keys), len(batch)), math.nan, dtype=torch.float64) if estimate else None
    with progress_bar(f"sweep over {over}s", len(batch), progress) as advance, hooked(model):
        for b in range(len(batch)):
            edited = {e.position for e in slots(places, batch, b)}
            if edited or not places.columns_wanted:
                one = batch[b].trim().to(str(model.cfg.device))
                scored = scored_positions(one, edited, most_scored, seed + b)
                with numbered([b]):
                    _measure(one, scored, runner, metrics, base, b)
                    found = None if guess is None else first_order(model, everything, one.ids, scored)
                if guess is not None and found is not None:
                    guess[:, b] = torch.stack([found[layer, head] for layer, head in keys])
            advance()
    if base.isnan().all():
        raise BadInputError("none of these sequences holds anything to edit")
    return Sweep(over, mode, tuple(keys), metrics, base, guess, batch, {"seed": seed, "model": facts.model})


def _first_dose(over: str, doses: Sequence[float]) -> dict[str, Any]:
    return {"g": float(doses[0])} if over == "dose" else {}


def _runner(
    model: TransformerBridge,
    everything: Hooks,
    places: Any,
    mode: Mode,
    over: Over,
    doses: Sequence[float],
    options: dict[str, Any],
) -> tuple[list[Any], Any]:
    """What is swept, and a function that yields (index of key, logits) for one sequence; key -1 is the base."""
    layers = list(everything.layers)
    heads = _heads(model, options)

    def one_by_one(made: Sequence[Sequence[Any]]) -> Any:
        def run(ids: Tensor, scored: Tensor) -> Any:
            yield -1, scored_logits(model, ids, scored, [])
            for i, hooks in enumerate(made):
                yield i, scored_logits(model, ids, scored, hooks)

        return run

    if over == "dose":
        made = [ablate_sinks(model, places, "scale", g=float(g), **options) for g in doses]
        return [float(g) for g in doses], one_by_one(made)
    if over == "head":
        made = [ablate_sinks(model, places, mode, **{**options, "heads": [h]}) for h in heads]
        return list(heads), one_by_one(made)
    if not grows(model):
        pairs: list[Any] = (
            [(n, [h]) for n in layers for h in heads] if over == "layer-head" else [(n, None) for n in layers]
        )
        made = [
            ablate_sinks(model, places, mode, **{**options, "layers": [n]} | ({} if h is None else {"heads": h}))
            for n, h in pairs
        ]
        return [n if h is None else (n, h[0]) for n, h in pairs], one_by_one(made)
    if over == "layer":
        return layers, lambda ids, scored: grown(model, ids, scored, {n: [everything] for n in layers})
    by_head = [ablate_sinks(model, places, mode, **{**options, "heads": [h]}) for h in heads]
    keys = [(layer, head) for layer in layers for head in heads]
    return keys, lambda ids, scored: grown(model, ids, scored, dict.fromkeys(layers, by_head))


def grows(model: TransformerBridge) -> bool:
    """Whether rows may join a running batch: not where the host delegates attention, nor behind ALiBi."""
    return not delegates(model) and str(model.cfg.positional_embedding_type) != "alibi"


def _heads(model: TransformerBridge, options: dict[str, Any]) -> list[int]:
    chosen = options.get("heads")
    if chosen is None:
        return list(range(capabilities(model).n_heads))
    flat = [chosen] if isinstance(chosen, int) else list(chosen)
    if not all(isinstance(h, int) for h in flat):
        raise BadInputError("a sweep takes heads= as numbers; it makes the (layer, head) pairs itself")
    return flat


def scored_positions(one: Tokens, edited: set[int], most: int | None, seed: int) -> Int[Tensor, " scored"]:
    """The positions of one sequence whose predictions are scored: none that is edited, at most ``most`` of them."""
    kept = torch.tensor([p for p in range(int(one.lengths[0]) - 1) if p not in edited], dtype=torch.long)
    if not len(kept):
        raise BadInputError(f"{one.sources[0]} has no position left to score; give longer sequences")
    return drawn(kept, most, seed)


def _measure(
    one: Tokens,
    scored: Int[Tensor, " scored"],
    runner: Any,
    metrics: dict[str, Tensor],
    base: Tensor,
    b: int,
) -> None:
    targets = one.ids[0, 1:][scored.to(one.ids.device)]
    clean: Tensor | None = None
    clean_loss = torch.zeros(())
    for i, logits in runner(one.ids, scored):
        loss = token_metrics(METRICS["loss"], logits, logits, targets).double()
        if i < 0 and clean is None:
            clean, clean_loss = logits, loss
            base[b] = loss.mean()
        elif i >= 0 and clean is not None:
            metrics["loss"][i, b] = (loss - clean_loss).mean()
            metrics["kl"][i, b] = token_metrics(METRICS["kl"], logits, clean, targets).double().mean()


def grown(
    model: TransformerBridge,
    ids: Int[Tensor, "1 pos"],
    scored: Int[Tensor, " scored"],
    edits: dict[int, Sequence[Hooks]],
) -> Any:
    """Yield (index, logits) of every edit of every layer, each edited in that layer alone; -1 is the base.

    ``edits[layer]`` are hooks that edit that layer among others; only their functions for the layer are used.
    """
    facts = capabilities(model)
    length = ids.shape[1]
    per_layer = len(next(iter(edits.values())))
    per_row = length * (facts.n_heads * length + 4 * model.cfg.d_model)
    at_once = max(1, (NUMBERS_AT_ONCE // per_row - 1) // per_layer)
    layers = sorted(edits)
    for start in range(0, len(layers), at_once):
        chosen = layers[start : start + at_once]
        hooks: list[Any] = []
        for layer in chosen:
            hooks += _joining(layer, edits[layer])
        final = _final_states(model, ids, scored, hooks)
        if final.shape[0] != 1 + len(chosen) * per_layer:
            raise UnsupportedModelError(
                f"{facts.model}: the host does not let the batch grow between blocks; sweep with "
                f"run_experiment over ablate_sinks(layers=...) instead"
            )
        rows = list(range(final.shape[0]) if start == 0 else range(1, final.shape[0]))
        some = max(1, LOGITS_AT_ONCE // (len(scored) * model.cfg.d_vocab))
        for first in range(0, len(rows), some):
            block = rows[first : first + some]
            for row, logits in zip(block, _logits_of(model, ids, final[block]), strict=True):
                yield start * per_layer + row - 1, logits


def _joining(layer: int, edits: Sequence[Hooks]) -> list[Any]:
    """Copies of row 0 join before the block; then each edit acts on its own newcomer."""
    hooks: list[Any] = []
    first = attention_hook(0, "")
    prefix = f"blocks.{layer}."

    def join(tensor: Tensor, hook: Any) -> Tensor:
        return torch.cat([tensor, tensor[:1].expand(len(edits), *tensor.shape[1:])])

    hooks.append((block_input(layer), join))
    for i, edit in enumerate(edits):
        readers, functions = edit[:READERS], edit[READERS:]
        for name, function in readers:
            hooks.append((name, _on_row(function, 0) if name.startswith(first) else function))
        row = i - len(edits)
        hooks += [(name, _on_row(function, row)) for name, function in functions if name.startswith(prefix)]
    return hooks


def _on_row(function: Callable[..., Any], row: int) -> Callable[..., Any]:
    """A hook function that sees, and changes, one row of the batch."""

    def hook(tensor: Tensor, hook: Any) -> Tensor | None:
        index = row % tensor.shape[0]
        new = function(tensor[index : index + 1], hook=hook)
        return None if new is None else torch.cat([tensor[:index], new, tensor[index + 1 :]])

    return hook


def _final_states(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " scored"], hooks: Sequence[Any]
) -> Float[Tensor, "row scored d_model"]:
    """What reaches the unembedding in every row: their logits together could be larger than memory."""
    index = scored.to(ids.device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> Tensor:
        kept.append(tensor[:, index])
        return tensor[:1, :1]

    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=[*hooks, ("unembed.hook_in", keep)])
    return kept[0]


def _logits_of(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], final: Float[Tensor, "row scored d_model"]
) -> Float[Tensor, "row scored vocabulary"]:
    """The host's own logits (softcap included) of given final states, put into a forward of one token."""

    def put(_: Tensor, hook: Any) -> Tensor:
        return final.flatten(0, 1)[None]

    with torch.no_grad():
        return model.run_with_hooks(ids[:, :1], fwd_hooks=[("unembed.hook_in", put)]).view(*final.shape[:2], -1)


def first_order(
    model: TransformerBridge, edit: Hooks, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " scored"]
) -> Float[Tensor, "layer head"]:
    """``sum_q <d loss / d z, z_edited - z>`` of every layer and head, from one forward and one backward.

    The edit is computed beside the clean run, never put into it. Memory: the graph of one forward.
    """
    facts = capabilities(model)
    outputs: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    hooks: list[Any] = [("embed.hook_out", lambda tensor, hook: tensor.detach().requires_grad_())]
    hooks += edit[:READERS]
    for layer in edit.layers:
        own = [(n.rsplit(".", 1)[-1], f) for n, f in edit[READERS:] if n.startswith(f"blocks.{layer}.")]
        hooks += _shadow(layer, own, outputs, changes, facts.n_kv_heads, facts.heads_first)
    targets = ids[0, 1:][scored.to(ids.device)]
    with torch.enable_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)[0, scored.to(ids.device)]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        layers = list(outputs)
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    found = torch.zeros(facts.n_layers, facts.n_heads, dtype=torch.float64)
    for layer, gradient in zip(layers, gradients, strict=True):
        found[layer] = (gradient.double() * changes[layer].double()).sum((0, 1, 3)).cpu()
    return found


def _shadow(
    layer: int,
    own: Sequence[tuple[str, Callable[..., Any]]],
    outputs: dict[int, Tensor],
    changes: dict[int, Tensor],
    n_kv_heads: int,
    heads_first: bool,
) -> list[Any]:
    """Hooks that run a layer's edit on copies, and keep how z would change."""
    held: dict[str, Tensor] = {}
    edit_z = next((f for name, f in own if name == "hook_z"), None)

    def reading(function: Callable[..., Any]) -> Callable[..., Any]:
        def hook(tensor: Tensor, hook: Any) -> None:
            with torch.no_grad():
                function(tensor.detach(), hook=hook)

        return hook

    def values(tensor: Tensor, hook: Any) -> None:
        held["v"] = grouped_by_head(tensor.detach(), n_kv_heads, heads_first)

    def pattern(tensor: Tensor, hook: Any) -> None:
        edit = next(f for name, f in own if name == "hook_pattern")
        with torch.no_grad():
            held["change"] = edit(tensor.detach(), hook=hook) - tensor.detach()

    def z(tensor: Tensor, hook: Any) -> Tensor:
        with torch.no_grad():
            change = held.pop("change")
            v = held.pop("v").repeat_interleave(change.shape[1] // n_kv_heads, dim=2)
            edited = tensor.detach() + torch.einsum("bhqk,bkhd->bqhd", change, v)
            if edit_z is not None:
                edited = edit_z(edited, hook=hook)
            changes[layer] = edited - tensor.detach()
        outputs[layer] = tensor.clone()  # returned, since the host may show a rearranged copy beside its own path
        return outputs[layer]

    hooks: list[Any] = [(attention_hook(layer, "hook_v"), values)]
    hooks += [(attention_hook(layer, n), reading(f)) for n, f in own if n not in ("hook_pattern", "hook_z")]
    return [*hooks, (attention_hook(layer, "hook_pattern"), pattern), (attention_hook(layer, "hook_z"), z)]
