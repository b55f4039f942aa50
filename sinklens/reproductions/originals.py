"""The models of the papers, and how a model is recognised as one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import score_projection
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import UnsupportedModelError
from sinklens.inputs.vocabulary import vocabulary


@dataclass(frozen=True)
class Original:
    """A published model: its hub id, and the sizes that a model must have to be taken for it."""

    hub: str
    n_layers: int
    n_heads: int
    d_model: int


ORIGINALS = {
    "gpt2": Original("openai-community/gpt2", 12, 12, 768),
    "gpt2-large": Original("openai-community/gpt2-large", 36, 20, 1280),
    "gpt2-xl": Original("openai-community/gpt2-xl", 48, 25, 1600),
    "pythia-1b": Original("EleutherAI/pythia-1b", 16, 8, 2048),
    "pythia-12b": Original("EleutherAI/pythia-12b", 36, 40, 5120),
    "mistral-7b-v0.1": Original("mistralai/Mistral-7B-v0.1", 32, 32, 4096),
    "llama-2-7b-hf": Original("meta-llama/Llama-2-7b-hf", 32, 32, 4096),
    "llama-2-13b-hf": Original("meta-llama/Llama-2-13b-hf", 40, 40, 5120),
    "meta-llama-3-8b": Original("meta-llama/Meta-Llama-3-8B", 32, 32, 4096),
    "llama-3.1-8b": Original("meta-llama/Llama-3.1-8B", 32, 32, 4096),
    "llama-3.2-1b": Original("meta-llama/Llama-3.2-1B", 16, 32, 2048),
    "llama-3.2-3b": Original("meta-llama/Llama-3.2-3B", 28, 24, 3072),
    "gemma-7b": Original("google/gemma-7b", 28, 16, 3072),
    "gemma-2-2b": Original("google/gemma-2-2b", 26, 8, 2304),
    "qwen3-4b-base": Original("Qwen/Qwen3-4B-Base", 36, 32, 2560),
    "deepseek-r1-distill-qwen-14b": Original("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 48, 40, 5120),
    "bert-base-uncased": Original("google-bert/bert-base-uncased", 12, 12, 768),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under test.

    Attributes:
        name: as the user gave it.
        facts: the proof's record.
        original: the key of the published model that it is, or "".
        doubt: why it is not the published model whose name it bears, or "".
        bos: its tokenizer puts a BOS before every text, as in training.
        learned_positions: the hook at which vectors of absolute positions enter, or "".
        query_bias: queries have a trained bias.
    """

    name: str
    facts: Any
    original: str
    doubt: str
    bos: bool
    learned_positions: str
    query_bias: bool


def subject_of(model: TransformerBridge, name: str) -> Subject:
    """What a model is, by its name and its sizes: a folder called gpt2 with other sizes is no GPT-2."""
    facts = capabilities(model)
    original, doubt = "", ""
    key = name.rstrip("/").rsplit("/", 1)[-1].lower()
    if key in ORIGINALS:
        sizes = facts.n_layers, facts.n_heads, model.cfg.d_model
        wanted = ORIGINALS[key].n_layers, ORIGINALS[key].n_heads, ORIGINALS[key].d_model
        if sizes == wanted:
            original = key
        else:
            doubt = f", which has the name but {sizes} layers, heads and width in the place of {wanted}"
    try:
        query_bias = bool(score_projection(model, 0, "q")[1].any())
    except UnsupportedModelError:
        query_bias = False
    at = "pos_embed.hook_out"
    positions = at if at in model.hook_dict and not facts.rope else ""
    return Subject(name, facts, original, doubt, bool(vocabulary(model).prefix), positions, query_bias)


def at_hand(key: str) -> str:
    """The hub id of a published model whose configuration lies in the local Hugging Face cache, or ""."""
    for hub in (ORIGINALS[key].hub, key):
        if isinstance(try_to_load_from_cache(hub, "config.json"), str):
            return hub
    return ""
