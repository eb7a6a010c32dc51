"""The training loop: step, log, validate, save, resume, stop.

Random numbers (dropout, gate noise, token selection) belong to the micro-batch, not to the rank or the process: each
micro-batch seeds the generators from (seed, iteration, its global number). A resumed run and a run on another number
of data-parallel ranks then draw the same numbers, and no generator state is kept in checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds import checkpoint
from scmoe_ds.data.dataset import documents_of
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.errors import TrainingError
from scmoe_ds.parallel.failures import at_iteration
from scmoe_ds.parallel.process import device
from scmoe_ds.parallel.stopping import StopRequest
from scmoe_ds.parallel.tensor import data_parallel_rank, data_parallel_size
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.trace.timeline import save_timeline
from scmoe_ds.training.health import StepHealth, is_loss_scale_exhausted, not_finite, overflows_at_any_scale
from scmoe_ds.training.log import TrainingLog, TrainingOutput, mean_over_ranks, say


@dataclass(frozen=True)
class TrainingSettings:
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
    keep_last: int | None = None

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


class Trainer:
    """Drives a DeepSpeed engine over the training set.

    Args:
        engine: from `scmoe_ds.initialize`; its module is a GPT.
        train, valid: megatron-core data sets; `valid` may be None.
        settings: intervals, sizes and directories.
        description: what checkpoints are labelled with (`checkpoint.describe`).
        iteration, consumed_samples: where a resumed run stands.
        carried: names and contents of files that each checkpoint carries: the tokenizer's.
    """

    log_class: type[TrainingLog] = TrainingLog

    def __init__(
        self,
        engine: Any,
        train: Any,
        valid: Any,
        settings: TrainingSettings,
        description: dict[str, Any],
        iteration: int = 0,
        consumed_samples: int = 0,
        carried: Mapping[str, bytes] | None = None,
    ) -> None:
        self.engine, self.train_set, self.valid_set = engine, train, valid
        self.settings, self.description, self.carried = settings, description, carried
        self.iteration, self.consumed_samples = iteration, consumed_samples
        # Tensor-parallel ranks of a group read the same data and draw the same random numbers.
        self.data_rank, self.data_ranks = data_parallel_rank(), data_parallel_size()
        batch_size = settings.rank_batch_size * self.data_ranks
        self.log = self.log_class(engine, settings.train_iters, batch_size * settings.seq_length)
        self.health = StepHealth(engine, settings.accumulation_steps * self.data_ranks)
        self._stop: StopRequest | None = None
        self._told_to_stop = False  # in the middle of a validation
        self._saved: Path | None = None
        self._validation: tuple[int, float] | None = None
        self._traced = False

    def run(self) -> Summary:
        """Trains up to `train_iters` (or until something else ends it), then validates and saves.

        Raises:
            TrainingError: a loss or gradient is not finite, or fp16 skips every step; on all ranks, nothing is saved.
                A checkpoint that the run came from a few steps before is marked: the next --auto-resume goes further
                back.
        """
        try:
            return self._run()
        except TrainingError as error:
            self._note_failure(error)
            raise

    def _run(self) -> Summary:
        settings = self.settings
        batches = (
            self._batches(self.train_set, self.consumed_samples) if self.iteration < settings.train_iters else None
        )
        # To the end: a second signal must not cut the save.
        with StopRequest(settings.exit_duration_min) as self._stop:
            stopped = batches is not None and self._train(batches, self._stop)
            # A scheduler that wants the machine back does not wait for a validation.
            if not stopped and (self._validation is None or self._validation[0] != self.iteration):
                self._validate()
            saved = self._saved is not None and self._due(settings.save_interval)
            if settings.save and batches is not None and not saved:
                self._save()
        if settings.trace is not None and not self._traced:
            say(
                f"--scmoe-trace {settings.trace}: not written, the run ended before that iteration, or before "
                "its schedule was chosen"
            )
        loss = self._validation[1] if self._validation else None
        return Summary(self.iteration, loss, self.log.tokens_per_second, self._saved)

    def _train(self, batches: Iterator[dict[str, Tensor]], stop: StopRequest) -> bool:
        """Steps until the last iteration; returns whether a signal or the limit of time ended it before."""
        settings = self.settings
        while self.iteration < settings.train_iters:
            started, iteration = time.perf_counter(), self.iteration + 1
            try:
                self.step(batches)
                agreement = stop.agreed(self.health.finding())
            except Exception as error:
                at_iteration(error, iteration)
                raise
            self.log.add_step(time.perf_counter() - started)
            self._require_health(agreement.finding)
            if self._due(settings.log_interval) or self.iteration in (1, settings.train_iters):
                self.log.write(self.iteration, self.consumed_samples)
            if self._due(settings.eval_interval):
                self._validate()
            if settings.save and self._due(settings.save_interval):
                self._save()
            if self._due(settings.exit_interval):
                say(f"stopping at iteration {self.iteration}: --exit-interval {settings.exit_interval}")
                break
            reason = agreement.reason
            if reason is None and (self._due(settings.eval_interval) or self._due(settings.save_interval)):
                reason = stop.agreed().reason  # validations and saves are long: a signal that came in them
            if reason is not None:
                say(f"stopping at iteration {self.iteration}: {reason}")
                return True
        return False

    def _note_failure(self, error: TrainingError) -> None:
        if self.settings.save is None or error.since is None or dist.get_rank() != 0:
            return
        reason = str(error).split("; ", 1)[0]
        marked = checkpoint.note_failure(Path(self.settings.save), error.since, reason)
        if marked is not None:
            say(
                f"{marked} does not train: the next --auto-resume goes further back; --load {marked} uses it all the "
                "same"
            )

    def step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step over `accumulation_steps` micro-batches per rank."""
        settings, recorder = self.settings, None
        for micro_step in range(settings.accumulation_steps):
            if micro_step == settings.accumulation_steps - 1:
                recorder = self._begin_trace()
            number = micro_step * self.data_ranks + self.data_rank
            seed_micro_batch(settings.seed, self.iteration, number)
            output = self._forward(next(batches))
            assert output.loss is not None
            self.health.note(output.loss, number)
            self.engine.backward(output.loss)
            self._engine_step()
            self.log.add_micro_batch(output, 1 / settings.accumulation_steps)
        self.iteration += 1
        self.consumed_samples += settings.rank_batch_size * self.data_ranks
        if recorder is not None:
            self._end_trace(recorder)

    def _engine_step(self) -> None:
        rates = self.engine.get_lr()
        self.log.learning_rate = rates[0]
        # The schedule goes on within the step. DeepSpeed's own monitor events and lines come after it, and would show
        # the next step's rate.
        self.engine.get_lr = lambda: rates
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed raises nothing narrower for this
            if is_loss_scale_exhausted(error):
                finding = "DeepSpeed's loss scale is at its minimum"
                since = self.iteration + 1 - self.health.skipped_in_a_row
                raise overflows_at_any_scale(self.iteration + 1, finding, since) from None
            raise
        finally:
            del self.engine.get_lr

    def _require_health(self, finding: int) -> None:
        """A run that has diverged must neither be saved nor go on."""
        self.health.check_skipped_steps(self.iteration)
        if not finding:
            return
        what, number = self.health.explain(finding)
        if number is None:
            raise not_finite(what, self.iteration, "", ())
        settings = self.settings
        micro_step, data_rank = divmod(number, self.data_ranks)
        place = f"micro-batch {micro_step + 1} of {settings.accumulation_steps} on data-parallel rank {data_rank}"
        before = self.consumed_samples - settings.rank_batch_size * self.data_ranks
        first = before + number * settings.micro_batch_size
        samples = range(first, first + settings.micro_batch_size)
        raise not_finite(what, self.iteration, place, samples, documents_of(self.train_set, samples))

    def evaluate(self, data: Any) -> float | None:
        """Mean loss in nats per token over the first `eval_iters` batches of every rank, the same each time.

        None if the ranks were told to stop meanwhile. Collective.
        """
        self.engine.eval()
        batches = self._until_stopped(self._batches(data, 0))
        total = torch.zeros((), dtype=torch.float64, device=device())
        batch_count = 0
        with torch.no_grad():
            for batch_count, batch in zip(range(1, self.settings.eval_iters + 1), batches, strict=False):
                seed_micro_batch(self.settings.seed, -1, batch_count * self.data_ranks + self.data_rank)
                loss = self._forward(batch).task_loss
                assert loss is not None
                total += loss.double()
        self.engine.train()
        return None if self._told_to_stop else mean_over_ranks(total / batch_count)

    def _until_stopped(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Batches of a validation, which ends early when the ranks have agreed to stop."""
        for batch in batches:
            self._told_to_stop = self._stop is not None and self._stop.agreed().reason is not None
            if self._told_to_stop:
                return
            yield batch

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
            say("--scmoe-trace: nothing to draw; DeepSpeed's own layers are not recorded")
            return
        try:
            for path in save_timeline(spans, self.settings.trace_dir, self.iteration):
                say(f"wrote {path}")
        except Exception as error:  # on rank 0 alone, and a picture is no reason to stop
            say(f"--scmoe-trace: not written: {error}")

    def _forward(self, batch: dict[str, Tensor]) -> TrainingOutput:
        on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
        return self.engine(on_device["tokens"], labels=on_device["labels"], loss_mask=on_device["loss_mask"])

    def _batches(self, data: Any, consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        return iter(
            pretraining_batches(
                data,
                micro_batch_size=self.settings.micro_batch_size,
                num_workers=self.settings.num_workers,
                data_parallel_rank=self.data_rank,
                data_parallel_size=self.data_ranks,
                consumed_samples=consumed_samples,
            )
        )

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _validate(self) -> None:
        if self.valid_set is None:
            return
        loss = self.evaluate(self.valid_set)
        if loss is None:
            say(f"validation at iteration {self.iteration} | given up: the job is to stop")
            return
        if not math.isfinite(loss):
            raise not_finite(f"validation loss is {loss}", self.iteration, "", ())
        self._validation = (self.iteration, loss)
        self.log.write_validation(self.iteration, self.consumed_samples, loss)

    def _save(self) -> None:
        assert self.settings.save is not None
        try:
            self._saved = checkpoint.save(
                self.engine,
                self.settings.save,
                self.iteration,
                self.consumed_samples,
                self.description,
                self.settings.keep_last,
                self.carried,
                self._validation[0] if self._validation else None,
            )
        except checkpoint.NotFiniteError as error:
            raise TrainingError(str(error), since=self.iteration) from None
        except Exception as error:
            at_iteration(error, self.iteration)
            raise
        say(f"saved {self._saved}")


def seed_micro_batch(seed: int, iteration: int, number: int) -> None:
    """Seeds torch's generators for one micro-batch; iteration -1 is validation."""
    digest = hashlib.sha256(f"{seed} {iteration} {number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
