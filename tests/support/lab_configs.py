"""Training runs that take a second."""

from __future__ import annotations

from sinklens.lab import Backcopy, LabConfig, ModelConfig, TrainConfig

SHORT = LabConfig(
    "short",
    ModelConfig(attention="kv_bias", d_model=16, n_heads=2),
    Backcopy(seq_len=24),
    TrainConfig(steps=9, batch_size=4, warmup=3, evaluate_every=3, evaluation_size=8, checkpoint_every=2),
)
