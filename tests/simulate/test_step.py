"""A simulated step against sums, against the planner, and against simulating every pair and micro-batch."""

from __future__ import annotations

import pytest

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.simulation import simulate
from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.times import PairTimes, StepTimes

NOTHING = PassTimes(forward_ms=0.0)


def passes(forward_ms: float, backward_ms: float) -> PassTimes:
    return PassTimes(forward_ms=forward_ms, backward_ms=backward_ms)


def operators(transfer: float = 5.0, experts: float = 3.0) -> OperatorTimes:
    """Of a Pos-2: mlp 2, attention 3, shared 2; twice as long backward."""

    def chunk(count: int) -> ChunkTimes:
        both = passes(transfer / count, transfer / count)
        return ChunkTimes(dispatch=both, experts=passes(experts / count, 2 * experts / count), combine=both)

    backbone = [
        OperatorTime(name=name, forward_ms=ms, backward_ms=2 * ms)
        for name, ms in (("mlp", 2), ("attention", 3), ("shared", 2))
    ]
    return OperatorTimes(
        gate=passes(0.1, 0.2),
        encode=passes(0.3, 0.1),
        decode=passes(0.2, 0.3),
        backbone=tuple(backbone),
        chunks={count: chunk(count) for count in (1, 2, 4)},
    )


def step_of(*pairs: PairTimes, **other: float) -> StepTimes:
    return StepTimes(
        pairs=pairs,
        shares=(1.0,),
        first=passes(1.0, 1.5),
        last=passes(4.0, 8.0),
        **{name: other.pop(name, 0.0) for name in _AROUND},
        **other,
    )


_AROUND = ("outside_reduce_ms", "outside_gather_ms", "optimizer_ms", "update_gather_ms")


def pairs_of(times: OperatorTimes, count: int = 6, overlapped: bool = True, **ms: float) -> PairTimes:
    return PairTimes(count, passes(3, 6), (times,), ms.get("reduce_ms", 0.0), ms.get("gather_ms", 0.0), overlapped)


OUTSIDE_MS = 1.0 + 1.5 + 4.0 + 8.0
BEFORE_MS = 3 + 6


def test_pairs_cost_what_the_planner_says_and_the_rest_its_sum() -> None:
    step = run_step(step_of(pairs_of(operators()), optimizer_ms=3.0), Layout(8, 8))
    (pair,) = step.pairs
    assert pair.predicted == simulate(operators(), pair.schedule, "train")
    assert step.total_ms == pytest.approx(OUTSIDE_MS + 6 * (BEFORE_MS + pair.predicted.total_ms) + 3.0, rel=1e-12)
    assert step.exposed_ms == pytest.approx(6 * pair.predicted.exposed_ms, abs=1e-9)


def test_without_overlap_a_step_is_the_sum_of_everything() -> None:
    layout = Layout(8, 8, accumulation=3)
    pair = pairs_of(operators(), overlapped=False, reduce_ms=7.0)
    step = run_step(step_of(pair, outside_reduce_ms=2.0, optimizer_ms=3.0, update_gather_ms=4.0), layout)
    compute_ms = OUTSIDE_MS + 6 * (BEFORE_MS + 0.3 + 0.4 + 0.5 + 3 * 7 + 9)
    assert step.compute_ms == pytest.approx(3 * compute_ms, rel=1e-9)
    assert step.communication_ms == pytest.approx(3 * 6 * 20)
    assert step.exposed_reduce_ms == pytest.approx(6 * 7 + 2 + 4)
    assert step.total_ms == pytest.approx(3 * compute_ms + 3 * 6 * 20 + 6 * 7 + 2 + 4 + 3, rel=1e-9)
    assert step.pairs[0].schedule == Schedule(1, overlap=False)
