"""The calibrator: it times the first passes of a model, then gives every pair the schedule that its times call for.

Training, serving and the benchmarks use this one class. Its mode says what a pass is:

    train             forward and backward of a micro-batch, in any number of chunks
    forward           a forward pass alone, in one chunk
    prefill, decode   the same. A prompt's exchange is large and a token's is all latency, so each has a calibrator.

The timed passes compute the same numbers as any other. Only their communication blocks. All ranks hold the same times
and so plan alike. A rank with another schedule would launch its all-to-alls in another order, and the run would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.agreement import from_rank_zero, gather
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.auto import chunk_counts, leaves_a_choice
from scmoe_ds.planner.calibration import Recording, TimedPasses, measure
from scmoe_ds.planner.calibration_file import (
    Description,
    check_writable,
    find_measured,
    find_times,
    read_calibration,
    write_calibration,
)
from scmoe_ds.planner.comparison import Comparison, Measured
from scmoe_ds.planner.kinds import ScheduledPair, kinds_of
from scmoe_ds.planner.plan import Plan, plan
from scmoe_ds.planner.plan_text import choice_line, plan_lines, summary_line
from scmoe_ds.planner.schedule_text import layers_text, origin_of
from scmoe_ds.planner.simulation import Mode
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.trace.recorder import SILENT, Recorder


class Calibrator:
    """The schedules of a model in one mode: fixed ones as they are, automatic ones once their times are known.

    Args:
        pairs: the model's pairs, in order.
        settings: the section's "overlap". Its calibration file is for training.
        device: where the pairs compute.
        mode: which passes are timed.
        descriptions: for each pair, all that its times depend on, the same on every rank; None: the pairs' own facts.
        transport: the all-to-all of this mode's passes; None: as the layers have it.
        identity: sizes of the model, for files: whoever reads one wants to know which model it is of.

    Attributes:
        schedules: of each pair.
        kinds: the pairs by what their times depend on.
        timing: of the passes that are timed, as long as they are; see `calibrating`.
        comparison: of training with and without overlap, as long as it goes on.
        measured: its result; None: not known.
        waits: passes are neither timed nor compared yet: layers are still to be converted (engine/stepwise.py).

    Raises:
        ScMoEConfigError: a `calibration_file` that cannot be read or written, or is of another model.
    """

    def __init__(
        self,
        pairs: Sequence[ScheduledPair],
        settings: OverlapConfig,
        device: torch.device,
        mode: Mode = "train",
        descriptions: Sequence[Description] | None = None,
        transport: Transport | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if mode != "train":
            settings = settings.model_copy(update={"num_chunks": 1, "calibration_file": None})
        self.pairs, self.settings, self.device = list(pairs), settings, device
        self.mode, self.transport, self.identity = mode, transport, dict(identity or {})
        self.schedules = [pair.schedule for pair in pairs]
        self.kinds = kinds_of([pair.facts() for pair in pairs] if descriptions is None else descriptions)
        self.timing: TimedPasses | None = None
        self.comparison: Comparison | None = None
        self.measured: Measured | None = None
        self.waits = False
        self._is_watched = False  # somebody records the pass
        self._hook: Any = None
        if not (leaves_a_choice(settings) and any(pair.layer.transport.size > 1 for pair in pairs)):
            return
        saved = read_calibration(settings.calibration_file)
        if saved is not None:
            self._take(saved, f"scmoe.overlap.calibration_file = {settings.calibration_file}")
        elif settings.calibration_steps:
            check_writable(settings.calibration_file)
            self.timing = TimedPasses(chunk_counts(settings), settings.calibration_steps, device)

    @property
    def calibrating(self) -> bool:
        """Whether passes are still being timed."""
        return self.timing is not None

    @property
    def origin(self) -> str:
        """Who chooses the schedules of training, in words."""
        if self.timing is not None:
            return f"until times decide, which {self.timing.text} measure"
        if self.times:
            file = self.settings.calibration_file
            return f"from the times in {file}" if file else "from the measured times"
        return origin_of(self.settings, any(pair.layer.transport.size > 1 for pair in self.pairs))

    @property
    def times(self) -> list[OperatorTimes]:
        """Measured times of each kind of pair; empty before they are known."""
        return [kind.times for kind in self.kinds if kind.times is not None]

    def summary(self) -> list[str]:
        """What follows from the measured times, a line for each kind of pair; empty without times."""
        kept = [] if self.measured is None else [self._kept_text(self.measured)]
        return self._lines(lambda *of_kind: [summary_line(*of_kind)]) + kept

    def _kept_text(self, measured: Measured) -> str:
        return f"schedule: overlap {'on' if measured.overlap else 'off'}, measured: {measured.text}"

    def report(self) -> list[str]:
        """The measured times, the cost of every slot and the choice, as lines of text; empty without times."""
        return self._lines(plan_lines)

    def _lines(self, of_training: Callable[[str, OperatorTimes, Plan, Plan], list[str]]) -> list[str]:
        lines: list[str] = []
        for kind in self.kinds:
            name = f"MoE layer {layers_text(kind.layers)}"
            if kind.times is not None and self.mode == "train":
                lines += of_training(name, kind.times, kind.plans["train"], kind.plans["forward"])
            elif kind.times is not None:
                names = [operator.name for operator in kind.times.backbone]
                lines.append(choice_line(f"{self.mode} of {name}", kind.times, kind.plans[self.mode], names))
        return lines

    def record(self, recorder: Recorder | None) -> None:
        """Has all pairs report to a recorder from the next forward pass on, or to none. A pass that is recorded, on
        whichever rank, is no part of the comparison."""
        self._is_watched = recorder is not None
        self._report_to(recorder)

    def _report_to(self, recorder: Recorder | None) -> None:
        for layer, pair in enumerate(self.pairs):
            pair.recorder = SILENT if recorder is None else recorder.pair(layer)

    def state(self) -> list[dict[str, Any]] | None:
        """The measured times for a checkpoint or a file; None before they are known."""
        known = [(kind.description, kind.times) for kind in self.kinds if kind.times is not None]
        measured = {} if self.measured is None else {"measured": self.measured.model_dump()}
        return [
            {"identity": self.identity, "description": dict(each), "times": times.model_dump(mode="json"), **measured}
            for each, times in known
        ] or None

    def resume(self, saved: list[dict[str, Any]] | None) -> None:
        """Takes the times of a checkpoint instead of measuring again, if they are of this model on this hardware.

        Collective while `calibrating`; rank 0's times count for all.
        """
        if not self.calibrating:
            return
        known = from_rank_zero(lambda: saved)
        if not known:
            return
        try:
            self._take(known, "the checkpoint's calibration", "times from the checkpoint, nothing is measured again:")
        except ScMoEConfigError as error:
            log(f"times are measured again: {error}")

    def watch(self, model: nn.Module) -> None:
        """Lets `begin` precede every training pass of a model, until the schedules are known."""
        if self.timing is not None or self.comparison is not None:
            self._hook = model.register_forward_pre_hook(self._before_forward)

    def begin(self) -> None:
        """Sets what the next pass runs under: it is timed, or compared, or it has its schedules.

        Collective where the timed passes are over, and where the compared ones are. The backward of the last one is
        over by then, too.
        """
        if self.timing is not None and self.timing.is_over:
            self._plan(self.timing.recordings())
        elif self.comparison is not None and self.comparison.is_over:
            self._decide(self.comparison.result())
        schedules, recorder = self.schedules, None
        if self.timing is not None:
            chunks, recorder = self.timing.begin()
            schedules = [Schedule(pair.schedule.slots[0], chunks, overlap=False) for pair in self.pairs]
        elif self.comparison is not None and not any(gather(self._is_watched)):
            # Asked of all ranks: one that alone left its turn out would send other chunks, and all would wait forever.
            overlap, recorder = self.comparison.begin()
            schedules = self.schedules if overlap else self.without_overlap
        for pair, schedule in zip(self.pairs, schedules, strict=True):
            pair.schedule = schedule
            if self.transport is not None:
                pair.layer.transport = self.transport
        if recorder is not None or not self._is_watched:
            self._report_to(recorder)

    @property
    def without_overlap(self) -> list[Schedule]:
        """The schedules in one chunk with blocking communication."""
        return [Schedule(each.slots[0], overlap=False) for each in self.schedules]

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            if not self.waits:
                self.begin()
        else:
            self.record(None)

    def _take(self, saved: Any, source: str, words: str = "") -> None:
        """Adopts what a file or a checkpoint holds; `words` announce it in the log."""
        descriptions, counts = [kind.description for kind in self.kinds], chunk_counts(self.settings)
        times, self.measured = find_times(saved, descriptions, counts, source), find_measured(saved, source)
        log(*filter(None, [words]))
        self._adopt(times)

    def _plan(self, recordings: Sequence[Recording]) -> None:
        times = []
        for layers, pair in ((kind.layers, self.pairs[kind.layers[0]]) for kind in self.kinds):
            labels = [operator.label for operator in backbone(pair)]
            group, late = pair.layer.transport.group, pair.late_window
            times.append(measure(recordings, layers, labels, group, self.device, late))
        self._adopt(times)
        write_calibration(self.settings.calibration_file, self.state())

    def _adopt(self, times: Sequence[OperatorTimes]) -> None:
        """Takes the times as known, and the schedules that follow from them."""
        slots, chunks = self.settings.expert_slot, self.settings.num_chunks
        modes: tuple[Mode, ...] = ("train", "forward") if self.mode == "train" else (self.mode,)
        for kind, measured in zip(self.kinds, times, strict=True):
            kind.times = measured
            # In a partly converted model the slot counts a converted layer's operators, and the others have fewer.
            is_beyond = isinstance(slots, int) and slots > len(measured.backbone) + 1
            kind.plans = {mode: plan(measured, mode, "auto" if is_beyond else slots, chunks) for mode in modes}
            for layer in kind.layers:
                pair, self.schedules[layer] = self.pairs[layer], kind.plans[self.mode].schedule
                pair.schedule = self.schedules[layer]
                if self.mode == "train":
                    pair.forward_schedule = kind.plans["forward"].schedule
        self.timing = None
        self.record(None)
        if self.mode == "train":  # while a prompt is completed, its text is on the screen
            log(*self.summary())
            if self.measured is None:
                self.comparison = Comparison(self.device)
                return
            self._apply(self.measured)
        self.settle()

    def _decide(self, measured: Measured) -> None:
        self.measured = measured
        log(self._kept_text(measured))
        self._apply(measured)
        self.settle()
        write_calibration(self.settings.calibration_file, self.state())

    def _apply(self, measured: Measured) -> None:
        if not measured.overlap:
            self.schedules = self.without_overlap
            for pair, schedule in zip(self.pairs, self.schedules, strict=True):
                pair.forward_schedule = schedule

    def settle(self) -> None:
        """Compares no more, also in the middle of a comparison: all pairs have their schedules from now on."""
        self.comparison = None
        if self._hook is not None:
            self._hook.remove()
        for pair, schedule in zip(self.pairs, self.schedules, strict=True):
            pair.schedule = schedule
        if not self._is_watched:
            self._report_to(None)


@contextmanager
def one_pass(calibrators: Mapping[Mode, Calibrator], mode: Mode) -> Iterator[None]:
    """One forward pass of a mode; without a calibrator of that mode, under the schedules that the pairs have.

    Collective where the timed passes are over.
    """
    calibrator = calibrators.get(mode)
    if calibrator is not None:
        calibrator.begin()
    try:
        yield
    finally:
        if calibrator is not None:
            calibrator.record(None)
