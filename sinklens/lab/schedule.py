"""How a lab model is trained: optimiser, schedule, seeds, device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sinklens.core.errors import BadInputError


@dataclass(frozen=True)
class TrainConfig:
    """How a lab model is trained; the defaults are those of settings P and B.

    AdamW, betas (0.9, 0.95); the learning rate rises linearly over ``warmup`` steps and falls as a cosine to
    ``final_lr`` of its peak; gradients are clipped to norm 1.

    Attributes:
        steps, batch_size, accumulate: ``accumulate`` batches of ``batch_size`` sequences per step.
        lr, warmup, final_lr, weight_decay, clip: as above; weight decay acts on every parameter.
        data_seed, init_seed: of the sequences and of the initial weights; a run's seed is added to both.
        evaluate_every, evaluation_size: how often figures are taken, and on how many sequences (always the same).
        checkpoint_every: steps between checkpoints.
        workers: processes that prepare batches; 0 prepares them in the same process.
        device, dtype, compile: for GPUs: "cuda", "bfloat16" (autocast; weights stay float32), torch.compile.
        threads: CPU threads; models of this size are slower with two than with one. 0 leaves the setting.
    """

    steps: int = 300
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    data_seed: int = 0
    init_seed: int = 0
    evaluate_every: int = 20
    evaluation_size: int = 128
    checkpoint_every: int = 100
    workers: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "evaluation_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise BadInputError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.lr <= 0 or self.warmup < 0:
            raise BadInputError(f"lr must be positive and warmup at least 0, got {self.lr} and {self.warmup}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
