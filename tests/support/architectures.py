"""Tiny random models of many architectures, with attention that is far from uniform."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = 50

BUILDERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, **_SPECIAL)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **{**_LLAMA, "num_hidden_layers": 3},
            sliding_window=_WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            **_SPECIAL,
        )
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **_LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_LLAMA, sliding_window=_WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_LLAMA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA, sliding_window=_WINDOW)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{**_LLAMA, "pad_token_id": 0})),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**_SIZES, "num_key_value_heads": 4},
            **_SPECIAL,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            **_SPECIAL,
        )
    ),
    "roberta": lambda: tf.RobertaForMaskedLM(
        tf.RobertaConfig(**{**_SIZES, "max_position_embeddings": 260}, **_SPECIAL)
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL)
    ),
    "gpt-neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=256,
            attention_types=[[["global", "local"], 1]],
            window_size=_WINDOW,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}
SCORED = ("gpt2", "llama", "qwen2", "neox", "gemma3", "opt", "bert", "gpt-oss")


def build(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A Hugging Face model with large random weights, so that attention patterns are peaked and differ."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim >= 2 or "bias" in key or "sinks" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model


def build_pair(name: str, seed: int = 0) -> tuple[tf.PreTrainedModel, TransformerBridge]:
    """The plain Hugging Face model and, from the same weights, the bridge."""
    model = build(name, seed)
    return copy.deepcopy(model), sl.load_model(model)


def random_rows(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random ordinary ids, one row per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
