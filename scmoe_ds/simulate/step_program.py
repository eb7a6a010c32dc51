"""What a rank does in a micro-batch, in order: its pairs, what surrounds them, reductions and gathers beside them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scmoe_ds.planner.lanes import Event, Lanes, Phase
from scmoe_ds.planner.pair_program import PairEvents, computing
from scmoe_ds.planner.plan import Schedule
from scmoe_ds.planner.times import LateTimes, PassTimes
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.times import PairTimes, StepTimes
from scmoe_ds.simulate.two_in_flight import both_passes

ALL_TO_ALL, REDUCTIONS = 0, 1
"""Lanes."""
_GATHER = -2  # number of a transfer; those of pairs count from 0

Mode = Literal["train", "forward"]


@dataclass(frozen=True, eq=False)
class _Visit:
    """A pair of the model, and with it the late join of the pair before.

    Attributes:
        program: of the forward pass; the same list for like pairs.
    """

    times: PairTimes
    program: list[Event]


class StepProgram:
    """
    Args:
        schedules: one per kind of pairs.

    Attributes:
        reduces_always: whether gradients are reduced in every micro-batch, not in a step's last one alone.
    """

    def __init__(self, times: StepTimes, layout: Layout, schedules: Sequence[Schedule]) -> None:
        self._times, self._classes = times, len(times.shares)
        self.reduces_always, self._reduces_beside = layout.zero_stage >= 2, layout.reduces_beside
        self._gathers = layout.zero_stage == 3
        self._first = [computing("before all pairs", [times.first] * self._classes)]
        self._visits, join = _visits(times.pairs, schedules)
        self._last = [*join, computing("behind all pairs", [times.last] * self._classes)]

    def lanes(self, spans: bool = False) -> Lanes:
        """At the begin of a step."""
        return Lanes(self._classes, 2, self._times.slowed_by, self._times.shared_link, spans)

    def compute_ms(self, mode: Mode) -> list[float]:
        """Computation of a micro-batch, by class."""
        once = [self._first, self._last, *(visit.program for visit in self._visits)]
        again = [visit.program for visit in self._visits if visit.times.repeated]
        parts = [event.forward_ms for event in itertools.chain(*once) if event.does == "compute"]
        if mode == "train":
            parts += [event.backward_ms for event in itertools.chain(*once) if event.does == "compute"]
            parts += [event.forward_ms for event in itertools.chain(*again) if event.does == "compute"]
        return [sum(part) for part in zip(*parts, strict=True)]

    def forward(self, lanes: Lanes) -> None:
        """A forward pass of a micro-batch."""
        self._begin(lanes, "forward", self._visits[:1])
        lanes.run(self._first, "forward")
        self._run_pairs(lanes, ("forward",))
        lanes.run(self._last, "forward")

    def backward(self, lanes: Lanes, reduces: bool) -> None:
        """A backward pass; at its end nothing is on its way.

        Args:
            reduces: whether gradients are reduced.
        """
        self._begin(lanes, "backward", self._visits[-1:])
        lanes.run(self._last, "backward")
        self._run_pairs(lanes, ("backward",), reduces and self._reduces_beside)
        lanes.run(self._first, "backward")
        if reduces:
            self._reduce_rest(lanes)

    def both(self, lanes: Lanes, reduces: bool) -> None:
        """The forward pass of a micro-batch and the backward pass of the one before, as in two_in_flight.py."""
        self._begin(lanes, "forward", self._visits[:1] + self._visits[-1:])
        lanes.run(self._first, "forward")
        lanes.run(self._last, "backward")
        self._run_pairs(lanes, ("forward", "backward"), reduces and self._reduces_beside)
        lanes.run(self._first, "backward")
        lanes.run(self._last, "forward")
        if reduces:
            self._reduce_rest(lanes)

    def _run_pairs(self, lanes: Lanes, phases: tuple[Phase, ...], reduces: bool = False) -> None:
        """All pairs, in each of these phases at once."""
        orders = [self._visits if phase == "forward" else self._visits[::-1] for phase in phases]
        steps = list(zip(*orders, strict=True))
        is_forward = phases[0] == "forward"
        lanes.label = -1 if is_forward else len(steps)
        for (visits, following), alike in itertools.groupby(zip(steps, [*steps[1:], ()], strict=True)):
            program = visits[0].program if len(phases) == 1 else both_passes(visits[0].times, visits[1].times)

            def run(
                _: int,
                program: list[Event] = program,
                visits: tuple[_Visit, ...] = visits,
                following: tuple[_Visit, ...] = following,
            ) -> None:
                lanes.label += 1 if is_forward else -1
                for visit in visits:
                    self._await_gather(lanes, phases[0], visit.times.gather_ms)
                for visit in following:
                    self._gather(lanes, phases[0], visit.times.gather_ms)
                if visits[-1].times.repeated and phases == ("backward",):
                    lanes.run(program, "forward")
                lanes.run(program, phases[0])
                if reduces:
                    self._reduce(lanes, visits[-1].times.reduce_ms)

            lanes.repeat(run, len(list(alike)))
        lanes.label = -1

    def _begin(self, lanes: Lanes, phase: Phase, following: Sequence[_Visit]) -> None:
        outside_ms = self._times.outside_gather_ms
        self._gather(lanes, phase, outside_ms)
        for visit in following:
            self._gather(lanes, phase, visit.times.gather_ms)
        self._await_gather(lanes, phase, outside_ms)

    def _gather(self, lanes: Lanes, phase: Phase, ms: float) -> None:
        if self._gathers and ms:
            lanes.launch(ms, phase, "gather", _GATHER, REDUCTIONS)

    def _await_gather(self, lanes: Lanes, phase: Phase, ms: float) -> None:
        if self._gathers and ms:
            lanes.wait(_GATHER, phase, "gather")

    def _reduce(self, lanes: Lanes, ms: float) -> None:
        if ms:
            lanes.launch(ms, "backward", "reduce", None, REDUCTIONS)

    def _reduce_rest(self, lanes: Lanes) -> None:
        """What waits for the end of the backward pass, and for all that is on its way."""
        for visit in self._visits if not self._reduces_beside else ():
            self._reduce(lanes, visit.times.reduce_ms)
        self._reduce(lanes, self._times.outside_reduce_ms)
        lanes.finish(REDUCTIONS, "backward", "reduce")


def _visits(pairs: Sequence[PairTimes], schedules: Sequence[Schedule]) -> tuple[list[_Visit], list[Event]]:
    """All pairs in order, and what of the last one is left to join behind it."""
    visits: list[_Visit] = []
    late: LateTimes | None = None  # of the pair before
    left: list[Event] = []  # of it, to join in this one
    for times, schedule in zip(pairs, schedules, strict=True):
        events = PairEvents(times.by_class)
        program, join = events.program(schedule)
        for _ in range(min(times.count, 2)):  # the second one has the first one's late join
            of_pair = _with_late_join(times.before, events, program, late, left)
            late = events.times.late
            visits.append(_Visit(times, of_pair if late else of_pair + join))
            left = join if late else []
        visits += visits[-1:] * (times.count - 2)
    return visits, left


def _with_late_join(
    before: PassTimes, events: PairEvents, program: list[Event], late: LateTimes | None, left: list[Event]
) -> list[Event]:
    """All of a pair from its first operator on, and the join of the pair before it at its place."""
    classes = len(program[0].forward_ms)
    if late is None:
        return [computing("before tap", [before] * classes), *program]
    if late.after_dispatch:
        operators = events.backbone[: len(late.operators)]
        cut = 1 + program.index(operators[-1]) if operators else len(program)
        return [computing("before tap", [before] * classes), *program[:cut], *left, *program[cut:]]
    first, rest = _split(before, late)
    return [
        computing("before late join", [first] * classes),
        *left,
        computing("before tap", [rest] * classes),
        *program,
    ]


def _split(before: PassTimes, late: LateTimes) -> tuple[PassTimes, PassTimes]:
    """The operators before a tap, up to the late join of the pair before and behind it."""
    forward_ms = min(before.forward_ms, sum(each.forward_ms for each in late.operators))
    backward_ms = min(before.backward_ms, sum(each.backward_ms for each in late.operators))
    return (
        PassTimes(forward_ms=forward_ms, backward_ms=backward_ms),
        PassTimes(forward_ms=before.forward_ms - forward_ms, backward_ms=before.backward_ms - backward_ms),
    )
