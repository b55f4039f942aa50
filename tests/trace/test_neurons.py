"""Neurons of a writer, what feeds them and what their ablation does, against the host's weights and plain hooks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from made_traces import sink
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.inputs.load import as_tokens
from sinklens.residual.components import Component
from sinklens.trace.neurons import Neurons
from sinklens.trace.phases import Phase, Traced

LENGTH, AT, WIDTH = 60, 5, 32
ALIKE = list(range(12, 52, 2))  # 20 tokens of the sink's id, more than are compared
TOP = (1, 5, 10**6)


@dataclass
class Case:
    """A random model and a trace that says that MLP 0 writes the sink at position 5 of the second text."""

    model: TransformerBridge
    ids: Tensor
    trace: sl.trace.SinkTrace
    found: Neurons
    seen: dict[str, Tensor]

    @property
    def no_sink(self) -> list[int]:
        return [p for p in range(LENGTH) if p not in (0, AT)]

    @property
    def same(self) -> list[int]:
        return [p for p in self.no_sink if self.ids[p] == self.ids[AT]]

    @property
    def compared(self) -> list[int]:
        return (self.same or self.no_sink)[-16:]

    def amounts(self, u: Tensor) -> Tensor:
        """What each neuron adds along u, through the post-norm of that token where there is one."""
        scale = torch.ones(WIDTH)
        if "ln2_post.hook_in" in self.seen:
            scale = self.seen["ln2_post.hook_out"][AT] / self.seen["ln2_post.hook_in"][AT]
        mlp: Any = self.model.blocks[0].mlp
        return self.seen["mlp.out.hook_in"][AT] * (mlp.W_out.detach() @ (scale * u))


def seen_in(model: TransformerBridge, ids: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[hook.name.removeprefix("blocks.0.")] = tensor.detach().reshape(LENGTH, -1)

    names = [n for n in model.hook_dict if n.startswith("blocks.0.") and (".mlp." in n or ".ln" in n)]
    model.run_with_hooks(ids[None], fwd_hooks=[(n, keep) for n in [*names, "blocks.0.hook_in"]])
    return seen


def case(name: str, repeated: bool, sign: float) -> Case:
    _, model = build_pair(name)
    rows = torch.stack(random_rows((LENGTH, LENGTH)))
    if repeated:
        rows[1, [0, *ALIKE]] = int(rows[1, AT])
    else:
        rows[1, AT] = 2  # random rows begin at 3
    seen = seen_in(model, rows[1])
    u = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    u = sign * u * (seen.get("ln2_post.hook_out", seen["mlp.hook_out"])[AT] @ u).sign() / u.norm()
    last = model.cfg.n_layers - 1
    components: tuple[Component, ...] = (("embed", -1), ("attn", 0), ("mlp", 0), ("attn", 1), ("mlp", 1))
    shares = torch.tensor([0.05, 0.1, 0.6, 0.05, 0.2], dtype=torch.float64)
    flat = torch.zeros(len(components))
    one = Traced(
        sink=1, sequence=1, position=AT, token="b", token_id=int(rows[1, AT]), kind="secondary", document=1, number=0,
        phase=Phase(1, last, last), components=components, contributions=sign * shares,
        before=torch.tensor([True, True, True, True, last > 1]), cosines=flat, norms=flat, same_cosines=flat,
        same_norms=flat, same=0, projection=sign, rho=1.0, norm=1.0, direction=u,
    )  # fmt: skip
    sinks = (sink(0, 0, 1, position=7), sink(1, 0, 1, position=0), sink(1, 0, 1, position=AT))
    trace = sl.trace.SinkTrace((one,), (), sinks, as_tokens(model, rows))
    found = sl.trace.writer_neurons(model, trace, top=TOP, shown=30, n_random=1, progress=False)
    return Case(model, rows[1], trace, found, seen)


CASES = [("gpt2", True, 1.0), ("gemma3", True, 1.0), ("gemma3", False, 1.0), ("gpt2", False, -1.0)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def some(request: Any) -> Case:
    return case(*request.param)


def test_neurons_are_listed_by_what_they_add_along_the_direction(some: Case) -> None:
    u, mlp = some.trace.traced[0].direction, some.model.blocks[0].mlp
    amounts = some.amounts(u)
    bias = 0.0 if mlp.b_out is None else float(mlp.b_out.detach() @ u)
    whole = float(amounts.sum()) + bias
    written = some.seen.get("ln2_post.hook_out", some.seen["mlp.hook_out"])[AT]
    assert whole == pytest.approx(float(written @ u), abs=1e-4)
    shares = sorted(((float(a) / whole, f) for f, a in enumerate(amounts)), reverse=True)
    same = some.same
    assert set(ALIKE) <= set(same) or not same
    acts, x = some.seen["mlp.out.hook_in"], some.seen["mlp.hook_in"]
    apart = x[AT] - torch.stack([x[p] for p in some.compared]).mean(0)
    running = 0.0
    for (share, f), row in zip(shares, some.found.neurons.to_dict("records"), strict=False):
        running += share
        assert row["neuron"] == f
        assert row["share"] == pytest.approx(share, abs=1e-4)
        assert row["contribution"] == pytest.approx(float(amounts[f]), abs=1e-5)
        assert row["cumulative"] == pytest.approx(running, abs=1e-4)
        assert row["activation"] == pytest.approx(float(acts[AT, f]), abs=1e-5)
        assert row["ordinary"] == pytest.approx(sum(float(acts[p, f]) for p in some.no_sink) / (LENGTH - 2), abs=1e-5)
        alike = sum(float(acts[p, f]) for p in same) / len(same) if same else math.nan
        assert row["same_id"] == pytest.approx(alike, abs=1e-5, nan_ok=True)
        for name, weight in (("in_cosine", mlp.W_in), ("gate_cosine", mlp.W_gate)):
            if weight is None:
                assert name not in row
            else:
                cosine = torch.cosine_similarity(weight.detach()[:, f], apart, dim=0)
                assert row[name] == pytest.approx(float(cosine), abs=1e-4)
    row = some.found.writers.to_dict("records")[0]
    assert len(some.found.writers) == 1  # the MLP with a fifth is no writer
    assert len(some.found.neurons) == 30
    carried, needed = 0.0, 0
    while carried < 0.9 and needed < len(shares):
        carried, needed = carried + shares[needed][0], needed + 1
    assert row["neurons_for_90"] == needed
    assert (row["contribution"], row["bias"]) == (pytest.approx(whole, abs=1e-4), pytest.approx(bias, abs=1e-5))
    assert row["neurons"] == len(amounts)
    assert row["other_signs"] == pytest.approx(sum(s for s, _ in shares if s < 0), abs=1e-4)


def test_ablated_neurons_are_at_their_ordinary_activation(some: Case) -> None:
    """The k largest together, as many random ones, and all of them, which is the same set twice."""
    one, acts = some.trace.traced[0], some.seen["mlp.out.hook_in"]
    amounts = some.amounts(one.direction) * (1.0 if one.projection > 0 else -1.0)
    order = sorted(range(len(amounts)), key=lambda f: -float(amounts[f]))
    typical = torch.stack([acts[p] for p in some.no_sink]).mean(0)
    draw = torch.Generator().manual_seed(0)

    def moved(chosen: list[int]) -> tuple[float, float]:
        """Mean margin and alpha over the layers behind the writer with these neurons edited."""
        shown: list[Tensor] = []

        def edit(tensor: Tensor, hook: Any) -> Tensor:
            new = tensor.clone()
            for f in chosen:
                new.view(LENGTH, -1)[AT, f] = typical[f]
            return new

        hooks: list[Any] = [("blocks.0.mlp.out.hook_in", edit)]
        layers = range(one.phase.onset, one.phase.end + 1)
        hooks += [(f"blocks.{n}.attn.hook_pattern", lambda t, hook: shown.append(t[0].detach())) for n in layers]
        some.model.run_with_hooks(some.ids[None], fwd_hooks=hooks)
        margins, alphas = [], []
        for n, pattern in zip(layers, shown, strict=True):
            window = (sl.models.capabilities(some.model).windows[n] or LENGTH) + AT
            far = pattern[:, AT + 16 : window]
            margins.append(float((far[:, :, AT].log() - far[:, :, some.no_sink].sum(-1).log()).mean()))
            alphas.append(float(pattern[:, AT:window, AT].mean()))
        return sum(margins) / len(margins), sum(alphas) / len(alphas)

    clean = moved([])
    rows = {(r["k"], r["neurons"]): r for r in some.found.ablations.to_dict("records")}
    for k in (1, 5, len(order)):
        random = torch.randperm(len(order), generator=draw)[:k].tolist()
        for name, chosen in (("top", order[:k]), ("random", random)):
            margin, alpha = moved(chosen)
            assert rows[k, name]["d_margin"] == pytest.approx(margin - clean[0], abs=1e-4)
            assert rows[k, name]["d_alpha"] == pytest.approx(alpha - clean[1], abs=1e-5)
    assert len(rows) == 6
    assert abs(rows[len(order), "top"]["d_margin"]) > 1e-3


def test_feeds_sum_to_the_preactivations_there_and_elsewhere(some: Case) -> None:
    mlp: Any = some.model.blocks[0].mlp
    x, rows = some.seen["mlp.hook_in"], some.found.feeds.to_dict("records")
    named = {r["neuron"] for r in rows}
    assert named == set(some.found.neurons.neuron.tolist()[:3])
    weights = {"in": (mlp.W_in, mlp.b_in), "gate": (mlp.W_gate, None)}
    assert {r["matrix"] for r in rows} == {name for name, (w, _) in weights.items() if w is not None}
    norm = some.seen["ln2.hook_out"] / some.seen["ln2.hook_in"]
    for matrix in {r["matrix"] for r in rows}:
        weight, bias = weights[matrix]
        for f in named:
            mine = [r for r in rows if (r["matrix"], r["neuron"]) == (matrix, f)]
            before = x @ weight.detach()[:, f] + (0.0 if bias is None else bias.detach()[f])
            elsewhere = sum(float(before[p]) for p in some.compared) / len(some.compared)
            assert sum(r["amount"] for r in mine) == pytest.approx(float(before[AT]), abs=1e-3)
            assert sum(r["elsewhere"] for r in mine) == pytest.approx(elsewhere, abs=1e-3)
            for row in mine:
                assert row["difference"] == pytest.approx(row["amount"] - row["elsewhere"], abs=1e-5)
                assert row["against"] == ("same id" if some.same else "ordinary tokens")
            if "ln2_post.hook_in" in some.seen:  # there a norm is one factor per feature
                embedded = (some.seen["hook_in"] * norm) @ weight.detach()[:, f]
                row = next(r for r in mine if r["component"] == "embed")
                assert row["amount"] == pytest.approx(float(embedded[AT]), abs=1e-4)
                rest = sum(float(embedded[p]) for p in some.compared) / len(some.compared)
                assert row["elsewhere"] == pytest.approx(rest, abs=1e-4)
