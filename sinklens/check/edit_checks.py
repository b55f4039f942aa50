"""What edits a model, and what judges edits: every intervention against the same edit of the whole pattern."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sinklens.ablate.ablate import ablate_sinks
from sinklens.ablate.partition import Mode
from sinklens.ablate.patch_bos import patch_bos
from sinklens.ablate.residual import ablate_residual
from sinklens.ablate.swap import restrict_attention, swap_attention
from sinklens.bridge.adapters import block_input
from sinklens.check.reference_edit import Means, naive_edit
from sinklens.check.reference_forward import Edit, Layer, plain, with_learned, write_out
from sinklens.check.subject import LENGTH, SINKS, Parts, Subject, apart, gap
from sinklens.core.errors import BadInputError
from sinklens.experiment.ablation_sweep import sweep_ablation
from sinklens.experiment.bos_variants import bos_variants
from sinklens.experiment.experiment import run_experiment
from sinklens.experiment.matched_damage import damage, matched_damage

MODES: dict[Mode, dict[str, Any]] = {
    "renormalize": {},
    "zero": {},
    "value_only": {},
    "scale": {"g": 0.3},
    "null": {},
    "move": {"target": 3},
    "uniform": {},
    "mean_value": {},
    "fixed_key": {},
    "fixed_logit": {},
}
REFERRED = ("mean_value", "fixed_key", "fixed_logit")


def check_ablate(subject: Subject, parts: Parts) -> None:
    """Every mode, at positions in every layer; and a SinkMap in the layers of its lives, on some heads."""
    means: list[Means] = []

    def one(mode: Mode, options: dict[str, Any]) -> float:
        extra: dict[str, Any] = {"reference": subject.reference} if mode in REFERRED else {}
        hooks = ablate_sinks(subject.model, list(SINKS), mode, **options, **extra)
        if mode in REFERRED and not means:
            means.append(Means(subject))
        naive = naive_edit(mode, SINKS, means=means[0] if means else None, **options)
        return subject.edited(hooks, naive)

    for mode, options in MODES.items():
        parts.add(mode, lambda mode=mode, options=options: one(mode, options))

    def by_map() -> float:
        hooks = ablate_sinks(subject.model, subject.sinks, heads=[0])

        def edit(n: int, layer: Layer) -> Tensor:
            positions = [
                p for p, onset in zip(SINKS, (0, 1), strict=True) if n >= min(onset, subject.facts.n_layers - 1)
            ]
            made, z = naive_edit("renormalize", positions)(n, layer), plain(n, layer)
            z = z.clone()
            z[:, 0] = made[:, 0]
            return z

        return subject.edited(hooks, edit)

    parts.add("a map, one head", by_map)

    def generated() -> float:
        if not subject.facts.causal:
            return 0.0
        hooks = ablate_sinks(subject.model, [0])
        start = subject.ids[:1, :12]
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_type": "tokens", "verbose": False}
        with subject.model.hooks(fwd_hooks=list(hooks)), torch.no_grad():
            cached = subject.model.generate(start, use_past_kv_cache=True, stop_at_eos=False, **options)
            row = start
            for _ in range(6):
                row = torch.cat([row, subject.model(row)[:, -1].argmax(-1, keepdim=True)], 1)
        for _ in range(0 if subject.facts.causal else 4):  # an encoder's own guesses
            row = subject.logits(row).argmax(-1).to(row.device)
        return float((torch.as_tensor(cached) != row).sum())

    parts.add("generate", generated)


def check_residual(subject: Subject, parts: Parts) -> None:
    """Rescaled streams at the sinks, and massive dimensions of a stream that has some."""
    layers = range(subject.facts.n_layers)

    def scaled(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        new[:, list(SINKS)] = new[:, list(SINKS)] * 0.5
        return new

    def rescaled() -> float:
        hooks = ablate_residual(subject.model, list(SINKS), "rescale", g=0.5)
        return subject.edited(hooks, plain, [(block_input(n), scaled) for n in layers])

    parts.add("rescale", rescaled)

    def massive(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        for p in SINKS:
            for b in range(len(x)):
                entry = x[b, p].abs()
                new[b, p, entry > 100 * entry.median()] = 0
        return new

    def planted() -> float:
        def plant(x: Tensor, hook: Any) -> Tensor:
            new = x.clone()
            new[:, list(SINKS), 3] = 300 * x[:, list(SINKS)].abs().median(-1).values
            return new

        first: list[Any] = [(block_input(n), plant) for n in layers]
        hooks = ablate_residual(subject.model, list(SINKS), "massive_zero", allow_identity=True)
        ours = subject.states([*first, *hooks])[-1]
        both: list[Any] = [*first, *((block_input(n), massive) for n in layers)]
        theirs = subject.written(hooks=both).states[-1]
        effect = apart(theirs, subject.written(hooks=first).states[-1])
        if not effect > 1e-5:
            raise BadInputError("massive_zero changes nothing on these tokens, so nothing can be compared")
        return apart(ours, theirs) / effect

    parts.add("massive_zero", planted)


def check_patch(subject: Subject, parts: Parts) -> None:
    """A stream of zeros and one of another text at position 0; its own stream changes nothing."""
    layer = subject.facts.n_layers - 1

    def zeroed(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        new[:, 0] = 0
        return new

    parts.add(
        "zero",
        lambda: subject.edited(
            patch_bos(subject.model, subject.tokens, "zero", layers=[layer]), plain, [(block_input(layer), zeroed)]
        ),
    )

    def other() -> float:
        kept: list[Tensor] = []
        write_out(
            subject.model,
            subject.reference.ids[:1].to(subject.model.cfg.device),
            hooks=[(block_input(layer), lambda x, hook: kept.append(x[0, 0].detach().clone()))],
        )

        def put(x: Tensor, hook: Any) -> Tensor:
            new = x.clone()
            new[:, 0] = kept[0]
            return new

        hooks = patch_bos(subject.model, subject.tokens, subject.reference[0], layers=[layer], allow_identity=True)
        ours, theirs = subject.states(hooks)[-1], subject.written(hooks=[(block_input(layer), put)]).states[-1]
        return apart(ours, theirs)

    parts.add("another text", other)

    def itself() -> float:
        one = subject.tokens[0]
        hooks = patch_bos(subject.model, one, one, layers=[layer], allow_identity=True)
        with torch.no_grad():
            ours = subject.model.run_with_hooks(one.ids.to(subject.model.cfg.device), fwd_hooks=list(hooks))
            return gap(ours, subject.model(one.ids.to(subject.model.cfg.device)))

    parts.add("itself", itself)


def check_swap(subject: Subject, parts: Parts) -> None:
    """Three other normalisations, from their formulas."""

    def normalised(kind: str) -> Edit:
        def edit(_: int, layer: Layer) -> Tensor:
            lse, weights = layer.log_sum, layer.weights
            if kind == "clipped":
                low = layer.scores.isfinite()
                return (((1.0 + 0.03) * weights - 0.03).clamp(0, 1) * low) @ layer.v
            extra = 0.0 if kind == "off-by-one" else 1.5
            return (layer.scores - torch.logaddexp(lse, torch.full_like(lse, extra))[..., None]).exp() @ layer.v

        return edit

    wanted: tuple[tuple[str, dict[str, Any]], ...] = (
        ("off-by-one", {}), ("learned-logit", {"logit": 1.5}), ("clipped", {}),
    )  # fmt: skip
    for kind, options in wanted:
        parts.add(
            kind,
            lambda kind=kind, options=options: subject.edited(
                swap_attention(subject.model, kind, **options), normalised(kind)
            ),
        )


def check_restrict(subject: Subject, parts: Parts) -> None:
    """StreamingLLM's mask: 2 first tokens and 10 recent ones."""

    def edit(_: int, layer: Layer) -> Tensor:
        index = torch.arange(LENGTH, device=layer.scores.device)
        distance = index[:, None] - index
        near = distance < 10 if subject.facts.causal else distance.abs() < 10
        scores = layer.scores.masked_fill(~(near | (index < 2)), -torch.inf)
        return (scores - with_learned(layer, scores.logsumexp(-1))[..., None]).exp() @ layer.v

    parts.add("2+10", lambda: subject.edited(restrict_attention(subject.model, sinks=2, recent=10), edit))


def check_experiment(subject: Subject, parts: Parts) -> None:
    """Loss and KL of every scored token of one intervention."""

    def measure() -> float:
        hooks = ablate_sinks(subject.model, subject.sinks)
        found = run_experiment(
            subject.model, subject.tokens, {"gone": hooks}, sinks=subject.sinks, controls=(), mask_id=subject.mask_id,
            progress=False,
        )  # fmt: skip
        lives = {p: min(onset, subject.facts.n_layers - 1) for p, onset in zip(SINKS, (0, 1), strict=True)}

        def edit(n: int, layer: Layer) -> Tensor:
            return naive_edit("renormalize", [p for p, onset in lives.items() if n >= onset])(n, layer)

        before, after = (subject.logits(subject.ids, e).log_softmax(-1) for e in (plain, edit))
        naive = {"loss": subject.losses(subject.ids, edit), "kl": (before.exp() * (before - after)).sum(-1)}
        at = found.index("gone")
        scored = ~found.metrics["loss"][at].isnan()
        if int(scored.sum()) < LENGTH:
            return math.inf
        worst = gap(found.metrics["loss"][0][scored], subject.losses(subject.ids)[scored])
        return max(worst, *(gap(found.metrics[name][at][scored], values[scored]) for name, values in naive.items()))

    parts.add("nats", measure)


def check_sweep(subject: Subject, parts: Parts) -> None:
    """The change of loss of one layer's ablation after the other."""

    def measure() -> float:
        found = sweep_ablation(subject.model, subject.tokens, [0], over="layer", progress=False)
        base = subject.losses(subject.ids)[:, :-1]
        worst = 0.0
        for i, key in enumerate(found.keys):
            edited = subject.losses(subject.ids, naive_edit("renormalize", [0], layers=[int(str(key))]))[:, :-1]
            worst = max(worst, gap(found.metrics["loss"][i], (edited - base)[:, 1:].mean(1)))
        return worst

    parts.add("nats", measure)


def check_variants(subject: Subject, parts: Parts) -> None:
    """The ids of every variant, and losses of the same target tokens, from plain forwards."""

    def measure() -> float:
        found = bos_variants(subject.model, subject.tokens)
        chosen = int(found["replaced"].ids[0, 0])
        first, rest = subject.ids[:, :1].cpu(), subject.ids[:, 1:].cpu()
        half = rest.shape[1] // 2
        naive = {
            "keep": subject.ids.cpu(),
            "removed": rest,
            "replaced": torch.cat([torch.full_like(first, chosen), rest], 1),
            "doubled": torch.cat([first, first, rest], 1),
            "middle": torch.cat([rest[:, :half], first, rest[:, half:]], 1),
        }
        wrong = sum(float((found[name].ids.cpu() != ids).sum()) for name, ids in naive.items())
        mine = found.losses(subject.model, mask_id=subject.mask_id)
        for name, ids in naive.items():
            loss = subject.losses(ids.to(subject.model.cfg.device))
            for b, row in enumerate(found.targets[name]):
                scored = ~mine[name][b].isnan()  # an encoder's [MASK] and padding are never predicted
                if int(scored.sum()) < LENGTH // 2:
                    return math.inf
                expected = loss[b, [p - int(subject.facts.causal) for p in row]]
                wrong = max(wrong, gap(mine[name][b][scored], expected[scored]))
        return wrong

    parts.add("nats", measure)


def check_damage(subject: Subject, parts: Parts) -> None:
    """The loss that the found damage costs, from a plain forward of it."""

    def shifted(share: float) -> list[Any]:
        return [(block_input(0), lambda x, hook: x + share * torch.roll(x, 1, dims=1))]

    def measure() -> float:
        row = subject.ids[:, :4] if subject.facts.causal else subject.ids[:, :24]
        with torch.no_grad():  # a decoder's own continuation: damage to likely tokens surely costs
            for _ in range(20 if subject.facts.causal else 0):
                row = torch.cat([row, subject.model(row)[:, -1].argmax(-1, keepdim=True)], 1)
        for _ in range(0 if subject.facts.causal else 4):  # an encoder's own guesses
            row = subject.logits(row).argmax(-1).to(row.device)
        tried = [shifted(share) for share in (0.2, 0.5, 1.0, -0.2, -0.5, -1.0)]
        tried += [damage(subject.model, "noise", size, [1], seed=9) for size in (0.3, 1.0, 3.0)]
        tried.append(damage(subject.model, "mlp", 0.4, range(subject.facts.n_layers)))
        for edit, kind in product(tried, ("noise", "mlp")):
            try:
                found = matched_damage(subject.model, row, edit, kind=kind, mask_id=subject.mask_id, progress=False)
            except BadInputError:  # this costs nothing, or the other damage cannot cost so much
                continue
            reached = float(subject.losses(row, hooks=list(found.hooks)).nanmean())
            if abs(found.loss - found.target) > 0.05:  # bisection ends at a jump of the loss
                continue
            return gap(found.loss, reached)
        raise BadInputError(
            "no edit that was tried costs a loss that other damage can match, so nothing can be compared"
        )

    parts.add("nats", measure)
