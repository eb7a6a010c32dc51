"""The pass before training in which the teacher writes its logits, so that training needs no teacher in memory.

The model holds the source's weights then, and no layer runs converted: nothing is copied. Each data-parallel rank reads
the samples of its files, one micro-batch after the other, as training does. All ranks make equally many passes, because
they share experts.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.config.adapt_section import DistillConfig
from scmoe_ds.data.teacher_logits import TeacherLogits, bytes_of
from scmoe_ds.engine.teacher import as_source
from scmoe_ds.models.divergence import best_tokens
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel.agreement import from_rank_zero, run_together
from scmoe_ds.parallel.process import device
from scmoe_ds.parallel.tensor import data_parallel_rank, data_parallel_size, tensor_parallel_rank
from scmoe_ds.training.log import say
from scmoe_ds.training.step_text import duration, rounded

_SECONDS_BETWEEN_LINES = 30.0


class TeacherPass:
    """Writes what the teacher says of a training set.

    Args:
        engine: its module is a GPT with the source's weights.
        conversion: of that model.
        data: the training samples of the whole run.
        store: where to.
        distill: temperature, and tokens that are kept.
        micro_batch_size: samples of one pass.
    """

    def __init__(
        self,
        engine: Any,
        conversion: Conversion,
        data: Any,
        store: TeacherLogits,
        distill: DistillConfig,
        micro_batch_size: int,
    ) -> None:
        self.engine, self.conversion, self.data, self.store = engine, conversion, data, store
        self.distill, self.micro_batch_size = distill, micro_batch_size

    def run(self) -> None:
        """Writes the files that are missing. Collective.

        Raises:
            DataError: on all ranks: a file that cannot be written.
        """
        missing = from_rank_zero(lambda: self.store.missing(len(self.data)))
        if not missing:
            return
        left, ranks = sum(map(len, missing)), data_parallel_size()
        size = bytes_of(left, self.data[0]["tokens"].numel(), self.distill.teacher_top_n)
        say(f"teacher: writes its logits of {left} samples to {self.store.directory}, {size / 1e9:.3g} GB in all")
        started = shown = time.perf_counter()
        done = 0
        for first in range(0, len(missing), ranks):
            self._write(missing, first + data_parallel_rank())
            done += sum(map(len, missing[first : first + ranks]))
            now = time.perf_counter()
            if now - shown > _SECONDS_BETWEEN_LINES:
                shown = now
                say(f"teacher: {done} of {left} samples  left {duration((now - started) / done * (left - done))}")
        say(f"teacher: its logits are complete, {rounded(left / (time.perf_counter() - started))} samples per second")

    def _write(self, missing: list[range], place: int) -> None:
        """One file of this rank. A rank too many repeats the last one's passes, and writes nothing."""
        numbers = missing[min(place, len(missing) - 1)]
        tokens, *of_teacher = (each[: len(numbers)] for each in self._passes(numbers))
        writes = place < len(missing) and tensor_parallel_rank() == 0
        run_together(partial(self.store.write, numbers, tokens, of_teacher) if writes else lambda: None)

    def _passes(self, numbers: range) -> list[Tensor]:
        """Tokens, best ids, their log-probabilities and that of the rest, [B, S, …] on the CPU. Every file takes
        as many passes: samples that the last one lacks are repeated."""
        model, size, parts = self.engine.module, self.micro_batch_size, []
        for first in range(0, self.store.samples_of_file, size):
            places = [numbers[min(place, len(numbers) - 1)] for place in range(first, first + size)]
            tokens = torch.stack([self.data[number]["tokens"] for number in places]).to(device())
            with as_source(self.engine, self.conversion):
                logits = model.local_logits(tokens)
                best = best_tokens(logits, self.distill.teacher_top_n, self.distill.temperature, model.group)
            parts.append([each.cpu() for each in (tokens, *best)])
        return [torch.cat(each) for each in zip(*parts, strict=True)]
