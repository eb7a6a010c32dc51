"""The log of a training run: sums between two log lines, the line itself, its record, and DeepSpeed's monitors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.models.flops import forward_flops
from scmoe_ds.moe.capacity import dropped_choices
from scmoe_ds.moe.shortcut import DGMoE
from scmoe_ds.parallel.process import device
from scmoe_ds.trace.spans import HiddenShare
from scmoe_ds.training.communication import CommunicationSample, schedule_entries
from scmoe_ds.training.record import TEACHERS_LOSS, RecordWriter
from scmoe_ds.training.settings import TrainingSettings
from scmoe_ds.training.step_text import step_line, validation_line
from scmoe_ds.training.utilization import Utilization, peak_memory_gib

OF_TEACHER = ("kl", "match")
"""Parts of a loss that a teacher's model has; see models.distillation.LossParts."""


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
    """Sums since the last log line. Tensors stay on the device, so that the host does not wait for a step.

    Attributes:
        gates: of the MoE layers, in the order of `exp_counts`; None where a layer's counts are those of two gates.
        of_teacher: "kl" and "match", where the model learns from a teacher.
    """

    gates: list[Any]
    steps: int = 0
    seconds: float = 0.0
    task_loss: Tensor | float = 0.0
    moe_loss: Tensor | float = 0.0
    dropped: Tensor | int = 0
    exp_counts: list[Tensor] = field(default_factory=list)
    of_teacher: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: TrainingOutput, share: float) -> None:
        assert output.task_loss is not None
        self.task_loss = self.task_loss + output.task_loss.detach() * share
        self.moe_loss = self.moe_loss + output.moe_loss.detach() * share
        for name in OF_TEACHER:
            if (part := getattr(output, name, None)) is not None:
                self.of_teacher[name] = self.of_teacher.get(name, 0.0) + part.detach() * share
        counts = [count.detach().to(device()).clone() for count in output.exp_counts]
        for gate, of_layer in zip(self.gates, counts, strict=True):
            self.dropped = self.dropped + (0 if gate is None else dropped_choices(gate, of_layer))
        if self.exp_counts:
            counts = [old + new for old, new in zip(self.exp_counts, counts, strict=True)]
        self.exp_counts = counts


class TrainingLog:
    """Collects losses, expert counts and times of the steps, and writes them: rank 0's lines, record and monitors.

    Args:
        engine: of `scmoe_ds.initialize`; its module is a GPT or a SwinMoE.
        settings: of the run.
        units_per_iteration: tokens (or images) of all ranks.

    Attributes:
        loss_name, unit: the record's names of the loss without the balancing term, and of tokens.
        learning_rate: of the last step.
        communication: the trainer has it watch the last micro-batch before a log line.
    """

    loss_name, unit = "lm_loss", "tokens"
    learning_rate = math.nan

    def __init__(self, engine: Any, settings: TrainingSettings, units_per_iteration: int) -> None:
        self.engine, self.settings, self.units_per_iteration = engine, settings, units_per_iteration
        self.record = RecordWriter(settings.save if dist.get_rank() == 0 else None)
        self.communication = CommunicationSample(engine)
        # A backward pass takes twice the operations of a forward pass.
        flops = 3 * forward_flops(engine.module) * units_per_iteration / dist.get_world_size()
        self._utilization = Utilization(engine, flops)
        layers = engine.module.moe_layers()
        self._gates = [None if isinstance(layer, DGMoE) else layer.deepspeed_moe.gate for layer in layers]
        self._sums = _Sums(self._gates)
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._schedules: list[Any] = []

    def start(self, facts: dict[str, Any]) -> None:
        """Notes in the record that a run starts, or goes on from facts["iteration"], and what is trained."""
        self.record.write("start", loss_name=self.loss_name, unit=self.unit, **facts)

    @property
    def peak_tflops(self) -> float | None:
        """What the card can do; the denominator of MFU. None: not known."""
        return self._utilization.peak

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
        """Writes the numbers of an iteration, means since the last log line. Collective."""
        sums, self._sums = self._sums, _Sums(self._gates)
        if iteration > 1:  # the first step pays for allocations and lazy set-up
            self._timed_steps += sums.steps
            self._timed_seconds += sums.seconds
        seconds = sums.seconds / sums.steps
        norm = self.engine.get_global_grad_norm()
        norm = None if norm is None or not math.isfinite(norm) else float(norm)
        measured = self.communication.take() or HiddenShare(0.0, 0.0)
        losses = [each / sums.steps for each in (sums.task_loss, sums.moe_loss, *sums.of_teacher.values())]
        of_rank = [sums.dropped, measured.communication_ms, measured.exposed_ms, *losses, *sums.exp_counts]
        dropped, communication_ms, exposed_ms, task_loss, moe_loss, *rest = means_over_ranks(of_rank)
        of_teacher, counts = dict(zip(sums.of_teacher, rest, strict=False)), rest[len(sums.of_teacher) :]
        load = _load_shares(counts, [len(of_layer) for of_layer in sums.exp_counts])
        scalars = {
            self.loss_name: task_loss,
            **of_teacher,
            "moe_loss": moe_loss,
            "learning_rate": self.learning_rate,
            "grad_norm": norm,
            f"{self.unit}_per_second": self._speed(sums.steps, sums.seconds),
            "seconds_per_iteration": seconds,
            **self._utilization.of_steps(seconds),
            "memory_gib": _largest_of_ranks(peak_memory_gib()),
            **self._communication(HiddenShare(communication_ms, exposed_ms)),
            "drop_rate": None if None in self._gates else dropped / max(sum(counts), 1.0),
            "expert_load_min": min(map(min, load)),
            "expert_load_max": max(map(max, load)),
            "skipped": self.engine.skipped_steps,
            "seconds_left": (self.settings.train_iters - iteration) * seconds,
        }
        say(step_line(iteration, self.settings.train_iters, self.unit, scalars, self.settings.log_precise))
        self._note_schedules(iteration)
        self.record.write("step", iteration, consumed_samples=consumed_samples, **scalars, expert_load=load)
        self._monitor("Train", consumed_samples, scalars)

    def write_validation(
        self, iteration: int, consumed_samples: int, loss: float, teachers: float | None = None
    ) -> None:
        """Writes the result of a validation, and that of the model's source; losses are in nats per token."""
        values = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
        values |= {} if teachers is None else {TEACHERS_LOSS: teachers}
        self._validation(iteration, consumed_samples, values, loss)

    def _validation(self, iteration: int, consumed_samples: int, values: dict[str, float], loss: float) -> None:
        values = {self.loss_name: loss, **values}
        say(validation_line(iteration, values, self.settings.log_precise))
        self.record.write("validation", iteration, consumed_samples=consumed_samples, **values)
        self._monitor("Validation", consumed_samples, values)

    def _speed(self, steps: int, seconds: float) -> float:
        return steps * self.units_per_iteration / seconds if seconds else 0.0

    def _communication(self, measured: HiddenShare) -> dict[str, float | None]:
        """The hidden share, and the milliseconds of a step in which a rank stood still for all-to-alls.

        Nothing where no tokens are exchanged.

        Args:
            measured: mean of the ranks; without communication if no micro-batch was watched.
        """
        if not self.communication.exists:
            return {}
        if not measured.communication_ms:
            return {"hidden": None, "exposed_ms": None}
        return {"hidden": measured.share, "exposed_ms": measured.exposed_ms * self.settings.accumulation_steps}

    def _note_schedules(self, iteration: int) -> None:
        """Writes the schedules to the record when they, or what is known of them, have changed."""
        overlap = self.engine.overlap
        chosen = [*overlap.schedules, overlap.measured]
        if not overlap.calibrating and chosen != self._schedules:
            self._schedules = chosen
            for entry in schedule_entries(overlap):
                self.record.write("schedule", iteration, **entry)

    def _monitor(self, prefix: str, consumed_samples: int, values: dict[str, Any]) -> None:
        if self.engine.monitor.enabled and dist.get_rank() == 0:
            known = [(f"{prefix}/{name}", value) for name, value in values.items() if value is not None]
            self.engine.monitor.write_events([(name, value, consumed_samples) for name, value in known])


def say(line: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def means_over_ranks(values: Sequence[Tensor | float]) -> list[float]:
    """Mean over all ranks of each number, in one exchange. Tensor-parallel ranks of a group hold the same. Collective.

    Args:
        values: numbers, and tensors of any shape, whose elements count one by one.
    """
    of_rank = [torch.as_tensor(value, dtype=torch.float64, device=device()).flatten() for value in values]
    total = torch.cat(of_rank)
    dist.all_reduce(total)
    return [value / dist.get_world_size() for value in total.tolist()]


def _largest_of_ranks(value: float) -> float:
    """Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _load_shares(counts: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    """For every MoE layer, the share of its routed tokens that each expert got.

    Args:
        counts: of the experts of all layers, one layer after the other.
        sizes: experts of each layer.
    """
    rest = iter(counts)
    layers = [list(itertools.islice(rest, size)) for size in sizes]
    totals = [sum(layer) or 1.0 for layer in layers]
    return [[count / total for count in layer] for layer, total in zip(layers, totals, strict=True)]
