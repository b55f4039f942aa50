"""Models that are larger than memory: weights that accelerate keeps in CPU memory or on disk until their module runs.

Between two calls an offloaded weight is a placeholder on the "meta" device; accelerate's hook, in place of the module's
``forward``, puts the real one there for each call. Whoever reads a weight without calling its module needs the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from sinklens.core.errors import BadInputError, UnsupportedModelError


@contextlib.contextmanager
def real_weights(*modules: nn.Module, deep: bool = True) -> Iterator[None]:
    """Within, the weights of these modules, and of all below them, are real tensors; memory holds them all at once.

    With ``deep=False`` only the modules' own.

    Nothing happens to modules whose weights are there already.

    Raises:
        UnsupportedModelError: a placeholder whose weights no hook of accelerate can bring.
    """
    with contextlib.ExitStack() as stack:
        for module in dict.fromkeys(m for one in modules for m in (one.modules() if deep else (one,))):
            if not _placeholders(module):
                continue
            for hook in _offloading(module):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
            left = _placeholders(module)
            if left:
                raise UnsupportedModelError(
                    f"{type(module).__name__}.{left[0]} is on the meta device and nothing brings its values; load the "
                    f"model with sinklens.load_model(..., device_map=...)"
                )
        yield


def check_device(device: Any) -> None:
    """Refuse what is no device, a device that is not there, and the one that holds no numbers.

    Raises:
        BadInputError: any of them.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise BadInputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise BadInputError("device 'meta' holds no numbers; give one that computes, such as 'cpu'")


def offloaded(model: nn.Module) -> bool:
    """Whether some weights are not in memory while the model is at rest."""
    return any(_placeholders(module) for module in model.modules())


def refuse_offloaded(model: nn.Module, name: str, what: str) -> None:
    """Raise UnsupportedModelError where weights are not in memory, and say what needs them there."""
    if offloaded(model):
        raise UnsupportedModelError(
            f"{name}: {what} needs all weights in memory, and device_map put some on disk or in CPU memory, from where "
            f"a function transform cannot fetch them. Load the model without offloading; sink_scores, find_sinks, "
            f"interventions, decompose_sinks and trace_sinks work on it as it is"
        )


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its first weights are, or run, if they are offloaded."""
    for module in model.modules():
        found = list(module.parameters(recurse=False))
        if found and found[0].is_meta:
            devices = [hook.execution_device for hook in _offloading(module)]
            return torch.device("cpu" if not devices or devices[0] is None else devices[0])
        if found:
            return found[0].device
    return torch.device("cpu")


def _placeholders(module: nn.Module) -> list[str]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in own if tensor.is_meta]


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks that bring a module's weights."""
    waiting: list[Any] = [getattr(module, "_hf_hook", None)]
    found: list[Any] = []
    while waiting:
        hook = waiting.pop(0)
        if isinstance(hook, SequentialHook):
            waiting += list(hook.hooks)
        elif isinstance(hook, AlignDevicesHook) and hook.offload:
            found.append(hook)
    return found
