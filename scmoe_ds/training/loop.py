"""The training loop: step, log, validate, save, resume, stop.

Random numbers (dropout, gate noise, token selection) belong to the micro-batch, not to the rank or the process. Each
micro-batch seeds the generators from (seed, iteration, its global number). A resumed run, or a run on another number of
data-parallel ranks, then draws the same numbers. Checkpoints hold no generator state.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
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
from scmoe_ds.parallel.standing import reach
from scmoe_ds.parallel.stopping import StopRequest
from scmoe_ds.parallel.tensor import data_parallel_rank, data_parallel_size
from scmoe_ds.planner.step_trace import StepTrace
from scmoe_ds.training.health import StepHealth, is_loss_scale_exhausted, not_finite, overflows_at_any_scale
from scmoe_ds.training.log import TrainingLog, TrainingOutput, means_over_ranks, say
from scmoe_ds.training.progress import Progress
from scmoe_ds.training.settings import Summary, TrainingSettings


class Trainer:
    """Drives a DeepSpeed engine over the training set.

    Args:
        engine: from `scmoe_ds.initialize`; its module is a GPT.
        train, valid: megatron-core data sets; `valid` may be None.
        settings: intervals, sizes and directories.
        description: of `checkpoint.describe`, for the checkpoints.
        iteration, consumed_samples: where a resumed run stands.
        carried: names and contents of the tokenizer's files, which each checkpoint carries.
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
        self.log = self.log_class(engine, settings, batch_size * settings.seq_length)
        self._distill = getattr(engine, "distill", None)
        self.health = StepHealth(engine, settings.accumulation_steps * self.data_ranks)
        self._stop: StopRequest | None = None
        self._told_to_stop = False  # in the middle of a validation
        self._saved: Path | None = None
        self._validation: tuple[int, float] | None = None
        self._trace = StepTrace(engine.overlap, settings.trace, settings.trace_dir)

    def run(self) -> Summary:
        """Trains up to `train_iters` or until something else ends the run, then validates and saves.

        Raises:
            TrainingError: on all ranks: a loss or gradient is not finite, or fp16 skips every step. Nothing is saved.
                When the run started from a checkpoint a few steps before, that checkpoint is marked, and the next
                --auto-resume goes further back.
        """
        try:
            return self._run()
        except TrainingError as error:
            self._note_failure(error)
            raise

    def _run(self) -> Summary:
        settings = self.settings
        is_over = self.iteration >= settings.train_iters
        batches = None if is_over else self._batches(self.train_set, self.consumed_samples)
        # Until the end of the save, which a second signal must not interrupt.
        with StopRequest(settings.exit_duration_min) as self._stop:
            with Progress(self.iteration, settings.train_iters) as progress:
                stopped = batches is not None and self._train(batches, self._stop, progress)
            # A scheduler that needs the machine does not wait for a validation.
            if not stopped and (self._validation is None or self._validation[0] != self.iteration):
                self._validate()
            saved = self._saved is not None and self._due(settings.save_interval)
            if settings.save and batches is not None and not saved:
                self._save()
        self._trace.close()
        loss = self._validation[1] if self._validation else None
        return Summary(self.iteration, loss, self.log.tokens_per_second, self._saved)

    def _train(self, batches: Iterator[dict[str, Tensor]], stop: StopRequest, progress: Progress) -> bool:
        """Trains until the last iteration. Returns whether a signal or the time limit ended it earlier."""
        settings = self.settings
        while self.iteration < settings.train_iters:
            started, iteration = time.perf_counter(), self.iteration + 1
            reach(f"the start of iteration {iteration}", iteration)
            try:
                self.step(batches)
                reach(f"the end of iteration {iteration}")
                agreement = stop.agreed(self.health.finding())
            except Exception as error:
                at_iteration(error, iteration)
                raise
            self.log.add_step(time.perf_counter() - started)
            progress.update()
            self._require_health(agreement.finding)
            if self._is_logged(self.iteration):
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
                reason = stop.agreed().reason  # a signal may have come during the long validation or save
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
            say(f"{marked} does not train: the next --auto-resume goes further back; --load {marked} still uses it")

    def step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step over `accumulation_steps` micro-batches per rank."""
        settings = self.settings
        for micro_step in range(settings.accumulation_steps):
            if micro_step == settings.accumulation_steps - 1:
                self._watch(self.iteration + 1)
            number = micro_step * self.data_ranks + self.data_rank
            seed_micro_batch(settings.seed, self.iteration, number)
            output = self._forward(next(batches), self._samples(number))
            assert output.loss is not None
            self.health.note(output.loss, number)
            self.engine.backward(output.loss)
            self._engine_step()
            self.log.add_micro_batch(output, 1 / settings.accumulation_steps)
        self.iteration += 1
        self.consumed_samples += settings.rank_batch_size * self.data_ranks
        self._trace.end(self.iteration)
        self._trace.draw()
        self.log.communication.end()

    def _watch(self, iteration: int) -> None:
        """Records the last micro-batch of an iteration, if its trace or its log line wants that."""
        self._trace.begin(iteration)
        if self._is_logged(iteration) and not self._trace.is_recording:
            self.log.communication.begin()

    def _is_logged(self, iteration: int) -> bool:
        return iteration % self.settings.log_interval == 0 or iteration in (1, self.settings.train_iters)

    def _engine_step(self) -> None:
        rates = self.engine.get_lr()
        self.log.learning_rate = rates[0]
        # The step advances the schedule. DeepSpeed's monitor events and log lines come after that, and would show the
        # next step's rate.
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
        """Ends a run that has diverged, before it is saved."""
        self.health.check_skipped_steps(self.iteration)
        if not finding:
            return
        what, number = self.health.explain(finding)
        if number is None:
            raise not_finite(what, self.iteration, "", ())
        settings = self.settings
        micro_step, data_rank = divmod(number, self.data_ranks)
        place = f"micro-batch {micro_step + 1} of {settings.accumulation_steps} on data-parallel rank {data_rank}"
        samples = self._samples(number - settings.accumulation_steps * self.data_ranks)
        raise not_finite(what, self.iteration, place, samples, documents_of(self.train_set, samples))

    def evaluate(self, data: Any) -> float | None:
        """Mean loss in nats per token over the first `eval_iters` batches of every rank, which are always the same.

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
        return None if self._told_to_stop else means_over_ranks([total / batch_count])[0]

    def _until_stopped(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Batches of a validation, until the ranks agree to stop."""
        for batch in batches:
            self._told_to_stop = self._stop is not None and self._stop.agreed().reason is not None
            if self._told_to_stop:
                return
            yield batch

    def _samples(self, number: int) -> range:
        """The training samples of an iteration's micro-batch, counted over all data-parallel ranks."""
        first = self.consumed_samples + number * self.settings.micro_batch_size
        return range(first, first + self.settings.micro_batch_size)

    def _forward(self, batch: dict[str, Tensor], samples: range | None = None) -> TrainingOutput:
        """`samples`: of a training pass."""
        on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
        tokens, given = on_device.pop("tokens"), on_device
        if self._distill is not None and samples is not None:
            given["targets"] = self._distill.teach(tokens, samples=samples)
        return self.engine(tokens, **given)

    def _batches(self, data: Any, consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        loader = pretraining_batches(
            data,
            num_workers=self.settings.num_workers,
            micro_batch_size=self.settings.micro_batch_size,
            data_parallel_rank=self.data_rank,
            data_parallel_size=self.data_ranks,
            consumed_samples=consumed_samples,
        )
        return iter(loader)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _validate(self) -> None:
        if self.valid_set is None:
            return
        loss = self.evaluate(self.valid_set)
        if loss is None:
            say(f"validation at iteration {self.iteration}  given up: the job is to stop")
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
