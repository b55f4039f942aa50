"""Training a lab model: AdamW with warm-up and cosine, figures every few steps, checkpoints that resume exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from sinklens.console import progress_bar
from sinklens.errors import BadInputError, SinklensError
from sinklens.lab.measure import evaluate, mean_loss, token_losses
from sinklens.lab.model import LabModel, ModelConfig
from sinklens.lab.tasks import Batch, Task
from sinklens.results import load_tensors, save_tensors, write_text

EVALUATION_SEED = 999
CHECKPOINT = "checkpoint.safetensors"


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
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
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


def batch_of(task: Task, config: TrainConfig, seed: int, step: int) -> Batch:
    """The sequences of one step: they follow from the seed and the step alone, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed((config.data_seed + seed) * 1_000_003 + step)
    return task.sample(config.batch_size * config.accumulate, generator)


def evaluation_batch(task: Task, config: TrainConfig) -> Batch:
    """The sequences on which figures are taken: the same for every seed, step and kind of attention."""
    return task.sample(config.evaluation_size, torch.Generator().manual_seed(EVALUATION_SEED))


class Training:
    """One model in training: what a checkpoint holds, and the step that changes it."""

    def __init__(self, model: ModelConfig, task: Task, config: TrainConfig, seed: int) -> None:
        self.task, self.config, self.seed = task, config, seed
        self.model = LabModel(model, config.init_seed + seed).to(config.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self._losses: Any = torch.compile(token_losses) if config.compile else token_losses

    def advance(self, batch: Batch) -> None:
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for part in pieces(batch, self.config.accumulate):
            part = moved(part, self.config.device)
            with self._precision():
                loss = mean_loss(self._losses(self.model, part, self.task.masking), part)
            (loss / self.config.accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not norm.isfinite():
            raise SinklensError(
                f"training diverged at step {self.step}: the gradient is {norm}; lower lr={self.config.lr}"
            )
        self.optimizer.step()
        self.step += 1

    def measure(self, batch: Batch) -> None:
        """Figures at the present step."""
        self.rows += [
            {"step": self.step, **row} for row in evaluate(self.model, self.task, moved(batch, self.config.device))
        ]

    def save(self, folder: Path) -> None:
        """Weights, the optimiser's state, the step and the figures so far, in one file, whole or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        meta = {"step": self.step, "seed": self.seed, "rows": self.rows, "setup": self.setup()}
        save_tensors(folder / CHECKPOINT, "LabCheckpoint", tensors, meta)

    def resume(self, folder: Path) -> None:
        """Go on from the folder's checkpoint, where there is one.

        Raises:
            BadInputError: it belongs to another configuration, or is damaged.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            return
        tensors, meta = load_tensors(path, "LabCheckpoint")
        if meta["setup"] != self.setup() or meta["seed"] != self.seed:
            raise BadInputError(f"{str(path)!r} belongs to another configuration; give another folder, or remove it")
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, what = name.split(".", 2)
                state.setdefault(int(index), {})[what] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.rows = meta["step"], meta["rows"]

    def setup(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit."""
        plain = {"model": asdict(self.model.config), "task": describe(self.task), "train": asdict(self.config)}
        return json.loads(json.dumps(plain))

    def _precision(self) -> Any:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)


def train(
    model: ModelConfig,
    task: Task,
    config: TrainConfig,
    seed: int,
    folder: Path | None = None,
    *,
    progress: bool | None = None,
) -> Training:
    """Train one model, or go on where the folder's checkpoint stands.

    An interrupted and resumed run gives the same weights, bit by bit, as one that was not (on one machine).

    Raises:
        BadInputError: the checkpoint belongs to another configuration.
        SinklensError: the loss diverged.
    """
    run = Training(model, task, config, seed)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        run.resume(folder)
    fixed = evaluation_batch(task, config)
    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        with progress_bar(f"{model.attention}, seed {seed}", config.steps, progress) as advance:
            for _ in range(run.step):
                advance()
            if run.step == 0 and not run.rows:
                run.measure(fixed)
            while run.step < config.steps:
                run.advance(batch_of(task, config, seed, run.step))
                if run.step % config.evaluate_every == 0 or run.step == config.steps:
                    run.measure(fixed)
                if folder is not None and (run.step % config.checkpoint_every == 0 or run.step == config.steps):
                    run.save(folder)
                    write_text(folder / "metrics.csv", pd.DataFrame(run.rows).to_csv(index=False))
                advance()
    finally:
        torch.set_num_threads(threads)
    return run


def pieces(batch: Batch, n: int) -> Iterable[Batch]:
    """A batch in n parts."""
    parts = [getattr(batch, name).chunk(n) for name in ("ids", "classes", "floor", "documents")]
    return [Batch(*part) for part in zip(*parts, strict=True)]


def moved(batch: Batch, device: str) -> Batch:
    """A batch on another device."""
    if device == "cpu":
        return batch
    names = ("ids", "classes", "floor", "documents")
    return Batch(*(getattr(batch, name).to(device, non_blocking=True) for name in names))


def describe(task: Task) -> dict[str, Any]:
    """A task's name and fields."""
    return {"name": type(task).__name__, **asdict(task)}  # type: ignore[call-overload]
