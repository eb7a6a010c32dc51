"""Times the parts of every pair during the first micro-batches, then gives each the schedule that its times call for.

The timed micro-batches are ordinary training steps whose communication blocks: they compute the same numbers, only
without overlap. Every rank times its own part; the slowest rank's medians are everyone's, so that all ranks plan alike.
A rank with another schedule would launch its all-to-alls in another order, and the run would hang.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from scmoe_ds.config import OverlapConfig, ScMoEConfigError
from scmoe_ds.overlap.calibration_file import Description, find_times, read_calibration, write_calibration
from scmoe_ds.overlap.executor import Pair, backbone_names
from scmoe_ds.overlap.plan_text import plan_lines
from scmoe_ds.overlap.recorder import SILENT, PairRecorder, Recorder, Span
from scmoe_ds.overlap.schedule import Mode, Plan, Schedule, plan
from scmoe_ds.overlap.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes

logger = logging.getLogger("scmoe_ds")

CHUNK_COUNTS = (1, 2, 4)
"""Numbers of chunks that "auto" chooses from. Every further one would cost timed steps; beyond four, launches and small
matrix products eat what is gained."""

_PARTS = {"gate": ("shortcut norm", "gate"), "encode": ("encode",), "decode": ("decode", "merge")}
"""Parts of OperatorTimes and the spans that they are made of."""

_TRANSFERS_AND_EXPERTS = ("dispatch", "experts", "combine")


class ScheduledPair(Pair, Protocol):
    """What calibration asks of a pair; see models.blocks.ScheduledRun."""

    schedule: Schedule
    forward_schedule: Schedule | None
    recorder: PairRecorder

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks between which rows travel."""


class AdaptiveOverlap:
    """The schedules of a model: fixed ones as they are, automatic ones once their times are known.

    Args:
        model: its forward pass is one micro-batch.
        pairs: the model's pairs, in order.
        descriptions: for each pair, all that its times depend on (JSON values, "expert_parallel_size" among them), the
            same on every rank. Pairs that agree share their times.
        settings: the section's "overlap".
        device: where the pairs compute.

    Raises:
        ScMoEConfigError: a `calibration_file` that cannot be read or is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[ScheduledPair],
        descriptions: Sequence[Description],
        settings: OverlapConfig,
        device: torch.device,
    ) -> None:
        self.pairs, self.settings, self.device = list(pairs), settings, device
        self._descriptions: list[Description] = []
        self._kinds: list[list[int]] = []  # MoE layers by kind
        for layer, description in enumerate(descriptions):
            if description not in self._descriptions:
                self._descriptions.append(description)
                self._kinds.append([])
            self._kinds[self._descriptions.index(description)].append(layer)
        self._times: list[OperatorTimes] | None = None
        self._micro_batches = 0  # in training, so far
        self._running: tuple[int, Recorder] | None = None  # chunks and recorder of the micro-batch under way
        self._samples: list[tuple[int, list[Span]]] = []
        self._hook = None
        if not self.pairs or not self._wanted():
            return
        saved = read_calibration(settings.calibration_file)
        if saved is not None:
            source = f"scmoe.overlap.calibration_file = {settings.calibration_file}"
            self._adopt(find_times(saved, self._descriptions, source))
        elif settings.calibration_steps:
            self._hook = model.register_forward_pre_hook(self._before_forward)

    @property
    def calibrating(self) -> bool:
        """Whether micro-batches are still being timed."""
        return self._hook is not None

    @property
    def times(self) -> list[OperatorTimes] | None:
        """Measured times of each kind of pair, or None."""
        return self._times

    def plans(self) -> list[tuple[list[int], Plan, Plan]]:
        """For each kind of pair its MoE layers, the plan for training and that for a forward pass alone."""
        return [
            (layers, self._plan(times, "train"), self._plan(times, "forward"))
            for layers, times in zip(self._kinds, self._times or [], strict=False)
        ]

    def report(self) -> list[str]:
        """The measured times and what follows from them, as lines of text; empty without times."""
        lines: list[str] = []
        for times, (layers, train, forward) in zip(self._times or [], self.plans(), strict=True):
            name = f"MoE layer {layers[0]}" + (f"–{layers[-1]}" if len(layers) > 1 else "")
            lines += plan_lines(name, times, train, forward)
        return lines

    def record(self, recorder: Recorder | None) -> None:
        """Has all pairs report to a recorder from the next forward pass on, or to none."""
        for layer, pair in enumerate(self.pairs):
            pair.recorder = SILENT if recorder is None else recorder.pair(layer)

    def state(self) -> list[dict[str, Any]] | None:
        """The measured times for a checkpoint or a file; None before they are known."""
        if self._times is None:
            return None
        pairs = zip(self._descriptions, self._times, strict=True)
        return [
            {"description": dict(description), "times": times.model_dump(mode="json")} for description, times in pairs
        ]

    def resume(self, saved: list[dict[str, Any]] | None) -> None:
        """Takes the times of a checkpoint instead of measuring again, if they are of this model on this hardware."""
        if not saved or not self.calibrating:
            return
        try:
            times = find_times(saved, self._descriptions, "the checkpoint's calibration")
        except ScMoEConfigError as error:
            if dist.get_rank() == 0:
                logger.info("times are measured again: %s", error)
            return
        if dist.get_rank() == 0:
            logger.info("times from the checkpoint, nothing is measured again:")
        self._adopt(times)

    def _wanted(self) -> bool:
        settings = self.settings
        travels = any(description["expert_parallel_size"] > 1 for description in self._descriptions)
        return travels and settings.enabled and "auto" in (settings.expert_slot, settings.num_chunks)

    def _chunk_counts(self) -> tuple[int, ...]:
        slots, chunks = self.settings.expert_slot, self.settings.num_chunks
        if isinstance(slots, list):
            chunks = len(slots)
        return CHUNK_COUNTS if isinstance(chunks, str) else tuple({1: None, chunks: None})

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            self.record(None)
            return
        if self._running is not None:
            chunks, recorder = self._running
            self._samples.append((chunks, recorder.spans()))
            self._running = None
        if self._micro_batches > self.settings.calibration_steps:
            self.record(None)
            self._adopt([self._times_of_kind(layers) for layers in self._kinds])
            if self.settings.calibration_file is not None:
                write_calibration(self.settings.calibration_file, self.state())
            return
        counts = self._chunk_counts()
        # The first micro-batch pays for allocations and connections: it is not timed.
        chunks = counts[(self._micro_batches - 1) % len(counts)] if self._micro_batches else 1
        for pair in self.pairs:
            pair.schedule = Schedule(pair.schedule.slots[0], chunks, overlap=False)
        if self._micro_batches:
            self._running = chunks, Recorder(self.device)
            self.record(self._running[1])
        self._micro_batches += 1

    def _times_of_kind(self, layers: list[int]) -> OperatorTimes:
        """The slowest rank's medians over micro-batches and layers."""
        samples: defaultdict[tuple[int, str, str], list[float]] = defaultdict(list)
        for chunks, spans in self._samples:
            for layer in layers:
                for (name, phase), milliseconds in _totals(spans, layer).items():
                    # What is not cut takes the same time whatever the number of chunks.
                    count = chunks if name in _TRANSFERS_AND_EXPERTS else 1
                    samples[count, name, phase].append(milliseconds)
        pair = self.pairs[layers[0]]
        backbone = backbone_names(pair)
        measured = [count for count in self._chunk_counts() if any(count == chunks for chunks, _ in self._samples)]
        names = [*_TRANSFERS_AND_EXPERTS, *(name for part in _PARTS.values() for name in part), *backbone]
        # The same list on every rank, whatever each of them has seen.
        keys = list(itertools.product(measured, names, ("forward", "backward")))
        for key in keys:
            if key[1] in ("dispatch", "combine"):
                samples[key] = self._of_the_last_rank(samples[key], pair.group)
        # The lower of two middle ones: noise adds to a time, it never takes away.
        medians = torch.tensor([statistics.median_low(samples[key] or [0.0]) for key in keys], dtype=torch.float64)
        medians = medians.to(self.device)
        dist.all_reduce(medians, op=dist.ReduceOp.MAX)
        return times_from(dict(zip(keys, medians.tolist(), strict=True)), backbone, measured)

    def _of_the_last_rank(self, times: list[float], group: dist.ProcessGroup | None) -> list[float]:
        """Each all-to-all's time on the rank of its group that came last, which had to wait for nobody."""
        least = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        return least.tolist()

    def _adopt(self, times: list[OperatorTimes]) -> None:
        """Takes the times as known, and the schedules that follow from them."""
        self._times = times
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for layers, train, forward in self.plans():
            for layer in layers:
                self.pairs[layer].schedule = train.schedule
                self.pairs[layer].forward_schedule = forward.schedule
        if dist.get_rank() == 0:
            for line in self.report():
                logger.info(line)

    def _plan(self, times: OperatorTimes, mode: Mode) -> Plan:
        slots = self.settings.expert_slot
        return plan(times, mode, tuple(slots) if isinstance(slots, list) else slots, self.settings.num_chunks)


def _totals(spans: Sequence[Span], layer: int) -> dict[tuple[str, str], float]:
    """Milliseconds by (span's name, phase) of one layer in one micro-batch; chunks are added up."""
    totals: defaultdict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        if span.layer == layer and span.lane != "wait":
            totals[span.name, span.phase] += span.duration_ms
    return totals


def times_from(
    known: Mapping[tuple[int, str, str], float], backbone: Sequence[str], chunk_counts: Sequence[int]
) -> OperatorTimes:
    """Sorts measured totals into an `OperatorTimes`.

    Args:
        known: milliseconds by (number of chunks, name of a span, phase), chunks added up.
        backbone: names of its operators, in order.
        chunk_counts: the numbers of chunks that were measured, 1 among them.
    """

    def total(names: Sequence[str], chunks: int = 1) -> dict[str, float]:
        return {f"{phase}_ms": sum(of_span(name, phase, chunks) for name in names) / chunks
                for phase in ("forward", "backward")}  # fmt: skip

    def of_span(name: str, phase: str, chunks: int) -> float:
        # Pieces together cannot take less than the whole: what says so is noise, and "auto" would fall for it.
        return max(known.get((count, name, phase), 0.0) for count in (1, chunks))

    return OperatorTimes(
        backbone=tuple(OperatorTime(name=name, **total([name])) for name in backbone),
        chunks={
            count: ChunkTimes(**{name: PassTimes(**total([name], count)) for name in _TRANSFERS_AND_EXPERTS})
            for count in chunk_counts
        },
        **{part: PassTimes(**total(names)) for part, names in _PARTS.items()},
    )
