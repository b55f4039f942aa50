"""patch_bos and BOS variants."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from architectures import build_pair, random_rows
from batches import batch_of, left
from editing import greedy
from torch import Tensor

import sinklens as sl
from sinklens.ablate.patch_bos import Site, site_hook


def at_site(model: Any, ids: Tensor, layer: int, site: Any, hooks: Any = ()) -> Tensor:
    found: list[Tensor] = []
    reading = (site_hook(model, layer, site), lambda t, hook: found.append(t.detach().clone()))
    model.run_with_hooks(ids, fwd_hooks=[*hooks, reading], return_type=None)
    return found[0]


@pytest.mark.parametrize("site", get_args(Site))
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma3", "neox", "gpt-oss"])
def test_the_first_position_holds_the_sources_activation(name: str, site: Any) -> None:
    _, model = build_pair(name)
    ids, other = (row[None] for row in random_rows((12, 15)))
    heads_first = name == "gemma3" and site == "k"
    index = (0, slice(None), 0) if heads_first else (0, 0)
    source = at_site(model, other, 1, site)
    plain = at_site(model, ids, 1, site)
    patched = at_site(model, ids, 1, site, sl.patch_bos(model, ids, other, layers=1, site=site))
    assert (patched[index] - source[index]).abs().max() < 1e-5
    assert (plain[index] - source[index]).abs().max() > 1e-2
    rest = (0, slice(None), slice(1, None)) if heads_first else (0, slice(1, None))
    assert torch.equal(patched[rest], plain[rest])
    zero = at_site(model, ids, 1, site, sl.patch_bos(model, ids, "zero", layers=1, site=site))
    assert zero[index].abs().max() == 0
    own = at_site(model, ids, 1, site, sl.patch_bos(model, ids, 5, layers=1, site=site))
    fifth = (0, slice(None), 5) if heads_first else (0, 5)
    assert torch.equal(own[index], plain[fifth])
    mean = sl.patch_bos(model, ids, "mean", layers=1, site=site, reference=other)
    after_first = source[0].transpose(0, 1)[1:] if heads_first else source[0, 1:]
    assert (at_site(model, ids, 1, site, mean)[index] - after_first.mean(0)).abs().max() < 1e-5


def test_patching_everything_equals_the_other_token() -> None:
    """resid_pre at layer 0 from another first token is the text with that token."""
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12,)))
    swapped = ids.clone()
    swapped[0, 0] = 50
    got = model.run_with_hooks(ids, fwd_hooks=sl.patch_bos(model, ids, swapped, layers=0))
    assert (got - model(swapped)).abs().max() < 1e-5


def test_a_cache_is_a_source() -> None:
    _, model = build_pair("llama")
    ids, other = (row[None] for row in random_rows((12, 12)))
    _, cache = model.run_with_cache(other)
    for site in get_args(Site):
        from_cache = model.run_with_hooks(ids, fwd_hooks=sl.patch_bos(model, ids, cache, site=site))
        from_text = model.run_with_hooks(ids, fwd_hooks=sl.patch_bos(model, ids, other, site=site))
        assert (from_cache - from_text).abs().max() < 1e-5
    with pytest.raises(sl.BadInputError, match="cache holds neither"):
        sl.patch_bos(model, ids, {"blocks.1.hook_in": torch.zeros(1, 2, 32)})


def test_the_same_first_token_is_refused_and_changes_nothing() -> None:
    _, model = build_pair("llama")
    ids, other = (row[None] for row in random_rows((12, 12)))
    other[0, 0] = ids[0, 0]
    plain = model(ids)
    for site in get_args(Site):
        with pytest.raises(sl.BadInputError, match="same first token"):
            sl.patch_bos(model, ids, other, site=site)
        hooks = sl.patch_bos(model, ids, other, site=site, allow_identity=True)
        assert torch.equal(model.run_with_hooks(ids, fwd_hooks=hooks), plain)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_delegating_hosts_take_patches_that_work_and_refuse_the_others(name: str) -> None:
    _, model = build_pair(name)
    ids, other = (row[None] for row in random_rows((12, 12)))
    for site in get_args(Site):
        try:
            hooks = sl.patch_bos(model, ids, other, site=site, layers=0)
        except sl.UnsupportedModelError as error:
            assert "changes nothing" in str(error) or "no " in str(error)  # noqa: PT017
        else:
            assert (model.run_with_hooks(ids, fwd_hooks=hooks) - model(ids)).abs().max() > 1e-6


def test_padding_generation_and_elsewhere() -> None:
    _, model = build_pair("llama")
    rows = random_rows((9, 13))
    tokens = batch_of(model, rows)
    hooks = sl.patch_bos(model, tokens, "zero", site="v")
    padded = left(tokens)
    got = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
    for i, row in enumerate(rows):
        assert (got[i, -len(row) :] - model.run_with_hooks(row[None], fwd_hooks=hooks)[0]).abs().max() < 1e-4
    found = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=hooks):
            found.append(greedy(model, rows[0][None], cached))
    assert torch.equal(*found)
    moved = at_site(model, rows[1][None], 0, "v", hooks.at([[4], [6]]))
    assert moved[0, 6].abs().max() == 0
    assert moved[0, 0].abs().max() > 0


def test_bad_patches_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12,)))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("zero", {"site": "pattern"}, "site must be"),
        (0, {}, "another position"),
        (12, {}, "another position"),
    ]
    for source, options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.patch_bos(model, ids, source, **options)


def test_variants_predict_the_same_tokens() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((9, 9)))
    ids[:, 0] = 1
    variants = sl.experiment.bos_variants(model, ids, replacement=50)
    assert list(variants) == ["keep", "removed", "replaced", "doubled", "middle"]
    rest = ids[0, 1:].tolist()
    assert variants["removed"].row(0).tolist() == rest
    assert variants["replaced"].row(0).tolist() == [50, *rest]
    assert variants["doubled"].row(0).tolist() == [1, 1, *rest]
    assert variants["middle"].row(0).tolist() == [*rest[:4], 1, *rest[4:]]
    predicted = {
        name: [[int(tokens.row(b)[p]) for p in variants.targets[name][b]] for b in range(2)]
        for name, tokens in variants.items()
    }
    assert all(found == predicted["keep"] for found in predicted.values())
    assert predicted["keep"][0] == [t for j, t in enumerate(ids[0].tolist()) if j >= 2 and j != 5]
    losses = variants.losses(model)
    for name, tokens in variants.items():
        logits = model(tokens.row(0)[None])[0].log_softmax(-1)
        for j, p in enumerate(variants.targets[name][0]):
            assert abs(float(losses[name][0][j]) + float(logits[p - 1, tokens.row(0)[p]])) < 1e-5
    table = variants.to_dataframe(model)
    assert table.difference[0] == 0
    assert table.targets.tolist() == [12] * 5


def test_bad_variants_say_what_to_do() -> None:
    _, model = build_pair("llama")
    for ids, replacement, message in (
        (torch.tensor([[5, 6, 7]]), None, "at least 4"),
        (torch.arange(3, 9), 99, "vocabulary"),
        (torch.arange(3, 9), 3, "begins with"),
    ):
        with pytest.raises(sl.BadInputError, match=message):
            sl.experiment.bos_variants(model, ids, replacement=replacement)
