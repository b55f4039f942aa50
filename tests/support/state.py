"""Everything about a model and the process that a function must leave as it found it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import sinklens
from sinklens.attention import backend as flash_backend, interface as registered

PACKAGE = str(Path(sinklens.__file__).parent)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def process_state() -> dict[str, Any]:
    """Gradients, dtype, generators, threads, kernels.

    Python's own generator is moved by the type checks of the tests; ``tests/robustness/test_safety.py`` checks that
    the package never imports it.
    """
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "flash kernel": torch.backends.cuda.flash_sdp_enabled(),
        "efficient kernel": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math kernel": torch.backends.cuda.math_sdp_enabled(),
    }


def model_state(model: Any) -> dict[str, Any]:
    """Hooks, forwards, attention settings, modes and weights of every module, and what the package keeps of them."""
    found: dict[str, Any] = {}
    roots = [root for root in (model, model.original_model) if isinstance(root, torch.nn.Module)]
    whole = {id(m): (path or "model", m) for root in roots for path, m in root.named_modules()}
    for path, module in whole.values():
        found[f"{path} training"] = module.training
        found[f"{path} forward"] = id(module.__dict__.get("forward"))
        for name in _HOOKS:
            found[f"{path} {name}"] = [id(hook) for hook in getattr(module, name).values()]
        for name in ("fwd_hooks", "bwd_hooks"):
            found[f"{path} {name}"] = [id(hook) for hook in getattr(module, name, [])]
        config = getattr(module, "config", None)
        found[f"{path} attention"] = getattr(config, "_attn_implementation", None)
        found[f"{path} owner"] = module in registered.owners
        for name, weight in module.named_parameters(recurse=False):
            found[f"{path}.{name}"] = (weight.data_ptr(), weight._version, weight.requires_grad, weight.grad is None)
    found["pending"] = [path for path, m in whole.values() if flash_backend._pending.get(m)]
    found["contexts"] = any(m in flash_backend._hosts for _, m in whole.values())
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


class Strike(list[str]):
    """Counts the calls of functions of the package and raises at one of them, as Ctrl-C or a fault would."""

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.at, self.error = at, error

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_name  # torch calls __torch_function__ inside the type checker too, which hides the fault
        ours = frame.f_code.co_filename.startswith(PACKAGE) and name[0] != "<" and name != "__torch_function__"
        if event == "call" and ours:
            self.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            if len(self) - 1 == self.at:
                sys.settrace(None)
                raise self.error

    def around(self, run: Callable[[], Any]) -> Any:
        """Run it under watch."""
        sys.settrace(self)
        try:
            return run()
        finally:
            sys.settrace(None)


class Struck:
    """Counts forwards of a module of the model and raises in one of them, as Ctrl-C in the middle of a hook does."""

    def __init__(self, module: Any, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.module, self.at, self.error, self.count = module, at, error, 0

    def _fire(self, module: Any, args: Any) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error

    def around(self, run: Callable[[], Any]) -> Any:
        """Run it under watch."""
        handle = self.module.register_forward_pre_hook(self._fire)
        try:
            return run()
        finally:
            handle.remove()


def attention_settings(model: Any) -> list[Any]:
    """What a context of flash attention touches of a model."""
    found: list[Any] = [model.original_model.config._attn_implementation]
    for block in model.blocks:
        attention: Any = block.attn
        found += [sorted(attention.__dict__), attention.__dict__.get("forward")]
        configs: list[Any] = [getattr(m, "config", None) for m in attention.original_component.modules()]
        found += [getattr(config, "_attn_implementation", None) for config in configs]
        found.append("forward" in attention.original_component.__dict__)
    return found
