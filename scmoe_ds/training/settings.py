"""What a training run is told, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop needs beside engine and data. Iterations are optimizer steps; `trace` is the one to draw."""

    train_iters: int
    micro_batch_size: int
    accumulation_steps: int
    seq_length: int
    seed: int
    log_interval: int
    eval_interval: int
    eval_iters: int
    num_workers: int = 0
    save: str | None = None
    save_interval: int | None = None
    exit_interval: int | None = None
    trace: int | None = None
    trace_dir: str = "traces"
    exit_duration_min: float | None = None
    keep_last: int | None = None
    log_precise: bool = False

    @property
    def rank_batch_size(self) -> int:
        """Sequences that one rank reads per iteration."""
        return self.micro_batch_size * self.accumulation_steps


@dataclass(frozen=True)
class Summary:
    """How a run ended. The loss is in nats per token, averaged over ranks; tokens_per_second counts training steps."""

    iteration: int
    validation_loss: float | None
    tokens_per_second: float
    checkpoint: Path | None
