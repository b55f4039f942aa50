"""Reading DINOv2 out of an ONNX graph: a round trip through one like the exporter's, and graphs that lack something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as tf
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

import sinklens as sl
from sinklens.models.onnx_weights import write_dinov2

_EXPORTED = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}


def tiny() -> Any:
    torch.manual_seed(0)
    config = tf.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, use_mask_token=False
    )
    return tf.Dinov2Model(config).eval()


def exported(model: Any, path: Path, without: str = "") -> Path:
    """The weights laid out as the exporter does: matrices transposed and nameless, the positions in two pieces."""
    constants, nodes = {}, []
    for name, weight in model.state_dict().items():
        old = name.replace("attention.o_proj", "attention.output.dense")
        for new, before in _EXPORTED.items():
            old = old.replace(f"attention.{new}", f"attention.{before}")
        if old == without:
            continue
        if old == "embeddings.position_embeddings":
            constants["onnx::Concat_1"], constants["onnx::Reshape_2"] = weight[:, :1], weight[:, 1:]
        elif weight.ndim == 2 and old.startswith("encoder"):
            constant = f"onnx::MatMul_{len(nodes)}"
            constants[constant] = weight.T
            label = "/backbone/" + old.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(helper.make_node("MatMul", [f"x{len(nodes)}", constant], [f"y{len(nodes)}"], name=label))
        else:
            constants[f"backbone.{old}"] = weight
    kept = [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in constants.items()]
    decoder = helper.make_tensor("decoder.bias", TensorProto.FLOAT, [1], [0.0])
    graph = helper.make_graph(nodes, "graph", [], [], [*kept, decoder])
    onnx.save(helper.make_model(graph), str(path))
    return path


def test_every_weight_comes_back_under_its_name(tmp_path: Path) -> None:
    model = tiny()
    (tmp_path / "out").mkdir()
    write_dinov2(exported(model, tmp_path / "graph.onnx"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())
    loaded = sl.load_model(tmp_path / "out")
    assert loaded.capabilities.image_size == (28, 28)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        computed, expected = loaded(pixel_values=pixels).last_hidden_state, model(pixels).last_hidden_state
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("encoder.layer.1.attention.attention.key.weight", r"encoder\.layer\.1\.attention\.k_proj\.weight"),
        ("encoder.layer.0.norm2.bias", r"encoder\.layer\.0\.norm2\.bias"),
        ("embeddings.position_embeddings", "0 tables of positions instead of two"),
    ],
)
def test_a_graph_with_a_weight_missing_is_refused(without: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(sl.SinklensError, match=message):
        write_dinov2(exported(tiny(), tmp_path / "graph.onnx", without), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_without_onnx_the_extra_is_named_before_anything_is_fetched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(sl.SinklensError, match=r"pip install 'sinklens\[images\]'"):
        sl.load_model("dinov2-s")
    assert not list(tmp_path.rglob("*.whl"))
