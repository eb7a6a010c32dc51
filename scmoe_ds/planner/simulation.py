"""Runs a pair on two simulated lanes, computation and communication, from measured times. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.lanes import Event, LaneName, Lanes, Phase
from scmoe_ds.planner.pair_program import PairEvents, computing
from scmoe_ds.planner.times import OperatorTimes, PassTimes, next_label

Mode = Literal["train", "forward", "prefill", "decode"]
ROW = 8
"""Pairs in a row, of periodic times. One more adds what any more adds, or nearly: a lane fills up slowly."""
_FORWARD: tuple[Phase, ...] = ("forward",)
PHASES = {"train": (*_FORWARD, "backward"), "forward": _FORWARD, "prefill": _FORWARD, "decode": _FORWARD}
"""The passes that a mode has."""


@dataclass(frozen=True)
class Simulated:
    """What a schedule costs from shortcut to join, in milliseconds, by `simulate`.

    Where a late join lies behind the next pair's shortcut, it is what each of many such pairs adds.

    Attributes:
        total_ms: until the computation has ended; of one pass, or of forward and backward together.
        exposed_ms: the part of it in which the computation stood still for a transfer.
        communication_ms: duration of all transfers together, hidden or not.
        slack_ms: the least time between the end of a transfer and the wait for it; 0 if one was late.
    """

    total_ms: float
    exposed_ms: float
    communication_ms: float
    slack_ms: float

    @property
    def hidden_share(self) -> float:
        """Share of the communication that ran beside computation, 0 … 1; 1 if there is no communication."""
        # Rounding of the clocks can make the exposed time of a serial schedule an ulp longer than its transfers.
        return max(0.0, 1.0 - self.exposed_ms / self.communication_ms) if self.communication_ms else 1.0


class PredictedSpan(NamedTuple):
    """When something runs, in milliseconds since the start of its phase.

    Attributes:
        phase, lane, name: as of `trace.recorder.Span`; a chunk's name has its number, from 0.
    """

    phase: Phase
    lane: LaneName
    name: str
    start_ms: float
    end_ms: float


def ms_of(times: PassTimes, phase: Phase) -> float:
    """The time of a phase."""
    return times.forward_ms if phase == "forward" else times.backward_ms


def total_ms(times: PassTimes, mode: Mode) -> float:
    """The time of all passes that the mode has."""
    return sum(ms_of(times, phase) for phase in PHASES[mode])


class Pair:
    """A pair on two lanes, computation and communication, under any schedule. See `simulate`."""

    def __init__(self, times: OperatorTimes) -> None:
        self.times, self._events = times, PairEvents([times])

    def simulate(self, schedule: Schedule, mode: Mode) -> Simulated:
        """As the function."""
        passes = [self._pass(schedule, phase) for phase in PHASES[mode]]
        return Simulated(
            sum(one.total_ms for one in passes),
            sum(one.exposed_ms for one in passes),
            sum(one.communication_ms for one in passes),
            min(one.slack_ms for one in passes),
        )

    def spans(self, schedule: Schedule, mode: Mode) -> list[PredictedSpan]:
        """As `predicted_spans`."""
        program = self._row(schedule, ROW + 1, named=True) if self.times.is_periodic else self._program(schedule)
        spans: list[PredictedSpan] = []
        for phase in PHASES[mode]:
            found = _one_pass(program, phase, spans=True).spans()
            start_ms = min(span.start_ms for span in found)
            spans += [PredictedSpan(*each[:3], each.start_ms - start_ms, each.end_ms - start_ms) for each in found]
        return spans

    def _pass(self, schedule: Schedule, phase: Phase) -> Simulated:
        if not self.times.is_periodic:
            return _simulated(_one_pass(self._program(schedule), phase))
        # What one pair more adds to a row.
        longer, shorter = (_simulated(_one_pass(self._row(schedule, pairs), phase)) for pairs in (ROW + 1, ROW))
        return Simulated(
            longer.total_ms - shorter.total_ms,
            max(0.0, longer.exposed_ms - shorter.exposed_ms),
            longer.communication_ms - shorter.communication_ms,
            longer.slack_ms,
        )

    def _program(self, schedule: Schedule) -> list[Event]:
        """What the executor does from shortcut to join."""
        program, join = self._events.program(schedule)
        late = [] if self.times.late is None else self.times.late.operators
        return [*program, *(computing(next_label(each.name), [each]) for each in late), *join]

    def _row(self, schedule: Schedule, pairs: int, named: bool = False) -> list[Event]:
        """The same of a row of pairs, each of which begins before the join of the one before it.

        With names, the last but one has named events. Of the last one, what precedes that join has them, and its
        dispatch.
        """
        assert self.times.late is not None
        backbone, join = self._events.program(schedule)
        cut = 1 + backbone.index(self._events.backbone[len(self.times.late.operators) - 1])
        if not named:
            return backbone + (backbone[:cut] + join + backbone[cut:]) * (pairs - 1) + join
        hidden, hidden_join = ([each._replace(name="") for each in events] for events in (backbone, join))
        following = [
            each._replace(name=f"next {each.name}" if place < cut or each.name[:8] == "dispatch" else "")
            for place, each in enumerate(backbone)
        ]
        row = hidden + (hidden[:cut] + hidden_join + hidden[cut:]) * (pairs - 3)
        row += backbone[:cut] + hidden_join + backbone[cut:]
        return row + following[:cut] + join + following[cut:] + hidden_join


def _one_pass(program: list[Event], phase: Phase, spans: bool = False) -> Lanes:
    lanes = Lanes(spans=spans)
    lanes.run(program, phase)
    return lanes


def _simulated(lanes: Lanes) -> Simulated:
    return Simulated(lanes.clocks[0], lanes.exposed_ms[0][0], lanes.transfers_ms[0], max(0.0, lanes.slack_ms))


def simulate(times: OperatorTimes, schedule: Schedule, mode: Mode) -> Simulated:
    """Runs a pair on two lanes: computation in the order of the executor and of autograd, transfers one by one.

    A transfer starts when it has been launched and its lane is free. With overlap=False the computation waits for it at
    once. Nothing is in flight between the two passes, so their times add up.

    Args:
        mode: "train" is forward and backward; all others are a forward pass.

    Raises:
        ValueError: no times for this number of chunks; a slot beyond the backbone.
    """
    return Pair(times).simulate(schedule, mode)


def predicted_spans(times: OperatorTimes, schedule: Schedule, mode: Mode) -> list[PredictedSpan]:
    """What `simulate` lets run when, on both lanes; phases start at 0. Raises ValueError as it does."""
    return Pair(times).spans(schedule, mode)
