"""Training a lab model: figures every few steps, checkpoints from which it goes on exactly."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinklens.core.errors import BadInputError, SinklensError
from sinklens.core.storage import load_tensors, make_folder, save_tensors, write_text
from sinklens.core.validation import public
from sinklens.lab.measure import evaluate, mean_loss, token_losses
from sinklens.lab.model import LabModel
from sinklens.lab.study import LabConfig
from sinklens.lab.tasks import Batch
from sinklens.show.progress import progress_bar

EVALUATION_SEED = 999
CHECKPOINT = "checkpoint.safetensors"


class Steps(Dataset[Batch]):
    """The sequences of each step: they follow from seed and step alone, so that a resumed run draws the same."""

    def __init__(self, config: LabConfig, seed: int, first: int = 0) -> None:
        self.config, self.seed, self.first = config, seed, first

    def __len__(self) -> int:
        return self.config.train.steps - self.first

    def __getitem__(self, index: int) -> Batch:
        train = self.config.train
        generator = torch.Generator().manual_seed((train.data_seed + self.seed) * 1_000_003 + self.first + index)
        return self.config.task.sample(train.batch_size * train.accumulate, generator)


def evaluation_batch(config: LabConfig) -> Batch:
    """The sequences on which figures are taken: the same for every seed, step and kind of attention."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    return config.task.sample(config.train.evaluation_size, generator, held_out=True)


class Training:
    """One model in training: what a checkpoint holds, and the step that changes it."""

    def __init__(self, config: LabConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        train = config.train
        self.model = LabModel(config.fitted(), train.init_seed + seed).to(train.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.lr, betas=(0.9, 0.95), weight_decay=train.weight_decay
        )
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self._losses: Any = torch.compile(token_losses) if train.compile else token_losses

    def advance(self, batch: Batch) -> None:
        """One step of the optimiser."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for piece in pieces(batch, train.accumulate):
            part = moved(piece, train.device)
            with self._precision():
                loss = mean_loss(self._losses(self.model, part, self.config.task.masking), part)
            (loss / train.accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.clip)
        if not norm.isfinite():
            raise SinklensError(f"training diverged at step {self.step}: the gradient is {norm}; lower lr={train.lr}")
        self.optimizer.step()
        self.step += 1

    def measure(self, batch: Batch) -> None:
        """Figures at the present step."""
        found = evaluate(self.model, self.config.task, moved(batch, self.config.train.device))
        self.rows += [{"step": self.step, **row} for row in found]

    def save(self, folder: Path) -> None:
        """Weights, the optimiser's state, the step and the figures so far, in one file, whole or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        meta = {"step": self.step, "seed": self.seed, "rows": self.rows, "config": self.config.to_dict()}
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
        if meta["config"] != self.config.to_dict() or meta["seed"] != self.seed:
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

    def _precision(self) -> Any:
        if self.config.train.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.train.device).type, dtype=torch.bfloat16)


@public
def train(config: LabConfig, seed: int = 0, folder: Path | None = None, *, progress: bool | None = None) -> Training:
    """Train one model, or go on where the folder's checkpoint stands.

    An interrupted and resumed run gives the same weights, bit by bit, as one that was not (on one machine).

    Raises:
        BadInputError: the checkpoint belongs to another configuration.
        SinklensError: training diverged.
    """
    run = Training(config, seed)
    if folder is not None:
        make_folder(folder)
        run.resume(folder)
    options, fixed = config.train, evaluation_batch(config)
    threads = torch.get_num_threads()
    loader = DataLoader(
        Steps(config, seed, run.step), batch_size=None, num_workers=options.workers,
        pin_memory=options.device.startswith("cuda"), generator=torch.Generator(),  # else it draws from the global one
    )  # fmt: skip
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        with progress_bar(f"{config.name}, seed {seed}", options.steps, progress) as advance:
            for _ in range(run.step):
                advance()
            if not run.rows:
                run.measure(fixed)
            for batch in loader:
                run.advance(batch)
                last = run.step == options.steps
                if last or run.step % options.evaluate_every == 0:
                    run.measure(fixed)
                if folder is not None and (last or run.step % options.checkpoint_every == 0):
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
