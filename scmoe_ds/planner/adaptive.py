"""The adaptive schedule at work: the first micro-batches are timed, then every pair gets what its times call for.

The timed micro-batches are ordinary training steps whose communication blocks: they compute the same numbers, only
without overlap. All ranks hold the same times and so plan alike. A rank with another schedule would launch its all-to-
alls in another order, and the run would hang.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from scmoe_ds.config.section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.executor import Backbone, backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.calibration import Recording, measure
from scmoe_ds.planner.calibration_file import (
    Description,
    check_writable,
    find_times,
    read_calibration,
    write_calibration,
)
from scmoe_ds.planner.plan import Mode, Plan, plan
from scmoe_ds.planner.plan_text import layers_text, plan_lines
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.trace.recorder import SILENT, PairRecorder, Recorder

logger = logging.getLogger("scmoe_ds")

CHUNK_COUNTS = (1, 2, 4)
"""Numbers of chunks that "auto" chooses from. Every further one would cost timed steps; beyond four, launches and small
matrix products eat what is gained."""


class ScheduledPair(Backbone, Protocol):
    """What the adaptive schedule asks of a pair; see models.pairs.StagedPair and replace.hooked.HookedPair."""

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
        descriptions: for each pair, all that its times depend on (JSON values, "ranks_that_exchange" among them), the
            same on every rank. Pairs that agree share their times.
        settings: the section's "overlap".
        device: where the pairs compute.

    Raises:
        ScMoEConfigError: a `calibration_file` that cannot be read or written, or is of another model.
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
        self._plans: list[tuple[list[int], Plan, Plan]] = []
        self._started = 0  # micro-batches in training, so far
        self._recorders: list[tuple[int, Recorder]] = []  # with the number of chunks
        self._hook = None
        if not self.pairs or not self._wanted():
            return
        saved = read_calibration(settings.calibration_file)
        if saved is not None:
            source = f"scmoe.overlap.calibration_file = {settings.calibration_file}"
            self._adopt(find_times(saved, self._descriptions, self._chunk_counts(), source))
        elif settings.calibration_steps:
            check_writable(settings.calibration_file)
            self._hook = model.register_forward_pre_hook(self._before_forward)

    @property
    def calibrating(self) -> bool:
        """Whether micro-batches are still being timed."""
        return self._hook is not None

    @property
    def timed_micro_batches(self) -> int:
        """How many are timed; at least one for each number of chunks in question."""
        return max(self.settings.calibration_steps, len(self._chunk_counts()))

    @property
    def times(self) -> list[OperatorTimes] | None:
        """Measured times of each kind of pair, or None."""
        return self._times

    @property
    def plans(self) -> list[tuple[list[int], Plan, Plan]]:
        """For each kind of pair its MoE layers, the plan for training and that for a forward pass alone; empty without
        times."""
        return self._plans

    def report(self) -> list[str]:
        """The measured times and what follows from them, as lines of text; empty without times."""
        lines: list[str] = []
        for times, (layers, train, forward) in zip(self._times or [], self._plans, strict=True):
            lines += plan_lines(f"MoE layer {layers_text(layers)}", times, train, forward)
        return lines

    def record(self, recorder: Recorder | None) -> None:
        """Has all pairs report to a recorder from the next forward pass on, or to none."""
        for layer, pair in enumerate(self.pairs):
            pair.recorder = SILENT if recorder is None else recorder.pair(layer)

    def state(self) -> list[dict[str, Any]] | None:
        """The measured times for a checkpoint or a file; None before they are known."""
        if self._times is None:
            return None
        known = zip(self._descriptions, self._times, strict=True)
        return [{"description": dict(each), "times": times.model_dump(mode="json")} for each, times in known]

    def resume(self, saved: list[dict[str, Any]] | None) -> None:
        """Takes the times of a checkpoint instead of measuring again, if they are of this model on this hardware.

        Collective while `calibrating`; rank 0's times count for all.
        """
        if not self.calibrating:
            return
        holder = [saved]
        dist.broadcast_object_list(holder)
        if not holder[0]:
            return
        try:
            times = find_times(holder[0], self._descriptions, self._chunk_counts(), "the checkpoint's calibration")
        except ScMoEConfigError as error:
            self._log(f"times are measured again: {error}")
            return
        self._log("times from the checkpoint, nothing is measured again:")
        self._adopt(times)

    def _wanted(self) -> bool:
        settings = self.settings
        travels = any(description["ranks_that_exchange"] > 1 for description in self._descriptions)
        free = settings.expert_slot == "auto" or (
            settings.num_chunks == "auto" and isinstance(settings.expert_slot, int)
        )
        return travels and settings.enabled and free

    def _chunk_counts(self) -> tuple[int, ...]:
        chunks = self.settings.num_chunks
        return CHUNK_COUNTS if isinstance(chunks, str) else tuple({1: None, chunks: None})

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            self.record(None)
            return
        if self._started > self.timed_micro_batches:
            self._finish()
            return
        counts = self._chunk_counts()
        # The first micro-batch pays for allocations and connections: it is not timed.
        chunks = counts[(self._started - 1) % len(counts)] if self._started else 1
        for pair in self.pairs:
            pair.schedule = Schedule(pair.schedule.slots[0], chunks, overlap=False)
        if self._started:
            self._recorders.append((chunks, Recorder(self.device)))
            self.record(self._recorders[-1][1])
        self._started += 1

    def _finish(self) -> None:
        """Sums up; the last micro-batch's backward is over by the time of another's forward."""
        recordings = [Recording(chunks, recorder.spans()) for chunks, recorder in self._recorders]
        times = []
        for layers in self._kinds:
            pair = self.pairs[layers[0]]
            labels = [operator.label for operator in backbone(pair)]
            times.append(measure(recordings, layers, labels, pair.group, self.device))
        self._adopt(times)
        write_calibration(self.settings.calibration_file, self.state())

    def _adopt(self, times: list[OperatorTimes]) -> None:
        """Takes the times as known, and the schedules that follow from them."""
        slots, chunks = self.settings.expert_slot, self.settings.num_chunks
        assert not isinstance(slots, list)  # then there is nothing to choose

        def planned(times: OperatorTimes, mode: Mode) -> Plan:
            return plan(times, mode, slots, chunks)

        self._plans = [
            (layers, planned(each, "train"), planned(each, "forward"))
            for layers, each in zip(self._kinds, times, strict=True)
        ]
        self._times = times
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._recorders.clear()
        self.record(None)
        for layers, train, forward in self._plans:
            for layer in layers:
                self.pairs[layer].schedule = train.schedule
                self.pairs[layer].forward_schedule = forward.schedule
        for line in self.report():
            self._log(line)

    def _log(self, line: str) -> None:
        if dist.get_rank() == 0:
            logger.info(line)
