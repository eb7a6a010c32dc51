"""The log of a training run: sums between two log lines, the line itself, and DeepSpeed's monitors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.parallel.process import device
from scmoe_ds.training.record import RecordWriter


class TrainingOutput(Protocol):
    """What a model's forward pass returns for a training loop; see models.gpt.GPTOutput."""

    @property
    def loss(self) -> Tensor | None: ...

    @property
    def task_loss(self) -> Tensor | None: ...

    @property
    def moe_loss(self) -> Tensor: ...

    @property
    def exp_counts(self) -> tuple[Tensor, ...]: ...


@dataclass
class _Sums:
    """Sums since the last log line. Tensors stay on the device, so that the host does not wait for a step."""

    steps: int = 0
    seconds: float = 0.0
    task_loss: Tensor | float = 0.0
    moe_loss: Tensor | float = 0.0
    exp_counts: list[Tensor] = field(default_factory=list)

    def add(self, output: TrainingOutput, share: float) -> None:
        assert output.task_loss is not None
        self.task_loss = self.task_loss + output.task_loss.detach() * share
        self.moe_loss = self.moe_loss + output.moe_loss.detach() * share
        counts = [count.detach().clone() for count in output.exp_counts]
        if self.exp_counts:
            counts = [old + new for old, new in zip(self.exp_counts, counts, strict=True)]
        self.exp_counts = counts


class TrainingLog:
    """Collects losses, expert counts and times of the steps, and prints them on rank 0.

    Args:
        engine: DeepSpeed's, for the gradient norm, the learning rate and the monitors.
        train_iters: iterations of the whole run.
        tokens_per_iteration: of all ranks.
        save: directory of the run's record; None: there is none.

    Attributes:
        loss_name, unit: the log's names of the loss without the balancing term, and of tokens.
        learning_rate: of the last step.
    """

    loss_name, unit = "lm loss", "tokens"
    learning_rate = math.nan

    def __init__(self, engine: Any, train_iters: int, tokens_per_iteration: int, save: str | None = None) -> None:
        self.engine, self.train_iters, self.tokens_per_iteration = engine, train_iters, tokens_per_iteration
        self.record = RecordWriter(save if dist.get_rank() == 0 else None)
        self._sums = _Sums()
        self._timed_steps, self._timed_seconds = 0, 0.0

    def start(self, iteration: int, **facts: Any) -> None:
        """Notes in the record that a run starts, or goes on from an iteration, and what is trained."""
        names = {"loss_name": self.loss_name.replace(" ", "_"), "unit": self.unit, "train_iters": self.train_iters}
        self.record.write("start", iteration, **names, **facts)

    def add_micro_batch(self, output: TrainingOutput, share: float) -> None:
        """Adds the result of a forward pass, which is a share of its iteration."""
        self._sums.add(output, share)

    def add_step(self, seconds: float) -> None:
        """Notes that an iteration is over."""
        self._sums.steps += 1
        self._sums.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second, over all training steps of the run but the first."""
        return self._speed(self._timed_steps, self._timed_seconds)

    def write(self, iteration: int, consumed_samples: int) -> None:
        """Prints the log line of an iteration and hands its numbers to the monitors. Collective."""
        sums, self._sums = self._sums, _Sums()
        task_loss = mean_over_ranks(sums.task_loss / sums.steps)
        moe_loss = mean_over_ranks(sums.moe_loss / sums.steps)
        if iteration > 1:  # the first step pays for allocations and lazy set-up
            self._timed_steps += sums.steps
            self._timed_seconds += sums.seconds
        seconds = sums.seconds / sums.steps
        norm = self.engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else math.nan
        tokens_per_second = self._speed(sums.steps, sums.seconds)
        load = _load_shares(sums.exp_counts)
        low, high = min(map(min, load)), max(map(max, load))
        left = (self.train_iters - iteration) * seconds
        say(
            f"iteration {iteration:7d}/{self.train_iters} | consumed samples: {consumed_samples} | "
            f"{self.loss_name}: {task_loss:.8E} | moe loss: {moe_loss:.6E} | "
            f"learning rate: {self.learning_rate:.3E} | grad norm: {norm:.6f} | "
            f"{self.unit} per second: {tokens_per_second:.0f} | seconds per iteration: {seconds:.3f} | "
            f"expert load min/max: {low:.3f}/{high:.3f} | skipped: {self.engine.skipped_steps} | "
            f"left: {int(left) // 60}:{int(left) % 60:02d}"
        )
        values = {
            self.loss_name.replace(" ", "_"): task_loss,
            "moe_loss": moe_loss,
            f"{self.unit}_per_second": tokens_per_second,
            "seconds_per_iteration": seconds,
            "expert_load_min": low,
            "expert_load_max": high,
            "grad_norm": norm,
        }
        self._monitor("Train", consumed_samples, values)
        self.record.write(
            "step",
            iteration,
            consumed_samples=consumed_samples,
            learning_rate=self.learning_rate,
            expert_load=load,
            skipped=self.engine.skipped_steps,
            seconds_left=left,
            **values,
        )

    def write_validation(self, iteration: int, consumed_samples: int, loss: float) -> None:
        """Prints the line of a validation; the loss is in nats per token."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        say(f"validation at iteration {iteration} | lm loss: {loss:.8E} | perplexity: {perplexity:.4f}")
        self._validation(iteration, consumed_samples, {"lm_loss": loss, "perplexity": perplexity})

    def _validation(self, iteration: int, consumed_samples: int, values: dict[str, float]) -> None:
        self._monitor("Validation", consumed_samples, values)
        self.record.write("validation", iteration, consumed_samples=consumed_samples, **values)

    def _speed(self, steps: int, seconds: float) -> float:
        return steps * self.tokens_per_iteration / seconds if seconds else 0.0

    def _monitor(self, prefix: str, consumed_samples: int, values: dict[str, float]) -> None:
        if self.engine.monitor.enabled and dist.get_rank() == 0:
            self.engine.monitor.write_events([(f"{prefix}/{k}", v, consumed_samples) for k, v in values.items()])


def say(line: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def mean_over_ranks(value: Tensor | float) -> float:
    """Mean over all ranks. The ranks of a tensor-parallel group hold the same value. Collective."""
    mean = torch.as_tensor(value, dtype=torch.float64, device=device()).clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _load_shares(exp_counts: list[Tensor]) -> list[list[float]]:
    """For every MoE layer, the share of its routed tokens that each expert got, on all ranks. Collective."""
    shares = []
    for counts in exp_counts:
        total = counts.to(device=device(), dtype=torch.float64)
        dist.all_reduce(total)
        shares.append((total / total.sum().clamp(min=1)).tolist())
    return shares
