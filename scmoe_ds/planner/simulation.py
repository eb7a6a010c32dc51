"""Runs a pair on two simulated lanes, computation and communication, from measured times. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.schedule_text import next_label
from scmoe_ds.planner.times import OperatorTimes, PassTimes

Phase = Literal["forward", "backward"]
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
    lane: Literal["compute", "communication", "wait"]
    name: str
    start_ms: float
    end_ms: float


class _Event(NamedTuple):
    does: Literal["compute", "launch", "wait"]
    name: str
    times: PassTimes
    transfer: int = -1


def ms_of(times: PassTimes, phase: Phase) -> float:
    """The time of a phase."""
    return times.forward_ms if phase == "forward" else times.backward_ms


def total_ms(times: PassTimes, mode: Mode) -> float:
    """The time of all passes that the mode has."""
    return sum(ms_of(times, phase) for phase in PHASES[mode])


def _pair(times: OperatorTimes, schedule: Schedule, number: int = 0) -> tuple[list[_Event], list[_Event]]:
    """What the executor does for a pair in a forward pass, in order: up to the end of its backbone, and at its join.

    Args:
        number: of the pair, so that each has transfers of its own: dispatches, then combines.
    """
    count, parts = schedule.num_chunks, times.chunks[schedule.num_chunks]
    numbers, first = [""] if count == 1 else [f" {chunk}" for chunk in range(count)], 2 * count * number
    program = [_Event("compute", "gate", times.gate), _Event("compute", "encode", times.encode)]
    program += [
        _Event("launch", f"dispatch{each}", parts.dispatch, first + chunk) for chunk, each in enumerate(numbers)
    ]
    operators = [_Event("compute", operator.name, operator) for operator in times.backbone]
    done = 0
    for chunk, (slot, each) in enumerate(zip(schedule.slots, numbers, strict=True), start=first):
        program += [*operators[done : slot - 1], _Event("wait", f"dispatch{each}", parts.dispatch, chunk)]
        program.append(_Event("compute", f"experts{each}", parts.experts))
        program.append(_Event("launch", f"combine{each}", parts.combine, count + chunk))
        done = slot - 1
    join = [
        _Event("wait", f"combine{each}", parts.combine, first + count + chunk) for chunk, each in enumerate(numbers)
    ]
    return program + operators[done:], [*join, _Event("compute", "decode", times.decode)]


def _program(times: OperatorTimes, schedule: Schedule) -> list[_Event]:
    """What the executor does from shortcut to join."""
    backbone, join = _pair(times, schedule)
    late = [] if times.late is None else times.late.operators
    return [*backbone, *(_Event("compute", next_label(each.name), each) for each in late), *join]


def _row(times: OperatorTimes, schedule: Schedule, pairs: int) -> list[_Event]:
    """The same of a row of pairs, each of which begins before the join of the one before it.

    The last but one has named events. Of the last one, what precedes that join has them, and its dispatch.
    """
    assert times.late is not None
    last_before_join = times.backbone[len(times.late.operators) - 1].name
    program, join = list[_Event](), list[_Event]()
    for number in range(pairs):
        backbone, own_join = _pair(times, schedule, number)
        cut = 1 + [event.name for event in backbone].index(last_before_join)
        if number != pairs - 2:
            named = cut if number == pairs - 1 else 0
            early = [
                place < named or (named > 0 and each.name[:8] == "dispatch") for place, each in enumerate(backbone)
            ]
            names = [f"next {each.name}" if is_early else "" for each, is_early in zip(backbone, early, strict=True)]
            backbone = [each._replace(name=name) for each, name in zip(backbone, names, strict=True)]
            own_join = [each._replace(name="") for each in own_join]
        program += [*backbone[:cut], *join, *backbone[cut:]]
        join = own_join
    return program + join


def _one_pass(program: list[_Event], phase: Phase, overlap: bool, spans: list[PredictedSpan] | None) -> Simulated:
    # Autograd runs the nodes in reverse; a wait's node launches the gradient's transfer, a launch's waits for it.
    events, launch = (program, "launch") if phase == "forward" else (program[::-1], "wait")
    clock = lane_free = exposed = communication = 0.0
    slack, ready = math.inf, {}

    def note(lane: Literal["compute", "communication", "wait"], name: str, start_ms: float, end_ms: float) -> None:
        if spans is not None and name:
            spans.append(PredictedSpan(phase, lane, name, start_ms, end_ms))

    for event in events:
        ms = ms_of(event.times, phase)
        if event.does == "compute":
            note("compute", event.name, clock, clock + ms)
            clock += ms
            continue
        if event.does == launch:
            communication += ms
            ready[event.transfer] = lane_free = max(clock, lane_free) + ms  # one at a time, in order of launch
            note("communication", event.name, lane_free - ms, lane_free)
        if event.does != launch or not overlap:
            early = clock - ready[event.transfer]
            slack, exposed = min(slack, early), exposed + max(0.0, -early)
            if early < 0:
                note("wait", event.name, clock, ready[event.transfer])
            clock = max(clock, ready[event.transfer])
    return Simulated(clock, exposed, communication, max(0.0, slack))


def simulate(times: OperatorTimes, schedule: Schedule, mode: Mode) -> Simulated:
    """Runs a pair on two lanes: computation in the order of the executor and of autograd, transfers one by one.

    A transfer starts when it has been launched and its lane is free. With overlap=False the computation waits for it at
    once. Nothing is in flight between the two passes, so their times add up.

    Args:
        mode: "train" is forward and backward; all others are a forward pass.

    Raises:
        ValueError: no times for this number of chunks; a slot beyond the backbone.
    """
    passes = _passes(times, schedule, mode)
    return Simulated(
        sum(one.total_ms for one in passes),
        sum(one.exposed_ms for one in passes),
        sum(one.communication_ms for one in passes),
        min(one.slack_ms for one in passes),
    )


def predicted_spans(times: OperatorTimes, schedule: Schedule, mode: Mode) -> list[PredictedSpan]:
    """What `simulate` lets run when, on both lanes; phases start at 0. Raises ValueError as it does."""
    spans: list[PredictedSpan] = []
    _passes(times, schedule, mode, spans)
    return spans


def _passes(
    times: OperatorTimes, schedule: Schedule, mode: Mode, spans: list[PredictedSpan] | None = None
) -> list[Simulated]:
    if schedule.num_chunks not in times.chunks:
        raise ValueError(f"num_chunks {schedule.num_chunks}: there are times for {sorted(times.chunks)} chunks only")
    if schedule.slots[-1] > len(times.backbone) + 1:
        raise ValueError(f"expert_slot {schedule.slots[-1]}: the backbone has {len(times.backbone)} operators")
    if times.is_periodic:
        return [_periodic_pass(times, schedule, phase, spans) for phase in PHASES[mode]]
    program = _program(times, schedule)
    return [_one_pass(program, phase, schedule.overlap, spans) for phase in PHASES[mode]]


def _periodic_pass(
    times: OperatorTimes, schedule: Schedule, phase: Phase, spans: list[PredictedSpan] | None
) -> Simulated:
    """What one pair more adds to a row."""
    known = 0 if spans is None else len(spans)
    longer, shorter = (
        _one_pass(_row(times, schedule, pairs), phase, schedule.overlap, found)
        for pairs, found in ((ROW + 1, spans), (ROW, None))
    )
    if spans is not None:
        start_ms = min(span.start_ms for span in spans[known:])
        spans[known:] = [
            span._replace(start_ms=span.start_ms - start_ms, end_ms=span.end_ms - start_ms) for span in spans[known:]
        ]
    return Simulated(
        longer.total_ms - shorter.total_ms,
        max(0.0, longer.exposed_ms - shorter.exposed_ms),
        longer.communication_ms - shorter.communication_ms,
        longer.slack_ms,
    )
