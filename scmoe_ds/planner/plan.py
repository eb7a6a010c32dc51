"""The planner: from measured times to a schedule. No torch.

The paper's adaptive strategy chooses the place K of the expert computation (section 3, eq. 11). The operators before it
hide the dispatch, the operators after it hide the combine. `plan` chooses the place, and the number of chunks, from
measured times. It tries every schedule on two simulated lanes, computation and communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Union

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.times import SHARED, OperatorTimes, PassTimes

Count = Union[Literal["auto"], int]
Slots = Union[Literal["auto"], int, Sequence[int]]
Phase = Literal["forward", "backward"]
Mode = Literal["train", "forward", "prefill", "decode"]
_FORWARD: tuple[Phase, ...] = ("forward",)
_PHASES = {"train": (*_FORWARD, "backward"), "forward": _FORWARD, "prefill": _FORWARD, "decode": _FORWARD}

# Schedules that differ by less are equally fast, and the more robust one is taken.
TIE = 0.001
# The part of the pair's predicted time that chunks must save. Their transfers and products are timed one by one. What
# more transfers cost the computation beside them is not timed: on two CPU nodes a predicted gain of 2.6 % was a loss of
# 2 %, and one of 7 % a gain of 5.5 % (benchmarks/results). Nobody shall lose by leaving the choice to us.
MIN_GAIN = 0.04
MOST_EVENTS = 1_000_000
"""Simulated per pass and number of chunks; they take about a second. Eight chunks around eight operators have 12 870
schedules, around a hundred operators 10^11."""


def slot_that_halves(costs: Sequence[float]) -> int:
    """The slot that splits the backbone's cost most evenly between dispatch and combine.

    It stands in for eq. 11 while no times are known. Dispatch and combine carry the same bytes, so each should get the
    same window. The earlier slot wins a tie, because the gradient's dispatch then has the longer window.

    Args:
        costs: cost of each backbone operator in forward order (FLOPs, or any other common unit).

    Returns:
        1 … len(costs) + 1.
    """
    total = sum(costs)
    imbalance = [abs(total - 2 * sum(costs[:slot])) for slot in range(len(costs) + 1)]
    return imbalance.index(min(imbalance)) + 1


@dataclass(frozen=True)
class Simulated:
    """What a schedule costs from shortcut to join, in milliseconds, by `simulate`.

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


class _Event(NamedTuple):
    does: Literal["compute", "launch", "wait"]
    times: PassTimes
    transfer: int = -1


def _ms(times: PassTimes, phase: Phase) -> float:
    return times.forward_ms if phase == "forward" else times.backward_ms


def total_ms(times: PassTimes, mode: Mode) -> float:
    """Of the passes that the mode has."""
    return sum(_ms(times, phase) for phase in _PHASES[mode])


def _program(times: OperatorTimes, schedule: Schedule) -> list[_Event]:
    """What the executor does in a forward pass, in order. Transfers: dispatches 0 … n-1, combines n … 2n-1."""
    count, parts = schedule.num_chunks, times.chunks[schedule.num_chunks]
    program = [_Event("compute", times.gate), _Event("compute", times.encode)]
    program += [_Event("launch", parts.dispatch, chunk) for chunk in range(count)]
    operators = [_Event("compute", operator) for operator in times.backbone]
    done = 0
    for chunk, slot in enumerate(schedule.slots):
        program += [*operators[done : slot - 1], _Event("wait", parts.dispatch, chunk)]
        program += [_Event("compute", parts.experts), _Event("launch", parts.combine, count + chunk)]
        done = slot - 1
    program += operators[done:]
    program += [_Event("wait", parts.combine, count + chunk) for chunk in range(count)]
    return [*program, _Event("compute", times.decode)]


def _one_pass(program: list[_Event], phase: Phase, overlap: bool) -> Simulated:
    # Autograd runs the nodes in reverse; a wait's node launches the gradient's transfer, a launch's waits for it.
    events, launch = (program, "launch") if phase == "forward" else (program[::-1], "wait")
    clock = lane_free = exposed = communication = 0.0
    slack, ready = math.inf, {}
    for event in events:
        ms = _ms(event.times, phase)
        if event.does == "compute":
            clock += ms
            continue
        if event.does == launch:
            communication += ms
            ready[event.transfer] = lane_free = max(clock, lane_free) + ms  # one at a time, in order of launch
        if event.does != launch or not overlap:
            early = clock - ready[event.transfer]
            slack, exposed = min(slack, early), exposed + max(0.0, -early)
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
    if schedule.num_chunks not in times.chunks:
        raise ValueError(f"num_chunks {schedule.num_chunks}: there are times for {sorted(times.chunks)} chunks only")
    if schedule.slots[-1] > len(times.backbone) + 1:
        raise ValueError(f"expert_slot {schedule.slots[-1]}: the backbone has {len(times.backbone)} operators")
    program = _program(times, schedule)
    passes = [_one_pass(program, phase, schedule.overlap) for phase in _PHASES[mode]]
    return Simulated(
        sum(one.total_ms for one in passes),
        sum(one.exposed_ms for one in passes),
        sum(one.communication_ms for one in passes),
        min(one.slack_ms for one in passes),
    )


Candidate = tuple[Schedule, Simulated]


@dataclass(frozen=True)
class Plan:
    """A choice and what it was chosen from.

    Attributes:
        schedule: the choice; its expert_slot is an int if all chunks share it.
        predicted: what it costs.
        serial: what the same costs in one chunk with blocking communication.
        unchunked: every slot with one chunk, in order, whatever the caller asked for.
        best_per_chunks: the best of every number of chunks that was allowed, fewest first; the choice is one of them.
    """

    schedule: Schedule
    predicted: Simulated
    serial: Simulated
    unchunked: tuple[Candidate, ...]
    best_per_chunks: tuple[Candidate, ...]


def plan(times: OperatorTimes, mode: Mode = "train", slots: Slots = "auto", num_chunks: Count = "auto") -> Plan:
    """The schedule with the least total time: every chunk may have its own slot, and every measured chunk count.

    Among equals (`TIE`) the fewest chunks win, then the largest slack, then the earliest slots, so that the same times
    give the same plan on every rank. More than one chunk must be worth it (`MIN_GAIN`), unless asked for.

    Args:
        mode: "train" plans for forward and backward together, all others for a forward pass.
        slots: "auto", one slot for all chunks, or one per chunk (which settles their number).
        num_chunks: "auto", or the number of chunks to plan for.

    Raises:
        ValueError: slots and num_chunks that contradict each other, that no schedule can have, or without times.
    """
    tried = [(schedule, simulate(times, schedule, mode)) for schedule in _schedules(times, slots, num_chunks)]
    # Without one chunk among them, more were asked for: there is nothing that they would have to gain on.
    unchunked_ms = min((costs.total_ms for schedule, costs in tried if schedule.num_chunks == 1), default=math.inf)
    limit_ms = (1 - MIN_GAIN) * unchunked_ms
    schedule, predicted = _best([each for each in tried if each[0].num_chunks == 1 or each[1].total_ms <= limit_ms])
    by_count = itertools.groupby(tried, key=lambda each: each[0].num_chunks)
    best = {count: _best(list(group)) for count, group in by_count} | {schedule.num_chunks: (schedule, predicted)}
    return Plan(
        schedule=schedule,
        predicted=predicted,
        serial=simulate(times, Schedule(schedule.slots[0], overlap=False), mode),
        unchunked=tuple((each, simulate(times, each, mode)) for each in map(Schedule, _all_slots(times))),
        best_per_chunks=tuple(best.values()),
    )


def _schedules(times: OperatorTimes, slots: Slots, num_chunks: Count) -> Iterator[Schedule]:
    if not isinstance(slots, (str, int)):
        if num_chunks not in ("auto", len(slots)):
            raise ValueError(f"num_chunks {num_chunks}: expert_slot {list(slots)} is for {len(slots)} chunks")
        num_chunks = len(slots)
    for count in sorted(times.chunks) if num_chunks == "auto" else [num_chunks]:
        if isinstance(slots, str):
            yield from map(_schedule, itertools.combinations_with_replacement(_slots_to_try(times, count), count))
        else:
            yield _schedule([slots] * count if isinstance(slots, int) else slots)


def _all_slots(times: OperatorTimes) -> range:
    return range(1, len(times.backbone) + 2)


def _slots_to_try(times: OperatorTimes, count: int) -> list[int]:
    """All slots. In a long backbone, as many evenly spaced ones as leave few enough combinations to try."""
    slots, most = _all_slots(times), len(times.backbone) + 1
    while most > 2 and math.comb(most + count - 1, count) * (len(slots) + 5 * count) > MOST_EVENTS:
        most -= 1
    if count == 1 or most == len(slots):
        return list(slots)
    return sorted({1 + round(place * (len(slots) - 1) / (most - 1)) for place in range(most)})


def _schedule(slots: Sequence[int]) -> Schedule:
    return Schedule(slots[0] if len(set(slots)) == 1 else tuple(slots), len(slots))


def _best(candidates: Sequence[Candidate]) -> Candidate:
    equal_ms = min(costs.total_ms for _, costs in candidates) * (1 + TIE)
    equals = [each for each in candidates if each[1].total_ms <= equal_ms]
    return min(equals, key=lambda each: (each[0].num_chunks, -each[1].slack_ms, each[0].slots))


def _windows(times: OperatorTimes, slot: int, phase: Phase) -> tuple[float, float]:
    if slot not in _all_slots(times):
        raise ValueError(f"expert_slot {slot}: the backbone has {len(times.backbone)} operators, slots count from 1")
    costs = [_ms(operator, phase) for operator in times.backbone]
    return sum(costs[: slot - 1]), sum(costs[slot - 1 :])


def idle_window_ms(times: OperatorTimes, slot: int, phase: Phase) -> float:
    """Eq. 11 for one chunk at this slot: |Σ_{i<K} COMP_i − T_disp| + |Σ_{i>K} COMP_i − T_comb|, milliseconds.

    In the backward pass the combine's gradient travels beside the operators after the slot, the dispatch's gradient
    beside the operators before it. The absolute values also count the part of a window that stays idle. Their sum is
    2 · exposed + backbone − communication. It is least where the exposed time is least, but an idle window costs
    nothing, so `plan` compares simulated totals.

    Raises:
        ValueError: a slot outside 1 … number of operators + 1.
    """
    (before, after), parts = _windows(times, slot, phase), times.chunks[1]
    return abs(before - _ms(parts.dispatch, phase)) + abs(after - _ms(parts.combine, phase))


@dataclass(frozen=True)
class BreakEven:
    """How much communication ScMoE hides, and from how much on it pays; milliseconds.

    Attributes:
        largest_hidden_ms: the longest all-to-all, the same for dispatch, combine and their gradients, that one chunk
            at the best slot hides completely.
        shared_ms: time of the shared expert, 0.0 without one. When more communication than this is hidden, ScMoE is
            faster than top-1 MoE without a shared expert (section 3: from about 20 % of MoE time on).
    """

    largest_hidden_ms: float
    shared_ms: float


def break_even(times: OperatorTimes, mode: Mode) -> BreakEven:
    """From the backbone's times alone; with mode="train" one slot has to serve both passes."""
    phases = _PHASES[mode]
    hidden = max(min(ms for phase in phases for ms in _windows(times, slot, phase)) for slot in _all_slots(times))
    shared = [operator for operator in times.backbone if operator.kind in SHARED]
    return BreakEven(float(hidden), float(sum(total_ms(operator, mode) for operator in shared)))
