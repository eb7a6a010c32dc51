"""Prefill and decode, each under schedules and with an all-to-all of its own.

A prompt's exchange is large, a token's is all latency, and so are the operators that hide them: what is best for one is
not for the other. The first passes of each phase are timed without overlap, as in training, and the experts then go
where a forward pass alone takes least time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.section import OverlapConfig, ScMoEConfig
from scmoe_ds.engine.initialize import choose_all_to_all
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.planner.calibration import Recording, measure
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.plan_text import schedule_text
from scmoe_ds.trace.recorder import SILENT, Recorder

logger = logging.getLogger("scmoe_ds")

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass
class _PhaseState:
    """What one phase runs under, and what was timed of it.

    Attributes:
        schedules: of each run.
        transport: of all layers; None: as the layers have it.
        passes: so far.
        recorders: of the timed passes.
    """

    schedules: list[Schedule]
    transport: Transport | None = None
    passes: int = 0
    recorders: list[Recorder] = field(default_factory=list)


class Phases:
    """Switches a model's runs between the schedules of prefill and decode.

    Args:
        runs: of the model, in order.
        settings: the section's "overlap"; `calibration_steps` passes of each phase are timed.
        transports: the all-to-all of each phase; none: as the layers have it.
        device: where the runs compute.
    """

    def __init__(
        self,
        runs: Sequence[StagedPair],
        settings: OverlapConfig | None = None,
        transports: dict[Phase, Transport] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.runs, self.settings = list(runs), settings or OverlapConfig(calibration_steps=0)
        self.device = device or torch.device("cpu")
        self._states = {
            phase: _PhaseState([run.schedule for run in self.runs], (transports or {}).get(phase)) for phase in PHASES
        }
        travels = any(run.layer.transport.size > 1 for run in self.runs)
        free = self.settings.enabled and self.settings.expert_slot == "auto" and self.settings.calibration_steps > 0
        self._timed_passes = self.settings.calibration_steps if travels and free else 0

    @classmethod
    def of_model(
        cls, model: GPT, config: ScMoEConfig, layout: Layout, rows: int, prompt: int, device: torch.device
    ) -> Phases:
        """With an all-to-all for each phase that was probed with its message. Collective over the world.

        Args:
            rows, prompt: sequences of a batch per rank and tokens of each, about.
        """
        transports: dict[Phase, Transport] = {}
        runs = model.scheduled_pairs()
        sequences: dict[Phase, int] = {"prefill": prompt, "decode": 1}
        for phase, sequence in sequences.items():
            lines = choose_all_to_all(model, config, rows, layout, sequence)
            if lines:
                transports[phase] = runs[0].layer.transport
            _log([f"{phase}: {line}" for line in lines])
        return cls(runs, config.overlap, transports, device)

    def schedules(self, phase: Phase) -> list[Schedule]:
        """Of each run, once the timed passes are over."""
        return list(self._states[phase].schedules)

    @contextmanager
    def of(self, phase: Phase) -> Iterator[None]:
        """One forward pass of a phase. Collective where it is the last of those that are timed."""
        state = self._states[phase]
        timed = 0 < state.passes <= self._timed_passes  # the first pays for allocations and connections
        recorder = Recorder(self.device) if timed else None
        for index, (run, schedule) in enumerate(zip(self.runs, state.schedules, strict=True)):
            run.forward_schedule = Schedule(schedule.slots[0], overlap=False) if timed else schedule
            run.recorder = SILENT if recorder is None else recorder.pair(index)
            if state.transport is not None:
                run.layer.transport = state.transport
        try:
            yield
        finally:
            for run in self.runs:
                run.recorder = SILENT
        state.passes += 1
        if recorder is not None:
            state.recorders.append(recorder)
            if len(state.recorders) == self._timed_passes:
                self._plan(phase, state)

    def _plan(self, phase: Phase, state: _PhaseState) -> None:
        recordings = [Recording(1, recorder.spans()) for recorder in state.recorders]
        state.recorders.clear()
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index, run in enumerate(self.runs):
            kinds.setdefault(tuple(operator.label for operator in backbone(run)), []).append(index)
        for names, layers in kinds.items():
            times = measure(recordings, layers, names, self.runs[layers[0]].group, self.device)
            chosen = plan(times, "forward", "auto", 1)
            for layer in layers:
                state.schedules[layer] = chosen.schedule
            predicted, serial = chosen.predicted, chosen.serial
            _log(
                [
                    f"{phase}: {schedule_text(chosen.schedule)} of {', '.join(names) or 'nothing'}: "
                    f"{predicted.total_ms:.2f} ms from shortcut to join ({serial.total_ms:.2f} ms without overlap), "
                    f"{100 * predicted.hidden_share:.0f} % of the communication hidden"
                ]
            )


def _log(lines: Sequence[str]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        for line in lines:
            logger.info(line)
