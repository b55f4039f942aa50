"""``sl.flash``: the flash backend for as long as a context is open, on a bridge and without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Flash, switched
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.unbridged_flash import plain_flash
from sinklens.bridge.capabilities import capabilities
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import UnsupportedModelError
from sinklens.core.validation import public


@public
@contextlib.contextmanager
def flash(model: TransformerBridge | PlainModel) -> Iterator[Flash]:
    """Run a model's attention by the flash backend: O(T) memory, no patterns; all other hooks of a bridge keep firing.

    Inside, plain forwards, hooks of :func:`ablate_sinks`, :func:`restrict_attention` and :func:`swap_attention` built
    with ``backend="auto"``, and ``model.generate`` work as outside. At the end, also after an exception, the model's
    settings and outputs are bit for bit what they were. Contexts nest.

    Yields:
        A :class:`Flash`: its ``paths`` say which kernel ran in each layer.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached that way, or does not come out equal to the
            host's (the message says where); while running: a hook that could not fire here, or a gradient.

    Cost: about a plain sdpa forward (benchmarks/README.md). The first use of a model compares the backends on short
    random inputs.
    """
    if isinstance(model, PlainModel):
        with plain_flash(model) as state:
            yield state
        return
    reason = unsupported(model)
    if reason:
        raise UnsupportedModelError(f"{capabilities(model).model}: the flash backend cannot run it: {reason}")
    with switched(model, Flash(model)) as state:
        assert state is not None
        yield state
