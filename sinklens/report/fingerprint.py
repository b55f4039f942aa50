"""What a stage's result depends on: the weights, the text, the options, the code. Its hash names the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

from sinklens.bridge.capabilities import record
from sinklens.bridge.offload import real_weights
from sinklens.inputs.tokens import Tokens
from sinklens.report.budget import Sizes
from sinklens.sweep.keys import code_version


def weights_digest(model: Any) -> str:
    """A hash of every parameter and buffer; weights on disk are read in turn. About a second per GB."""
    module: torch.nn.Module = model.original_model
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        if not own:
            continue
        with real_weights(part, deep=False):
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for name, tensor in own:
                digest.update(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def identity(model: Any, tokens: Tokens, sizes: Sizes, seed: int, weights: str) -> dict[str, Any]:
    """Everything that the numbers depend on, in the form of the manifest."""
    return {
        "weights_sha256": weights,
        "capabilities": asdict(record(model)),
        "tokens_sha256": tokens.digest,
        "documents": list(tokens.documents),
        "labels_sha256": hashlib.sha256(json.dumps(tokens.labels).encode()).hexdigest(),
        "sizes": asdict(sizes),
        "seed": seed,
        "code": code_version(),
    }


def key_of(facts: dict[str, Any]) -> str:
    """The hash of an identity, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
