"""``patch_bos``: another activation in the place of the first token's. ``bos_variants``: another first token.

In a causal model everything at position 0 depends only on the token there, so a source with the same first token is
refused: it would change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.hooks import Hooks
from sinklens.ablate.selection import Layers, select
from sinklens.ablate.sink_edit import same_vector
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, block_input, block_output, grouped_by_head, unrotated_keys
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.find.locations import Place, Places
from sinklens.forward.follow import Forward
from sinklens.inputs.load import as_tokens, load_tokens
from sinklens.inputs.tokens import Tokens

Site = Literal["resid_pre", "resid_post", "k", "v", "mlp_out", "attn_out"]
Source = str | int | Sequence[str] | Tensor | Tokens | Mapping[str, Tensor] | ActivationCache


def site_hook(model: TransformerBridge, layer: int, site: str) -> str:
    """The host's name of a patching site; keys are those before RoPE and after QK norm where the host shows them."""
    facts = capabilities(model)
    keys = unrotated_keys(facts.fires, facts.rope)
    return {
        "resid_pre": block_input(layer),
        "resid_post": block_output(layer),
        "k": attention_hook(layer, keys[0] if keys else "hook_k"),
        "v": attention_hook(layer, "hook_v"),
        "mlp_out": f"blocks.{layer}.hook_mlp_out",
        "attn_out": f"blocks.{layer}.hook_attn_out",
    }[site]


@public
def patch_bos(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    source: Source,
    *,
    layers: Layers = None,
    site: Site = "resid_pre",
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    allow_identity: bool = False,
) -> Hooks:
    """Hooks that replace what stands at the BOS (or first) position.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences that will be patched; the hooks run on these (or on what continues them) only.
        source: another prompt (a text, a list, ids or Tokens: position 0 there, the mean over several sequences); a
            position of the same sequence (an int: "another token"); ``"mean"``: the mean over the tokens after the
            first of the reference; ``"zero"``; or a cache (an ActivationCache, or any mapping from hook names to
            tensors): position 0 there.
        layers: at which layers; default all.
        site: ``resid_pre``, ``resid_post``, ``k``, ``v``, ``mlp_out`` or ``attn_out``. k is patched before RoPE.
        reference: for ``"mean"``; default 16 of python-docs.
        allow_identity: run a patch whose source equals its target (to 1e-6) instead of refusing it.

    Raises:
        BadInputError: unknown site, a source that equals the target, a cache without the site, positions out of range.
        UnsupportedModelError: the host discards the patch (a probe on the first sequence shows no effect).

    Cost: one forward per source sequence, two tokens' forward per different first token, and two forwards of the
    first sequence as the probe.
    """
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    chosen = select(facts, None, layers)
    sites = _Sites(model, site, chosen.layers)
    if isinstance(source, int) and not isinstance(source, bool):
        if not 0 < source < int(batch.lengths.min()):
            raise BadInputError(
                f"source={source} must be another position of every sequence: 1 to {int(batch.lengths.min()) - 1}"
            )
        vectors = None
    else:
        vectors = _vectors(model, sites, source, reference)
    if vectors is not None and not allow_identity and _is_identity(model, sites, batch, vectors):
        raise BadInputError(
            f"this source equals what stands at the first position already ({site}, all chosen layers): in a causal "
            f"model the same first token looks the same in every prompt. Take a source with another first token, or "
            f"pass allow_identity=True"
        )
    entries = tuple(Place(b, 0, None, "first") for b in range(len(batch)))
    places = Places(tokens=batch, entries=entries)
    named = "another prompt" if not isinstance(source, (str, int)) or len(str(source)) > 24 else str(source)
    options: dict[str, Any] = {"layers": layers, "site": site, "reference": reference, "allow_identity": allow_identity}

    def build(other: TransformerBridge | None, elsewhere: Places | None) -> Hooks:
        if other is not None:
            return patch_bos(other, tokens, source, **options)
        items = sites.hooks(Forward(model, (elsewhere or places).tokens), elsewhere or places, vectors, source)
        name = f"patch {site} from {named}"
        return Hooks(items, name=name, build=build, places=elsewhere or places, layers=chosen.layers, residual=True)

    hooks = build(None, None)
    if not allow_identity:
        _probe(model, batch, hooks, site)
    return hooks


class _Sites:
    """The hooks of one site in the chosen layers, and how their tensors are laid out."""

    def __init__(self, model: TransformerBridge, site: str, layers: Sequence[int]) -> None:
        self.model, self.site, self.layers = model, site, tuple(layers)
        self.names = {layer: site_hook(model, layer, site) for layer in self.layers}
        self.facts = capabilities(model)

    def by_position(self, tensor: Tensor) -> Tensor:
        """A view with the axes [batch, pos, ...], whichever way the adapter lays heads out."""
        if self.site not in ("k", "v"):
            return tensor
        first = self.facts.heads_first
        if self.site == "k":
            keys = unrotated_keys(self.facts.fires, self.facts.rope)
            first = keys[1] if keys else first
        return grouped_by_head(tensor, self.facts.n_kv_heads, first and tensor.ndim == 4)

    def collect(self, ids: Tensor, mask: Tensor | None = None) -> dict[int, Tensor]:
        """The site's tensors for some ids, by layer: [batch, pos, ...]."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                kept[layer] = self.by_position(tensor.detach()).float()

            return hook

        hooks: list[Any] = [(name, keep(layer)) for layer, name in self.names.items()]
        try:
            run_blocks(self.model, ids, hooks, mask=mask)
        except (KeyError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"{self.facts.model}: the host has no {self.site} hook ({error})") from error
        if len(kept) < len(self.layers):
            raise UnsupportedModelError(f"{self.facts.model}: the host never fires its {self.site} hook")
        return kept

    def hooks(
        self, forward: Forward, places: Places, vectors: dict[int, Tensor] | None, source: Source
    ) -> list[tuple[str, Any]]:
        """The patch: reading hooks first, then one hook per layer."""

        def patch(layer: int) -> Any:
            def hook(tensor: Tensor, hook: Any) -> Tensor:
                forward.visit(hook.name)
                new = tensor.clone()
                view, own = self.by_position(new), self.by_position(tensor)
                for b, column in places.columns(forward, layer)[:, forward.past :].nonzero().tolist():
                    if vectors is None:
                        wanted = own[b, int(forward.starts[b]) + int(str(source))].float()
                    else:
                        wanted = vectors[layer].to(own.device)
                    same = same_vector(wanted.flatten(), own[b, column].float().flatten())
                    view[b, column] = torch.where(same, own[b, column], wanted.to(own))
                return new

            return hook

        return [*forward.hooks(), *((name, patch(layer)) for layer, name in self.names.items())]


def _vectors(
    model: TransformerBridge, sites: _Sites, source: Source, reference: str | Sequence[str] | Tensor | Tokens | None
) -> dict[int, Float[Tensor, "*shape"]]:
    """What is put in the first position's place, by layer."""
    if isinstance(source, (Mapping, ActivationCache)):
        return _from_cache(model, sites, source)
    if source == "zero":
        shown = sites.collect(torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device))
        return {layer: torch.zeros_like(tensor[0, 0]) for layer, tensor in shown.items()}
    if source == "mean":
        where = load_tokens(model, n_seqs=16, seq_len=128) if reference is None else as_tokens(model, reference)
        return _mean(model, sites, where, slice(1, None))
    if isinstance(source, (str, Tensor, Tokens, Sequence)):
        return _mean(model, sites, as_tokens(model, source), slice(0, 1))
    raise BadInputError(f"source must be a prompt, a position, 'mean', 'zero' or a cache, got {type(source).__name__}")


def _mean(model: TransformerBridge, sites: _Sites, tokens: Tokens, positions: slice) -> dict[int, Tensor]:
    total: dict[int, Tensor] = {}
    count = 0
    for sequence in range(len(tokens)):
        one = tokens[sequence].trim().to(str(model.cfg.device))
        for layer, tensor in sites.collect(one.ids, one.mask).items():
            seen = tensor[0, positions].sum(0)
            total[layer] = seen if layer not in total else total[layer] + seen
        count += len(range(int(one.lengths[0]))[positions])
    return {layer: tensor / count for layer, tensor in total.items()}


def _from_cache(model: TransformerBridge, sites: _Sites, cache: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    aliases = {"resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post"}
    for layer, name in sites.names.items():
        also = f"blocks.{layer}.{aliases[sites.site]}" if sites.site in aliases else name
        key = next((k for k in (name, also) if k in cache), None)
        if key is None:
            raise BadInputError(
                f"the cache holds neither {name} nor {also}; run_with_cache without names_filter has it"
            )
        tensor = cache[key]
        expected = sites.collect(torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device))[layer].shape[2:]
        tensor = tensor[None] if tensor.ndim == len(expected) + 1 else tensor
        vector = sites.by_position(tensor.detach())[0, 0].float()
        if vector.shape != expected:
            raise BadInputError(
                f"the cache's {key} has {tuple(vector.shape)} per token, this model {tuple(expected)}: another model?"
            )
        found[layer] = vector
    return found


def _is_identity(model: TransformerBridge, sites: _Sites, batch: Tokens, vectors: dict[int, Tensor]) -> bool:
    """Whether every first token already has these vectors, in every chosen layer."""
    seen: set[int] = set()
    for sequence in range(len(batch)):
        ids = batch.row(sequence)
        if sites.facts.causal:
            if int(ids[0]) in seen:
                continue
            seen.add(int(ids[0]))
            ids = ids[:2]
        shown = sites.collect(ids[None].to(model.cfg.device))
        for layer, tensor in shown.items():
            if not same_vector(vectors[layer].flatten(), tensor[0, 0].flatten()):
                return False
    return True


def _probe(model: TransformerBridge, batch: Tokens, hooks: Hooks, site: str) -> None:
    """The patch must move what the blocks put out on the first sequence."""
    one = batch[0].trim().to(str(model.cfg.device))
    last = block_output(model.cfg.n_layers - 1)
    outputs: list[Tensor] = []
    keep: list[Any] = [(last, lambda tensor, hook: outputs.append(tensor.detach().clone()))]
    run_blocks(model, one.ids, keep, mask=one.mask)
    run_blocks(model, one.ids, [*hooks, *keep], mask=one.mask)
    if torch.equal(outputs[0], outputs[1]):
        raise UnsupportedModelError(
            f"{capabilities(model).model}: a patch of {site} changes nothing on this host; patch resid_pre instead"
        )
