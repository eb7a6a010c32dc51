"""The training loop: step, log, validate, save, resume, stop.

Random numbers (dropout, gate noise, token selection) belong to the micro-batch, not to the rank or the process: each
micro-batch seeds the generators from (seed, iteration, its global number). A resumed run and a run on another number
of data-parallel ranks then draw the same numbers, and no generator state is kept in checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds import checkpoint
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.engine import device
from scmoe_ds.models.gpt import GPTOutput
from scmoe_ds.overlap.recorder import Recorder
from scmoe_ds.overlap.timeline import save_timeline
from scmoe_ds.parallel.stopping import StopRequest


class TrainingError(ValueError):
    """Training cannot go on, and why."""


@dataclass(frozen=True)
class RunSettings:
    """What the loop needs beside engine and data; iterations are optimizer steps, `trace` the one to draw."""

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

    @property
    def rank_batch_size(self) -> int:
        """Sequences that one rank reads per iteration."""
        return self.micro_batch_size * self.accumulation_steps


@dataclass(frozen=True)
class Summary:
    """How a run ended. Losses in nats per token, averaged over ranks; tokens_per_second over training steps only."""

    iteration: int
    validation_loss: float | None
    tokens_per_second: float
    checkpoint: Path | None


@dataclass
class _Meter:
    """Sums since the last log line; tensors stay on the device so that a step does not wait for the host."""

    steps: int = 0
    seconds: float = 0.0
    lm_loss: Tensor | float = 0.0
    moe_loss: Tensor | float = 0.0
    exp_counts: list[Tensor] = field(default_factory=list)

    def add(self, output: GPTOutput, share: float) -> None:
        assert output.lm_loss is not None
        self.lm_loss = self.lm_loss + output.lm_loss.detach() * share
        self.moe_loss = self.moe_loss + output.moe_loss.detach() * share
        counts = [count.detach().clone() for count in output.exp_counts]
        if self.exp_counts:
            counts = [old + new for old, new in zip(self.exp_counts, counts, strict=True)]
        self.exp_counts = counts


class Trainer:
    """Drives a DeepSpeed engine over the training set.

    Args:
        engine: from `scmoe_ds.initialize`; its module is a GPT.
        train, valid: megatron-core data sets; `valid` may be None.
        settings: intervals, sizes and directories.
        description: what checkpoints are labelled with (`checkpoint.describe`).
        iteration, consumed_samples: where a resumed run stands.
    """

    def __init__(
        self,
        engine: Any,
        train: Any,
        valid: Any,
        settings: RunSettings,
        description: dict[str, Any],
        iteration: int = 0,
        consumed_samples: int = 0,
    ) -> None:
        self.engine, self.train_set, self.valid_set = engine, train, valid
        self.settings, self.description = settings, description
        self.iteration, self.consumed_samples = iteration, consumed_samples
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self._meter = _Meter()
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._saved: Path | None = None
        self._validation: tuple[int, float] | None = None
        self._traced = False

    def run(self) -> Summary:
        """Trains up to `train_iters` (or until something else ends it), then validates and saves.

        Raises:
            TrainingError: the loss is not finite.
        """
        settings = self.settings
        batches = (
            self._batches(self.train_set, self.consumed_samples) if self.iteration < settings.train_iters else None
        )
        with StopRequest(settings.exit_duration_min) as stop:  # to the end: a second signal must not cut the save
            stopped = batches is not None and self._train(batches, stop)
            # A scheduler that wants the machine back does not wait for a validation.
            if not stopped and (self._validation is None or self._validation[0] != self.iteration):
                self._validate()
            saved = self._saved is not None and self._due(settings.save_interval)
            if settings.save and batches is not None and not saved:
                self._save()
        if settings.trace is not None and not self._traced:
            self._print(f"--scmoe-trace {settings.trace}: not written, the run ended before that iteration, or before "
                        "its schedule was chosen")  # fmt: skip
        loss = self._validation[1] if self._validation else None
        return Summary(
            self.iteration, loss, self._tokens_per_second(self._timed_steps, self._timed_seconds), self._saved
        )

    def _train(self, batches: Iterator[dict[str, Tensor]], stop: StopRequest) -> bool:
        """Steps until the last iteration; returns whether a signal or the limit of time ended it before."""
        settings = self.settings
        while self.iteration < settings.train_iters:
            self.step(batches)
            if self._due(settings.log_interval) or self.iteration in (1, settings.train_iters):
                self._log()
            if self._due(settings.eval_interval):
                self._validate()
            if settings.save and self._due(settings.save_interval):
                self._save()
            if self._due(settings.exit_interval):
                self._print(f"stopping at iteration {self.iteration}: --exit-interval {settings.exit_interval}")
                break
            if (reason := stop.agreed()) is not None:
                self._print(f"stopping at iteration {self.iteration}: {reason}")
                return True
        return False

    def step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step over `accumulation_steps` micro-batches per rank."""
        started = time.perf_counter()
        settings, recorder = self.settings, None
        for micro_step in range(settings.accumulation_steps):
            if micro_step == settings.accumulation_steps - 1:
                recorder = self._begin_trace()
            seed_micro_batch(settings.seed, self.iteration, micro_step * self.ranks + self.rank)
            output = self._forward(next(batches))
            self.engine.backward(output.loss)
            self.engine.step()
            self._meter.add(output, 1 / settings.accumulation_steps)
        self.iteration += 1
        self.consumed_samples += settings.rank_batch_size * self.ranks
        self._meter.steps += 1
        self._meter.seconds += time.perf_counter() - started
        if recorder is not None:
            self._end_trace(recorder)

    def evaluate(self, data: Any) -> float:
        """Mean loss in nats per token over the first `eval_iters` batches of every rank, the same each time."""
        self.engine.eval()
        batches = self._batches(data, 0)
        total = torch.zeros((), dtype=torch.float64, device=device())
        batch_count = 0
        with torch.no_grad():
            for batch_count, batch in zip(range(1, self.settings.eval_iters + 1), batches, strict=False):
                seed_micro_batch(self.settings.seed, -1, batch_count * self.ranks + self.rank)
                loss = self._forward(batch).lm_loss
                assert loss is not None
                total += loss.double()
        self.engine.train()
        return _mean_over_ranks(total / batch_count)

    def _begin_trace(self) -> Recorder | None:
        """Records one micro-batch of the wanted iteration, or of the first with its final schedule after it."""
        wanted = self.settings.trace
        if self._traced or wanted is None or self.iteration + 1 < wanted or self.engine.overlap.calibrating:
            return None
        self._traced = True
        dist.barrier()  # one origin of time for all ranks
        recorder = Recorder(device())
        self.engine.overlap.record(recorder)
        return recorder

    def _end_trace(self, recorder: Recorder) -> None:
        self.engine.overlap.record(None)
        spans = recorder.spans()
        if not spans:  # on no rank then: all have the same layers
            self._print("--scmoe-trace: nothing to draw; DeepSpeed's own layers are not recorded")
            return
        try:
            for path in save_timeline(spans, self.settings.trace_dir, self.iteration):
                self._print(f"wrote {path}")
        except Exception as error:  # on rank 0 alone, and a picture is no reason to stop
            self._print(f"--scmoe-trace: not written: {error}")

    def _forward(self, batch: dict[str, Tensor]) -> GPTOutput:
        on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
        return self.engine(on_device["tokens"], labels=on_device["labels"], loss_mask=on_device["loss_mask"])

    def _batches(self, data: Any, consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        return iter(pretraining_batches(
            data, micro_batch_size=self.settings.micro_batch_size, data_parallel_rank=self.rank,
            data_parallel_size=self.ranks, consumed_samples=consumed_samples, num_workers=self.settings.num_workers,
        ))  # fmt: skip

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _log(self) -> None:
        self._check_finite()
        meter, self._meter = self._meter, _Meter()
        lm_loss = _mean_over_ranks(meter.lm_loss / meter.steps)
        moe_loss = _mean_over_ranks(meter.moe_loss / meter.steps)
        if self.iteration > 1:  # the first step pays for allocations and lazy set-up
            self._timed_steps += meter.steps
            self._timed_seconds += meter.seconds
        seconds = meter.seconds / meter.steps
        norm, rate = self.engine.get_global_grad_norm(), self.engine.get_lr()[0]
        tokens_per_second = self._tokens_per_second(meter.steps, meter.seconds)
        low, high = _load_shares(meter.exp_counts)
        left = (self.settings.train_iters - self.iteration) * seconds
        self._print(
            f"iteration {self.iteration:7d}/{self.settings.train_iters} | consumed samples: {self.consumed_samples} | "
            f"lm loss: {lm_loss:.8E} | moe loss: {moe_loss:.6E} | learning rate: {rate:.3E} | "
            f"grad norm: {float(norm) if norm is not None else math.nan:.6f} | "
            f"tokens per second: {tokens_per_second:.0f} | seconds per iteration: {seconds:.3f} | "
            f"expert load min/max: {low:.3f}/{high:.3f} | skipped: {self.engine.skipped_steps} | "
            f"left: {int(left) // 60}:{int(left) % 60:02d}"
        )
        self._monitor({"lm_loss": lm_loss, "moe_loss": moe_loss, "tokens_per_second": tokens_per_second,
                       "seconds_per_iteration": seconds, "expert_load_min": low, "expert_load_max": high,
                       "grad_norm": float(norm) if norm is not None else math.nan}, "Train")  # fmt: skip

    def _check_finite(self) -> None:
        """A run that has diverged must neither be saved nor go on; fp16 has its own loss scaling."""
        if self._meter.steps and not self.engine.fp16_enabled():
            loss = _mean_over_ranks(self._meter.lm_loss / self._meter.steps)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"lm loss is {loss} in the steps up to iteration {self.iteration}; they were not saved. "
                    "Lower the learning rate or set gradient_clipping"
                )

    def _validate(self) -> None:
        self._check_finite()
        if self.valid_set is None:
            return
        loss = self.evaluate(self.valid_set)
        self._validation = (self.iteration, loss)
        self._print(
            f"validation at iteration {self.iteration} | lm loss: {loss:.8E} | perplexity: {_perplexity(loss):.4f}"
        )
        self._monitor({"lm_loss": loss, "perplexity": _perplexity(loss)}, "Validation")

    def _save(self) -> None:
        self._check_finite()
        assert self.settings.save is not None
        self._saved = checkpoint.save(
            self.engine, self.settings.save, self.iteration, self.consumed_samples, self.description
        )
        self._print(f"saved {self._saved}")

    def _tokens_per_second(self, steps: int, seconds: float) -> float:
        return (
            steps * self.settings.rank_batch_size * self.ranks * self.settings.seq_length / seconds if seconds else 0.0
        )

    def _monitor(self, values: dict[str, float], prefix: str) -> None:
        if self.engine.monitor.enabled and self.rank == 0:
            self.engine.monitor.write_events([(f"{prefix}/{k}", v, self.consumed_samples) for k, v in values.items()])

    def _print(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def seed_micro_batch(seed: int, iteration: int, number: int) -> None:
    """Seeds torch's generators for one micro-batch; iteration -1 is validation."""
    digest = hashlib.sha256(f"{seed} {iteration} {number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _mean_over_ranks(value: Tensor | float) -> float:
    mean = torch.as_tensor(value, dtype=torch.float64, device=device()).clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _load_shares(exp_counts: list[Tensor]) -> tuple[float, float]:
    """Least and largest share of the routed tokens that any expert of any layer got, over all ranks."""
    shares = []
    for counts in exp_counts:
        total = counts.to(device=device(), dtype=torch.float64)
        dist.all_reduce(total)
        shares.append(total / total.sum().clamp(min=1))
    return min(float(share.min()) for share in shares), max(float(share.max()) for share in shares)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
