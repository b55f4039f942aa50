"""What measures mixing: Jacobian blocks against automatic differentiation of plain forwards, and plain forwards."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from sinklens.ablate.ablate import ablate_sinks
from sinklens.bridge.adapters import attention_hook, block_input, block_output
from sinklens.check.reference_edit import naive_edit
from sinklens.check.reference_forward import write_out
from sinklens.check.subject import SHORT, SINKS, Parts, Subject, gap
from sinklens.core.errors import SinklensWarning
from sinklens.mixing.by_length import mixing_by_length
from sinklens.mixing.collapse import measure_collapse
from sinklens.mixing.mixing import compare_mixing, measure_mixing
from sinklens.mixing.pair_norms import jacobian_norms
from sinklens.mixing.path_sum import path_sums
from sinklens.mixing.perturbation import perturbation_spread
from sinklens.mixing.result import Mixing

SMALL = 64  # d_model up to which whole Jacobians are formed


def naive_blocks(subject: Subject, ids: Tensor, column: int, rows: list[int], *, frozen: bool = False) -> Tensor:
    """``J[l, i, column]`` of the last block for some rows, by one backward pass per output: [row, d, d]."""
    model, n_layers = subject.model, subject.facts.n_layers
    patterns: dict[str, Tensor] = {}
    start: list[Tensor] = []
    names = [attention_hook(n, "hook_pattern") for n in range(n_layers)] if frozen else []

    def keep(tensor: Tensor, hook: Any) -> None:
        patterns[hook.name] = tensor.detach().clone()

    watch: list[Any] = [(name, keep) for name in names]
    watch.append((block_input(0), lambda x, hook: start.append(x.detach().clone())))
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=watch, return_type=None)
    x = start[0].clone().requires_grad_()
    ends: list[Tensor] = []
    hooks: list[Any] = [(block_input(0), lambda _, hook: x)]
    hooks += [(name, lambda _, hook: patterns[hook.name]) for name in names]
    hooks.append((block_output(n_layers - 1), lambda tensor, hook: ends.append(tensor)))
    with torch.enable_grad():
        model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)
    out = ends[0].reshape(ids.shape[1], -1)
    blocks = []
    for i in rows:
        block = [
            torch.autograd.grad(value, x, retain_graph=True)[0].reshape(ids.shape[1], -1)[column] for value in out[i]
        ]
        blocks.append(torch.stack(block).double().cpu())
    return torch.stack(blocks)


def _short(subject: Subject) -> Any:
    assert subject.facts  # raises where there is no bridge
    return subject.tokens[0].first(SHORT)


def check_mixing(subject: Subject, parts: Parts) -> None:
    """Squared norms of Jacobian blocks at the sink's column, and the three indices from the map."""
    one = _short(subject)
    ids = one.ids.to(subject.model.cfg.device)
    rows = [SHORT - 1] if subject.model.cfg.d_model > SMALL else list(range(1, SHORT))

    def measure() -> float:
        found = measure_mixing(subject.model, one, sinks=[0], exact="sinks", probes=2, progress=False)
        naive = naive_blocks(subject, ids, 0, rows).square().sum((1, 2))
        ours = found.maps[0][-1][rows, 0].double()
        return max(float(((ours - naive) / naive.clamp(min=1e-30)).abs().max()), _indices(subject, found))

    parts.add("blocks and indices", measure)

    def reverse() -> float:
        found = measure_mixing(subject.model, one, sinks=[0], probes=60, route="reverse", progress=False)
        naive = naive_blocks(subject, ids, 0, rows).square().sum((1, 2))
        ratio = float(found.maps[0][-1][rows, 0].double().sum() / naive.sum())
        return 0.0 if 0.6 < ratio < 1.6 else abs(ratio - 1)  # an estimate by probes, many standard errors wide

    if parts.refused and subject.model.cfg.d_model <= SMALL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            parts.add("reverse route", reverse)


def _indices(subject: Subject, found: Mixing) -> float:
    """mix, via_sink and spread of the last layer from the map, by loops over rows (definitions.md, section 6)."""
    table, sinks = found.maps[0][-1].double(), set(found.sinks[0])
    length = table.shape[0]
    size: list[Tensor] = []
    start: list[Tensor] = []
    hooks: list[Any] = [
        (block_input(0), lambda x, hook: start.append(x.detach().double().cpu())),
        (block_output(subject.facts.n_layers - 1), lambda x, hook: size.append(x.detach().double().cpu())),
    ]
    with torch.no_grad():
        subject.model.run_with_hooks(
            _short(subject).ids.to(subject.model.cfg.device), fwd_hooks=hooks, return_type=None
        )
    x0, out = (t.reshape(length, -1) for t in (start[0], size[0]))
    naive: dict[str, list[float]] = {"mix": [], "via_sink": [], "spread": []}
    for i in range(1, length):
        others = [j for j in range(length) if j not in sinks and j != i and (j < i or not subject.facts.causal)]
        if i in sinks:
            continue
        mixed, own = sum(float(table[i, j]) for j in others), float(table[i, i])
        passed = sum(float(table[i, s]) for s in sinks)
        sized = sum(float(table[i, j]) * float(x0[j].norm()) ** 2 for j in others)
        naive["mix"].append(mixed / (mixed + own))
        naive["via_sink"].append(passed / (passed + mixed + own))
        naive["spread"].append(math.sqrt(sized) / float(out[i].norm()))
    means = {name: sum(values) / len(values) for name, values in naive.items()}
    return max(abs(float(getattr(found, name)[0, -1]) - mean) / max(1.0, mean) for name, mean in means.items())


def check_compare(subject: Subject, parts: Parts) -> None:
    """Both conditions are what measure_mixing gives for them, and the edited blocks those of the edited model."""
    one = _short(subject)

    def measure() -> float:
        hooks = ablate_sinks(subject.model, [0])
        found = compare_mixing(subject.model, one, {"gone": hooks}, sinks=[0], exact="sinks", probes=2, progress=False)
        base = measure_mixing(subject.model, one, sinks=[0], exact="sinks", probes=2, progress=False)
        column = found["gone"].maps[0][-1][1:, 0]  # nothing but the sink's own rows may depend on an ablated sink
        leak = 0.0 if not subject.facts.causal else float(column.abs().max())
        return max(gap(found["base"].maps[0], base.maps[0]), leak)

    parts.add("blocks", measure)

    def reverse() -> float:
        options: dict[str, Any] = {"sinks": [0], "probes": 2, "route": "reverse", "progress": False}
        found = compare_mixing(subject.model, one, {"gone": ablate_sinks(subject.model, [0])}, **options)
        base = measure_mixing(subject.model, one, **options)
        column = found["gone"].maps[0][-1][1:, 0]
        leak = 0.0 if not subject.facts.causal else float(column.abs().max())
        return max(gap(found["base"].maps[0], base.maps[0]), leak)

    if parts.refused and subject.model.cfg.d_model <= SMALL:
        parts.add("reverse route", reverse)


def check_lengths(subject: Subject, parts: Parts) -> None:
    """Each length's row is the comparison of those first tokens."""

    def measure() -> float:
        table = mixing_by_length(
            subject.model, _short(subject), [SHORT - 2, SHORT], sinks=[0], probes=2, progress=False
        ).to_dict("records")
        worst = 0.0
        for n in (SHORT - 2, SHORT):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SinklensWarning)
                alone = measure_mixing(subject.model, subject.tokens[0].first(n), sinks=[0], probes=2, progress=False)
            row = next(r for r in table if (r["tokens"], r["index"]) == (n, "mix"))
            worst = max(worst, gap(row["mean"], alone.mix[0, -1]))
        return worst

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)
        parts.add("mix", measure)


def check_norms(subject: Subject, parts: Parts) -> None:
    """Frobenius and spectral norm of one block."""
    one = _short(subject)
    ids = one.ids.to(subject.model.cfg.device)
    pair = (subject.facts.n_layers - 1, SHORT - 1, 2)

    def measure() -> float:
        row = jacobian_norms(subject.model, one, [pair], progress=False).to_dict("records")[0]
        block = naive_blocks(subject, ids, pair[2], [pair[1]])[0]
        pairs = ((row["frobenius"], block.norm()), (row["spectral"], torch.linalg.matrix_norm(block, 2)))
        return max(abs(ours / float(theirs) - 1) for ours, theirs in pairs)

    parts.add("one block", measure)


def check_paths(subject: Subject, parts: Parts) -> None:
    """The measured spectral norm, attention frozen, and that no block exceeds the bound."""
    one = _short(subject).first(4)
    ids = one.ids.to(subject.model.cfg.device)

    def measure() -> float:
        found = path_sums(subject.model, one, sinks=[0], columns=[1], progress=False)
        broken = int(found.looseness().broken.sum())
        block = naive_blocks(subject, ids, 1, [3], frozen=True)[0]
        last = subject.facts.n_layers - 1
        row = next(r for r in found.table.to_dict("records") if (r["layer"], r["row"]) == (last, 3))
        return max(abs(row["spectral"] / float(torch.linalg.matrix_norm(block, 2)) - 1), float(broken))

    parts.add("one block", measure)


def check_perturbation(subject: Subject, parts: Parts) -> None:
    """The change of every later token by one exchanged token, from two plain forwards, with and without an edit."""

    def measure() -> float:
        old = int(subject.ids[0, 9])
        new = next(int(i) for i in subject.reference.ids[0, 8:] if int(i) != old)
        hooks = ablate_sinks(subject.model, list(SINKS))
        found = perturbation_spread(
            subject.model, subject.tokens, {"gone": hooks}, sinks=list(SINKS), swaps=[(0, 9, new)], progress=False
        )
        ids = subject.ids.clone()
        ids[0, 9] = new
        after = slice(9 if subject.facts.causal else 0, None)
        worst = 0.0
        edits = {"base": None, "gone": naive_edit("renormalize", SINKS)}
        for c, edit in enumerate(edits.values()):
            runs = [
                write_out(subject.model, x) if edit is None else write_out(subject.model, x, edit)
                for x in (subject.ids, ids)
            ]
            change = (runs[1].states - runs[0].states)[:, 0].norm(dim=-1)[:, after]
            worst = max(worst, float((found.absolute[c, 0][:, after] - change).abs().max() / change.max()))
        return worst

    parts.add("changes", measure)


def check_collapse(subject: Subject, parts: Parts) -> None:
    """Residual, mean pairwise cosine and entropy of singular values, by loops and an SVD."""

    def measure() -> float:
        found = measure_collapse(subject.model, subject.tokens, sinks=list(SINKS), progress=False)
        kept = [p for p in range(subject.ids.shape[1]) if p not in SINKS]
        x = subject.base.states[-1, 0][kept]
        residual = (x - x.mean(0)).norm() / x.norm()
        unit = torch.nn.functional.normalize(x, dim=-1)
        pairs = [float(unit[i] @ unit[j]) for i in range(len(kept)) for j in range(i)]
        squares = torch.linalg.svdvals(x).square()
        share = squares / squares.sum()
        naive = torch.tensor([float(residual), sum(pairs) / len(pairs), float(torch.special.entr(share).sum())])
        return gap(found.values[0, 0, -1, 0], naive)

    parts.add("rows that are no sink", measure)
