"""The weights of DINOv2-small, read out of an ONNX graph (extra ``images``) into what transformers' Dinov2Model loads.

The exporter kept the names of biases, norms and scales; matrices became nameless constants of MatMul nodes, whose own
names say what they are (and they stand transposed there); the position table became two constants, one for [CLS] and
one for the patches. Nothing is executed. ``mask_token``, used in pre-training only, is not in the file.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sinklens.core.errors import SinklensError

_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
_PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 518},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 518, "width": 518},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def check_onnx(name: str) -> None:
    """Say what to install before anything is fetched.

    Raises:
        SinklensError: the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise SinklensError(
            f"{name} lies in an ONNX file, which the package onnx reads once: pip install 'sinklens[images]'"
        ) from error


def write_dinov2(source: Path, folder: Path) -> None:
    """Read the graph and write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Raises:
        SinklensError: the graph does not hold every weight of the model in its shape.
    """
    from transformers import Dinov2Config, Dinov2Model  # slow to load

    weights = dinov2_weights(source)
    patch, width = (
        weights["embeddings.patch_embeddings.projection.weight"].shape[-1],
        weights["layernorm.weight"].shape[0],
    )
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer.")),
        num_attention_heads=width // 64,  # as all DINOv2: heads of 64
        image_size=math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1) * patch,
        patch_size=patch,
        use_mask_token=False,
        architectures=["Dinov2Model"],
    )
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in Dinov2Model(config).state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise SinklensError(
            f"the ONNX graph does not hold DINOv2 as expected: {wrong[:4]} are missing or of another shape"
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSING, indent=1))


def dinov2_weights(source: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights under the names of ``Dinov2Model``."""
    import onnx  # optional
    from onnx import numpy_helper  # optional

    graph: Any = onnx.load(str(source)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {}
    for name, value in constants.items():
        if name.startswith("backbone."):
            weights[_renamed(name.removeprefix("backbone."))] = value
    for node in graph.node:
        named = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if node.op_type == "MatMul" and named and node.input[1] in constants:
            weights[_renamed(named[1].replace("/", ".") + ".weight")] = constants[node.input[1]].T
    table = [value for name, value in constants.items() if name.startswith("onnx::") and value.ndim == 3]
    if len(table) != 2:
        raise SinklensError(f"the ONNX graph holds {len(table)} tables of positions instead of two; not used")
    weights["embeddings.position_embeddings"] = np.concatenate(sorted(table, key=lambda t: t.shape[1]), axis=1)
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in weights.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
