"""What ``--smoke`` gives a script: a tiny model to load by its name, in a folder that is thrown away.

A script then takes its real way from the first line to the last, on sizes that are done in seconds; what it prints
means nothing. The model is random but for one planted sink, so that there is something to find.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

TINY = "tiny"
HELP = "a tiny model, small sizes, nothing kept: shows that the script runs to its end"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
LAYERS, WIDTH, MLP, HEADS, KEY_HEADS, HEAD = 6, 32, 48, 4, 2, 8  # with fewer layers no sink has a kind


@contextmanager
def tiny_model() -> Iterator[str]:
    """The name of a tiny Llama, which lies in the working directory: a new folder, gone afterwards."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write_llama(Path(TINY))
            yield TINY
        finally:
            os.chdir(before)


@contextmanager
def small(options: argparse.Namespace, **sizes: Any) -> Iterator[None]:
    """With ``--smoke`` the tiny model and these sizes instead of the options that were given."""
    if not options.smoke:
        yield
        return
    with tiny_model() as name:
        vars(options).update(sizes, model=name)
        yield


def folder_of(name: str) -> Path:
    """Where the weights of a folder, or of an embedded model, lie."""
    from sinklens.models.fetch import fetch

    return Path(name) if Path(name).is_dir() else fetch(name)


def write_llama(folder: Path) -> None:
    """The model as files, without transformers: a script whose children load it need not import that itself."""
    folder.mkdir()
    vocabulary = _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": WIDTH,
        "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": HEAD,
        "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"q": (HEADS * HEAD, WIDTH), "k": (KEY_HEADS * HEAD, WIDTH), "v": (KEY_HEADS * HEAD, WIDTH)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()} | {"self_attn.o": (WIDTH, HEADS * HEAD)}
    shapes |= {"mlp.gate": (MLP, WIDTH), "mlp.up": (MLP, WIDTH), "mlp.down": (WIDTH, MLP)}
    chance = np.random.default_rng(0)
    weights = {name: chance.standard_normal((vocabulary, WIDTH)) for name in ("model.embed_tokens", "lm_head")}
    weights["model.norm"] = np.ones(WIDTH)
    for layer in range(LAYERS):
        block = {f"{name}_proj": _sink_in(name, chance.standard_normal(shape)) for name, shape in shapes.items()}
        block |= {f"{name}_layernorm": np.ones(WIDTH) for name in ("input", "post_attention")}
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in block.items()}
    weights["model.embed_tokens"] *= 0.4
    weights["model.embed_tokens"][:, :2] = 0, 2
    weights["model.embed_tokens"][1, :] = [6, 2] + [0] * (WIDTH - 2)  # BOS
    named = {f"{name}.weight": weight.astype(np.float32) for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def _sink_in(name: str, weight: np.ndarray) -> np.ndarray:
    """Every query asks, in a dimension that hardly rotates, for what BOS alone has and nothing writes over."""
    weight = 0.4 * weight
    if name in ("self_attn.o", "mlp.down"):
        weight *= 0.2
        weight[:2] = 0
    asked = {"self_attn.k": 0, "self_attn.q": 1}
    if name in asked:
        weight[HEAD // 2 - 1 :: HEAD, asked[name]] += 4
    return weight


def _write_tokenizer(folder: Path) -> int:
    """Every byte is a token, so every text has ids; gives the size of the vocabulary."""
    letters = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    words.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL.values()])
    words.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return words.get_vocab_size()
