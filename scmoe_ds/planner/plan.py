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
from typing import Literal, Union

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.simulation import PHASES, ROW, Mode, Pair, Phase, Simulated, ms_of, total_ms
from scmoe_ds.planner.times import SHARED, OperatorTimes

Count = Union[Literal["auto"], int]
Slots = Union[Literal["auto"], int, Sequence[int]]

# Schedules that differ by less are equally fast, and the more robust one is taken.
TIE = 0.001
# The part of the pair's predicted time that chunks must save. Their transfers and products are timed one by one. What
# more transfers cost the computation beside them is not timed: on two CPU nodes a predicted gain of 2.6 % was a loss of
# 2 %, and one of 7 % a gain of 5.5 % (benchmarks/results). Nobody shall lose by leaving the choice to us.
MIN_GAIN = 0.04
MOST_EVENTS = 1_000_000
"""Simulated per pass and number of chunks; they take about a second. Eight chunks around eight operators have 12 870
schedules, around a hundred operators 10^11."""


def slot_that_halves(costs: Sequence[float], late: float = 0) -> int:
    """The slot that splits the backbone's cost most evenly between dispatch and combine.

    It stands in for eq. 11 while no times are known. Dispatch and combine carry the same bytes, so each should get the
    same window. The earlier slot wins a tie, because the gradient's dispatch then has the longer window.

    Args:
        costs: cost of each backbone operator in forward order (FLOPs, or any other common unit).
        late: cost of what the combine also goes on beside, with a late join.

    Returns:
        1 … len(costs) + 1.
    """
    total = sum(costs) + late
    imbalance = [abs(total - 2 * sum(costs[:slot])) for slot in range(len(costs) + 1)]
    return imbalance.index(min(imbalance)) + 1


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
    pair = Pair(times)
    tried = [(schedule, pair.simulate(schedule, mode)) for schedule in _schedules(times, slots, num_chunks)]
    # Without one chunk among them, more were asked for: there is nothing that they would have to gain on.
    unchunked_ms = min((costs.total_ms for schedule, costs in tried if schedule.num_chunks == 1), default=math.inf)
    limit_ms = (1 - MIN_GAIN) * unchunked_ms
    schedule, predicted = _best([each for each in tried if each[0].num_chunks == 1 or each[1].total_ms <= limit_ms])
    by_count = itertools.groupby(tried, key=lambda each: each[0].num_chunks)
    best = {count: _best(list(group)) for count, group in by_count} | {schedule.num_chunks: (schedule, predicted)}
    known = dict(tried)
    return Plan(
        schedule=schedule,
        predicted=predicted,
        serial=pair.simulate(Schedule(schedule.slots[0], overlap=False), mode),
        unchunked=tuple(
            (each, known.get(each) or pair.simulate(each, mode)) for each in map(Schedule, _all_slots(times))
        ),
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
    events = (len(slots) + 5 * count) * (2 * ROW + 1 if times.is_periodic else 1)
    while most > 2 and math.comb(most + count - 1, count) * events > MOST_EVENTS:
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
    costs = [ms_of(operator, phase) for operator in times.backbone]
    late = 0.0 if times.late is None else sum(ms_of(operator, phase) for operator in times.late.operators)
    return sum(costs[: slot - 1]), sum(costs[slot - 1 :]) + late


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
    return abs(before - ms_of(parts.dispatch, phase)) + abs(after - ms_of(parts.combine, phase))


def _hidden_ms(times: OperatorTimes, slot: int, phase: Phase) -> float:
    """The longest all-to-all that one chunk at this slot hides completely, in one phase."""
    before, after = _windows(times, slot, phase)
    if times.late is None or not times.is_periodic:
        return min(before, after)
    # The combine goes on beside the next pair's gate, too, and the dispatch beside the decode at the late join. And
    # what the combine leaves of the lane has to do for the next pair's dispatch.
    late = times.late.operators
    before += ms_of(times.decode, phase) if slot > len(late) else 0.0
    after += ms_of(times.gate, phase) + ms_of(times.encode, phase)
    return min(before, after, (before + after - sum(ms_of(operator, phase) for operator in late)) / 2)


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
    phases = PHASES[mode]
    hidden = max(min(_hidden_ms(times, slot, phase) for phase in phases) for slot in _all_slots(times))
    shared = [operator for operator in times.backbone if operator.kind in SHARED]
    return BreakEven(float(hidden), float(sum(total_ms(operator, mode) for operator in shared)))
