"""load_model: every way in, and every way to fail with a message that helps."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from wording import word_tokenizer

import sinklens as sl
from sinklens.models import fetch as embedded
from sinklens.models.load import has_trained_head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    build("llama").save_pretrained(tmp_path / "tiny")
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("sinklens.models.load.model_info", refuse)


def test_a_folder_an_object_and_a_bridge_give_the_same_raw_model(folder: Path) -> None:
    from_folder = sl.load_model(folder, device="cpu")
    from_object = sl.load_model(build("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = build("llama")
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        expected = plain(ids).logits
    for model in (from_folder, from_object, sl.load_model(from_folder)):
        torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=0)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.compatibility_mode


def test_float32_is_the_default_and_dtype_is_followed(folder: Path) -> None:
    half = build("llama").half()
    half.save_pretrained(folder)
    assert sl.load_model(folder).cfg.dtype == torch.float32
    model = sl.load_model(folder, dtype=torch.bfloat16)
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
    assert sl.sink_scores(model, "the cat sat").alpha.dtype == torch.float32


def test_an_unknown_name_without_a_network_names_the_embedded_models(offline: None) -> None:
    with pytest.raises(sl.BadInputError, match="Name or service not known.*smollm2-135m, gemma3-270m, minilm-l6"):
        sl.load_model("no-such-model")


def test_an_id_that_the_hub_does_not_know_is_refused(monkeypatch) -> None:
    def unknown(name, timeout):
        raise ValueError(f"404: no {name}")

    monkeypatch.setattr("sinklens.models.load.model_info", unknown)
    with pytest.raises(sl.BadInputError, match="404: no some/model"):
        sl.load_model("some/model")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sl.BadInputError, match=r"holds no config\.json"):
        sl.load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(sl.BadInputError, match=r"no \.gguf"):
        sl.load_model(tmp_path / "weights.bin")
    with pytest.raises(sl.BadInputError, match="no file at"):
        sl.load_model(tmp_path / "absent.gguf")


def test_pickled_weights_are_never_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(sl.BadInputError, match="safetensors or GGUF only"):
        sl.load_model(folder)


def test_truncated_safetensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(sl.BadInputError, match="damaged or truncated|incomplete|safetensors"):
        sl.load_model(folder)


def test_weights_with_a_tensor_missing_are_refused_not_filled_with_noise(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sl.BadInputError, match=r"lack 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        sl.load_model(folder)


def test_nan_in_a_folder_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sl.BadInputError, match=r"model\.norm\.weight holds 1 NaN"):
        sl.load_model(folder)


def test_an_encoder_saved_without_a_head_loads_and_has_none(tmp_path: Path) -> None:
    whole: Any = build("bert")
    whole.bert.save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = sl.load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "the head that is missing is drawn from a generator of its own"
    assert not has_trained_head(model)
    assert sl.sink_scores(model, "the cat sat on the mat").alpha.shape == (1, 2, 4, 6)
    with pytest.raises(sl.UnsupportedModelError, match="predicts no next token"):
        sl.token_loss(model, "the cat sat")


def test_an_architecture_without_an_adapter_and_with_other_attention_is_refused() -> None:
    import transformers as tf

    config = tf.DebertaV2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    with pytest.raises(sl.UnsupportedModelError, match="cannot wrap DebertaV2Model.*cannot be measured without"):
        sl.load_model(tf.DebertaV2Model(config))


def test_compatibility_mode_is_refused(folder: Path) -> None:
    model = sl.load_model(folder)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(sl.UnsupportedModelError, match="folds value biases"):
        sl.load_model(model)


def test_options_that_would_be_ignored_are_refused(folder: Path) -> None:
    with pytest.raises(sl.BadInputError, match="for models loaded by name"):
        sl.load_model(build("llama"), device="cpu")
    with pytest.raises(sl.BadInputError, match="brings its own"):
        sl.load_model(folder, tokenizer=word_tokenizer(adds_bos=False))


def test_a_model_that_lies_in_a_bridge_is_not_wrapped_again() -> None:
    model, ids = sl.load_model(build("llama")), torch.tensor([[5, 6, 7, 8]])
    before, inside = model(ids), cast(Any, model.original_model)
    with pytest.raises(sl.BadInputError, match="pass that bridge"):
        sl.load_model(inside)
    assert torch.equal(model(ids), before)
    sl.sink_scores(model, ids)


@pytest.mark.parametrize("device", ["x", "", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(sl.BadInputError, match="^device '"):
        sl.load_model(folder, device=device)


@pytest.mark.parametrize("damage", ["noise", "header only", "cut"])
def test_a_damaged_gguf_is_refused_and_leaves_nothing(damage: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    whole = tiny_gguf(tmp_path / "whole.gguf")
    content = {
        "noise": b"this is no model",
        "header only": b"GGUF" + struct.pack("<IQQ", 3, 1, 0),
        "cut": whole.read_bytes()[:-64],
    }
    path.write_bytes(content[damage])
    with pytest.raises(sl.BadInputError, match="corrupt or truncated|is truncated"):
        sl.load_model(path)
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert left == []


def tiny_gguf(path: Path) -> Path:
    """A GGUF file with a header, one key and one tensor: enough for the reader, not for a model."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_that_transformers_cannot_read_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(sl.BadInputError, match="transformers cannot read the GGUF file"):
        sl.load_model(tiny_gguf(tmp_path / "whole.gguf"))


def test_the_catalogue_is_complete_and_pinned() -> None:
    assert set(embedded.CATALOGUE) == {"smollm2-135m", "gemma3-270m", "minilm-l6", "dinov2-s"}
    for model in embedded.CATALOGUE.values():
        assert model.licence
        assert all("==" in w.requirement and len(w.sha256) == 64 for w in model.wheels)
    assert "Gemma Terms of Use" in embedded.CATALOGUE["gemma3-270m"].notice


def test_compatibility_mode_switched_on_later_is_noticed(folder: Path) -> None:
    model = sl.load_model(folder)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(sl.UnsupportedModelError, match="folds value biases"):
        sl.sink_scores(model, "the cat sat")
