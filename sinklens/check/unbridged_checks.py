"""Models without a bridge, and images: what works on them, against their own eager attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.attention.flash import flash
from sinklens.attention.unbridged import implementation, run_stack, watching
from sinklens.bridge.unbridged import PlainModel
from sinklens.check.attention_checks import between, naive_scores
from sinklens.check.subject import LENGTH, Parts, Subject, gap
from sinklens.core.errors import SinklensWarning
from sinklens.find.contexts import compare_contexts
from sinklens.find.lifetimes import Thresholds
from sinklens.find.registers import register_tokens
from sinklens.find.scores import sink_scores
from sinklens.find.sinks import compare_methods, find_sinks, from_scores
from sinklens.forward.states import model_inputs
from sinklens.inputs.images import Images, load_images
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.models.unbridged_proof import prove_plain


def pictures(count: int = 4) -> list[Any]:
    """Pictures of random squares, from a seed."""
    draw = np.random.default_rng(0)
    return [np.kron(draw.integers(0, 255, (8, 8, 3), np.uint8), np.ones((16, 16, 1), np.uint8)) for _ in range(count)]


def eager(model: PlainModel, batch: Tokens) -> list[Tensor]:
    """The patterns of the model's own eager attention, per layer: [batch, head, query, key], float64."""
    with implementation(model.original_model, "eager"):
        found = run_stack(model.original_model, model_inputs(model, batch), output_attentions=True)
    return [pattern.detach().double() for pattern in found.attentions]


def _plain(subject: Subject) -> PlainModel:
    model: Any = subject.model
    assert isinstance(model, PlainModel)
    return model


def _states(model: PlainModel, batch: Tokens) -> list[Tensor]:
    """The stream before every block and after the last, under eager attention."""
    seen: dict[int, Tensor] = {}
    with (
        implementation(model.original_model, "eager"),
        watching(model.layers, lambda n, x: seen.__setitem__(n, x.double().cpu())),
    ):
        run_stack(model.original_model, model_inputs(model, batch))
    return [seen[n] for n in sorted(seen)]


def check_plain_loads(subject: Subject, parts: Parts) -> None:
    """The proof again, and the patterns of the model's own function."""
    model = _plain(subject)

    def record() -> float:
        again = prove_plain(
            model.original_model, model.tokenizer, model.preprocessing, model.capabilities.model, model.reason
        )
        return float(again.capabilities != model.capabilities)

    parts.add("record", record)


def check_plain_scores(subject: Subject, parts: Parts) -> None:
    """alpha, beta and the uniform share, and with padding on either side for text."""
    model = _plain(subject)
    naive = naive_scores(model.capabilities, eager(model, subject.tokens))

    def measure(tokens: Tokens) -> float:
        found = sink_scores(subject.model, tokens, progress=False)
        return max(gap(found.alpha, naive[0]), gap(found.beta, naive[1]), gap(found.uniform, naive[2]))

    parts.add("alone", lambda: measure(subject.tokens))
    if not isinstance(subject.tokens, Images):
        for side in ("left", "right"):
            parts.add(f"padded {side}", lambda side=side: measure(subject.tokens.pad(side, 3)))


def check_plain_find(subject: Subject, parts: Parts) -> None:
    """The sinks of naive scores."""
    model = _plain(subject)
    alpha, beta, uniform, _ = naive_scores(model.capabilities, eager(model, subject.tokens))
    known = sink_scores(subject.model, subject.tokens, progress=False)
    scores = replace(known, alpha=alpha.float(), beta=beta.float(), uniform=uniform.float())
    options = between(scores.beta)

    def differences() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            found = find_sinks(subject.model, subject.tokens, progress=False, **options)
            expected = from_scores(scores, replace(Thresholds(), **options))
        lives = [{(s.sequence, s.position, s.kind, s.onset, s.end) for s in x} for x in (found, expected)]
        return float(len(lives[0] ^ lives[1]) + (not len(expected)))

    parts.add("differences", differences)


def check_plain_methods(subject: Subject, parts: Parts) -> None:
    """Each method's count is that of find_sinks by it."""

    def measure() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            table = compare_methods(subject.model, subject.tokens, progress=False).to_dict("records")
            found = {
                row["method"]: find_sinks(subject.model, subject.tokens, method=row["method"], progress=False)
                for row in table
            }
        return float(sum(abs(row["sinks"] - len(found[row["method"]])) for row in table))

    parts.add("differences", measure)


def check_plain_contexts(subject: Subject, parts: Parts) -> None:
    """The row of random ids."""
    model = _plain(subject)

    def measure() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            table = compare_contexts(
                subject.model, "random", contexts=("random",), lengths=(LENGTH,), n_seqs=2, progress=False
            )
        tokens = load_tokens(subject.model, "random", n_seqs=2, seq_len=LENGTH)
        alpha = naive_scores(model.capabilities, eager(model, tokens))[0]
        return gap(table.to_dict("records")[0]["alpha"], alpha[..., 0].mean())

    parts.add("random ids", measure)


def check_plain_flash(subject: Subject, parts: Parts) -> None:
    """The last hidden state under our function, and the model's own settings behind it."""
    model = _plain(subject)

    def inside() -> float:
        inputs = model_inputs(model, subject.tokens)
        with implementation(model.original_model, "eager"):
            expected = run_stack(model.original_model, inputs).last_hidden_state
        with flash(subject.model):
            return gap(run_stack(model.original_model, inputs).last_hidden_state, expected)

    parts.add("last state", inside)

    def after() -> float:
        inputs = model_inputs(model, subject.tokens)
        before = run_stack(model.original_model, inputs).last_hidden_state
        with flash(subject.model):
            run_stack(model.original_model, inputs)
        return float(not torch.equal(before, run_stack(model.original_model, inputs).last_hidden_state))

    parts.add("restored", after)


def check_images(subject: Subject, parts: Parts) -> None:
    """Pixels by Pillow's resizing and the model's mean and deviation, and the order of patches."""
    images = load_images(subject.model, pictures(1))
    assert isinstance(subject.tokens, Images)

    def measure() -> float:
        from PIL import Image  # optional

        height, width = images.pixels.shape[-2:]
        small = Image.fromarray(pictures(1)[0]).resize((width, height), Image.Resampling.BICUBIC)
        plain = torch.from_numpy(np.asarray(small).copy()).double().permute(2, 0, 1) / 255
        mean, std = (torch.tensor(x).double()[:, None, None] for x in (images.mean, images.std))
        return gap(images.pixels[0], (plain - mean) / std)

    parts.add("pixels", measure)


def check_registers(subject: Subject, parts: Parts) -> None:
    """Norms after every block, and the patches above the median by a loop."""

    def measure() -> float:
        assert isinstance(subject.tokens, Images)
        ratio = 1.02
        found = register_tokens(subject.model, subject.tokens, ratio=ratio, progress=False)
        states = torch.stack(_states(_plain(subject), subject.tokens)[1:], 1)
        norms = states.norm(dim=-1)
        wrong = 0
        for b in range(len(subject.tokens)):
            row = norms[b, -1].tolist()
            patches = sorted(row[subject.tokens.prefix :])
            median = patches[(len(patches) - 1) // 2]
            naive = [p for p, x in enumerate(row) if p >= subject.tokens.prefix and x >= ratio * median]
            wrong += len(set(naive) ^ set(found.positions(b)))
        return max(gap(found.norms, norms), float(wrong))

    parts.add("norms and patches", measure)


def check_no_images(subject: Subject, parts: Parts) -> None:
    """A model of text refuses pictures."""
    parts.add("refusal", lambda: float(len(load_images(subject.model, pictures(1)))))


def check_no_registers(subject: Subject, parts: Parts) -> None:
    """A model of text has no register patches."""
    batch: Any = subject.tokens
    parts.add("refusal", lambda: float(repr(register_tokens(subject.model, batch)) != ""))
