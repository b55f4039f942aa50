"""Tokenizers of a few words or letters for tiny models, and a text for real ones."""

from __future__ import annotations

import transformers as tf
from architectures import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import sinklens as sl

TEXT_A = (
    "Attention is the concentration of awareness on some phenomenon to the exclusion of other stimuli. It is a "
    "process of selectively concentrating on a discrete aspect of information, whether considered subjective or "
    "objective. William James wrote that attention is the taking possession by the mind, in clear and vivid form, of "
    "one out of what seem several simultaneously possible objects or trains of thought. Focalization, concentration, "
    "of consciousness are of its essence. It implies withdrawal from some things in order to deal effectively with "
    "others."
)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "the", "cat", "sat", "on", "mat", "."]
LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def word_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def model_with(adds_bos: bool) -> TransformerBridge:
    return sl.load_model(build("llama"), tokenizer=word_tokenizer(adds_bos))


def letters() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of single letters, with BERT's special tokens around each text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(LETTERS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    named = {name + "_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
