"""A simulated step against sums, against the planner, and against simulating every pair and micro-batch."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.lanes import Lanes
from scmoe_ds.planner.simulation import simulate
from scmoe_ds.planner.times import ChunkTimes, LateTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.step_program import Mode
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


# ---- exactness ------------------------------------------------------------------------------------------------------


def some_pairs(rng: random.Random, classes: int, late: bool | None) -> PairTimes:
    """Any times; late: whether the next dispatch leaves before the join of this pair; None: it joins at the end."""

    def one(scale: float = 1.0) -> PassTimes:
        return passes(*(scale * rng.choice([0.0, rng.uniform(0.1, 4)]) for _ in range(2)))

    count, transfer = rng.choice([1, 2]), rng.choice([0.3, 1.0, 3.0])
    dispatch, combine = ({n: one(transfer / n) for n in (1, count)} for _ in range(2))
    backbone = tuple(OperatorTime(name=name, **dict(one())) for name in ("attention", "mlp", "shared"))
    common = dict(gate=one(0.2), encode=one(0.2), decode=one(0.2), backbone=backbone)
    if late is not None:
        common["late"] = LateTimes(operators=backbone[:1], after_dispatch=late)

    def of_class() -> OperatorTimes:
        chunks = {n: ChunkTimes(dispatch=dispatch[n], experts=one(1 / n), combine=combine[n]) for n in (1, count)}
        return OperatorTimes(chunks=chunks, **common)

    classes_ = tuple(of_class() for _ in range(classes))
    ms = [rng.choice([0.0, rng.uniform(0, 30)]) for _ in range(2)]
    return PairTimes(rng.randint(1, 9), one(), classes_, *ms, overlapped=rng.random() < 0.8)


def some_steps(count: int) -> Iterator[tuple[StepTimes, Layout]]:
    rng = random.Random(2404)
    for number in range(count):
        classes = rng.choice([1, 1, 2, 3])
        late = rng.choice([None, False, True])
        pairs = [some_pairs(rng, classes, late) for _ in range(rng.randint(1, 3))]
        times = StepTimes(
            pairs=tuple(pairs),
            shares=(1 / classes,) * classes,
            first=passes(1, 2),
            last=passes(2, 3),
            outside_reduce_ms=rng.uniform(0, 5),
            outside_gather_ms=rng.uniform(0, 5),
            optimizer_ms=1.0,
            update_gather_ms=2.0,
            slowed_by=rng.choice([1.0, 1.2]),
            shared_link=rng.random() < 0.7,
            in_flight=2 if late is None and rng.random() < 0.3 else 1,
        )
        yield times, Layout(8, 8, zero_stage=number % 4, accumulation=rng.choice([1, 2, 7]), overlap_comm=True)


def test_what_repeats_itself_is_not_simulated_again_and_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = list(some_steps(60))
    ran: list[int] = []
    run = Lanes.run
    monkeypatch.setattr(Lanes, "run", lambda *args: (ran.append(1), run(*args)))
    schedules = [[pair.schedule for pair in run_step(*case).pairs] for case in cases]
    ran.clear()  # the planner's own
    short = [run_step(*case, schedules=each) for case, each in zip(cases, schedules, strict=True)]
    visited = len(ran)
    monkeypatch.setattr("scmoe_ds.planner.lanes._State.repeats", lambda *_: False)
    long = [run_step(*case, schedules=each) for case, each in zip(cases, schedules, strict=True)]
    for one, other in zip(short, long, strict=True):
        for name in ("total_ms", "micro_batch_ms", "exposed_ms", "exposed_reduce_ms", "communication_ms", "slowed_ms"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-8), name
    assert visited < 0.5 * (len(ran) - visited)


def test_the_parts_of_a_step_are_its_total() -> None:
    for times, layout in some_steps(30):
        step = run_step(times, layout)
        parts = step.compute_ms + step.slowed_ms + step.exposed_ms + step.exposed_reduce_ms + step.optimizer_ms
        if len(times.shares) == 1:
            assert step.total_ms == pytest.approx(parts, rel=1e-9)
        assert step.total_ms >= parts - 1e-6 * step.total_ms


# ---- closed forms ---------------------------------------------------------------------------------------------------


def with_experts(*experts: float, transfer: float = 5.0) -> tuple[OperatorTimes, ...]:
    return tuple(operators(transfer, each) for each in experts)


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_without_communication_a_step_is_its_computation(mode: Mode) -> None:
    step = run_step(step_of(pairs_of(operators(transfer=0.0))), Layout(8, 8), mode)
    forward_ms, backward_ms = 5 + 6 * (3 + 0.6 + 7 + 3), 9.5 + 6 * (6 + 0.6 + 14 + 6)
    assert step.total_ms == pytest.approx(forward_ms + backward_ms * (mode == "train"), rel=1e-9)
    assert step.total_ms == pytest.approx(step.compute_ms) and step.hidden_share == 1.0


def test_windows_that_hide_everything_and_none() -> None:
    hidden = run_step(step_of(pairs_of(operators(transfer=0.5))), Layout(8, 8))
    assert hidden.exposed_ms == 0 and hidden.communication_ms == pytest.approx(6 * 2)
    zero = OperatorTimes(gate=NOTHING, encode=NOTHING, decode=NOTHING, backbone=(), chunks=operators(5.0, 0.0).chunks)
    pair = PairTimes(6, NOTHING, (zero,), 0.0, 0.0, True)
    step = run_step(dataclasses.replace(step_of(pair), first=NOTHING, last=NOTHING), Layout(8, 8))
    assert step.total_ms == pytest.approx(6 * 20) == pytest.approx(step.exposed_ms)
    assert step.hidden_share == pytest.approx(0.0)


def test_a_busier_class_delays_all_others_by_its_excess() -> None:
    """Without overlap, by all of it; each pair's busiest ranks are others. With it, all go as the busiest alone would."""
    layout = Layout(8, 8, accumulation=2)

    def total_ms(*pairs: tuple[OperatorTimes, ...], overlapped: bool) -> float:
        shares = (1 / len(pairs[0]),) * len(pairs[0])
        of_pairs = [PairTimes(3, passes(3, 6), each, 0.0, 0.0, overlapped) for each in pairs]
        return run_step(dataclasses.replace(step_of(*of_pairs), shares=shares), layout).total_ms

    alike = total_ms(with_experts(3, 3), with_experts(3, 3), overlapped=False)
    assert alike == pytest.approx(total_ms(with_experts(3), with_experts(3), overlapped=False), rel=1e-9)
    busier = total_ms(with_experts(3, 3.5), with_experts(4, 3), overlapped=False)
    assert busier - alike == pytest.approx(2 * 3 * (0.5 + 1.0) * 3, rel=1e-9)
    assert total_ms(with_experts(3, 9), overlapped=True) == pytest.approx(
        total_ms(with_experts(9), overlapped=True), rel=1e-9
    )


def test_reductions_and_gathers_by_hand() -> None:
    """Two pairs without communication of their own; backward 26.6 each, forward 13.6, 5 and 9.5 around them."""
    pair = pairs_of(operators(0.0), 2, reduce_ms=30.0, gather_ms=20.0)
    times = step_of(pair, outside_reduce_ms=1.0, outside_gather_ms=2.0, optimizer_ms=3.0, update_gather_ms=4.0)
    passes_ms = 5 + 2 * 13.6 + 9.5 + 2 * 26.6
    end_ms = passes_ms + 3 + 4

    def total_ms(**layout: Any) -> float:
        return run_step(times, Layout(8, 8, **layout)).total_ms

    assert total_ms(zero_stage=0, overlap_comm=True) == pytest.approx(end_ms + 2 * 30 + 1)
    assert total_ms(zero_stage=1) == pytest.approx(end_ms + 2 * 30 + 1)
    # The first 30 run beside the second pair's backward pass and 3.4 of what follows, 1.5: 1.9 are left of them.
    beside = end_ms + (30 - 26.6 - 1.5) + 30 + 1
    assert total_ms(zero_stage=1, overlap_comm=True) == pytest.approx(beside)
    assert total_ms(zero_stage=1, overlap_comm=True, accumulation=3) == pytest.approx(beside + 2 * passes_ms)
    twice = total_ms(zero_stage=2, overlap_comm=True, accumulation=2)
    assert twice == pytest.approx(2 * (beside - 3 - 4) + 3 + 4)
    # Forward 2 wait, 20 beside 1 of the first part, 20 beside a pair. Backward 2, 20 beside 8, 20 beside a pair; then
    # the reductions: 30 behind the gather, beside 26.6 and 1.5.
    gathers = 2 + 19 + 6.4 + 2 + 12 + 0
    assert total_ms(zero_stage=3) == pytest.approx(end_ms + gathers + (30 - 26.6 - 1.5) + 30 + 1)


def test_recomputation_runs_the_forward_pass_of_every_pair_again() -> None:
    pair = pairs_of(operators())
    schedules = [Schedule(2)]
    once, again, forward = (
        run_step(step_of(each), Layout(8, 8), mode, schedules=schedules)
        for each, mode in ((pair, "train"), (dataclasses.replace(pair, repeated=True), "train"), (pair, "forward"))
    )
    assert again.total_ms == pytest.approx(once.total_ms + forward.total_ms - 5.0, rel=1e-9)
    assert again.communication_ms == pytest.approx(1.5 * once.communication_ms)
    assert again.compute_ms == pytest.approx(once.compute_ms + forward.compute_ms - 5.0)


def test_late_joins_hide_more_and_the_last_one_is_waited_for() -> None:
    """Attention 4, shared 2, experts 3; transfers 5. At the end the combine has the shared expert alone."""
    times = operators()
    backbone = tuple(OperatorTime(name=n, forward_ms=ms) for n, ms in (("attention", 4.0), ("shared", 2.0)))
    zero = dict.fromkeys(("gate", "encode", "decode"), NOTHING)
    part = ChunkTimes(dispatch=passes(5, 5), experts=passes(3, 6), combine=passes(5, 5))
    times = OperatorTimes(backbone=backbone, chunks={1: part}, **zero)
    totals = {}
    for late in (None, False, True):
        each = (
            times
            if late is None
            else times.model_copy(update={"late": LateTimes(operators=backbone[:1], after_dispatch=late)})
        )
        before = passes(0.0 if late else 4.0, 0)
        pair = PairTimes(5, before, (each,), 0.0, 0.0, True)
        totals[late] = run_step(step_of(pair), Layout(8, 8), "forward", schedules=[Schedule(2)]).total_ms - 5.0
    # A pair: 4 before the tap, 5 dispatch (1 exposed), 3, 5 combine beside shared 2 and the next attention 4.
    assert totals[None] == pytest.approx(5 * (4 + 5 + 3 + 5))
    assert totals[False] == pytest.approx(5 * (4 + 5 + 3 + 2) + 3)
    assert totals[True] == pytest.approx(5 * 13), "every dispatch waits for the combine before it: 5 + 3 + 5 a pair"


def test_two_micro_batches_in_flight_by_hand() -> None:
    """Forward: before 4, experts 3; backward: before 8, experts 6; transfers 5. A combine beside before 4 exposes 1,
    a dispatch beside experts' 6 and one beside experts 3 expose 2, a combine beside before' 8 nothing."""
    zero = dict.fromkeys(("gate", "encode", "decode"), NOTHING)
    part = ChunkTimes(dispatch=passes(5, 5), experts=passes(3, 6), combine=passes(5, 5))
    pair = PairTimes(4, passes(4, 8), (OperatorTimes(backbone=(), chunks={1: part}, **zero),), 0.0, 0.0, False)
    times = step_of(pair)
    alone = run_step(times, Layout(8, 8, accumulation=3))
    assert alone.total_ms == pytest.approx(3 * (OUTSIDE_MS + 4 * (4 + 3 + 8 + 6 + 20)))
    both = dataclasses.replace(times, in_flight=2)
    found = run_step(both, Layout(8, 8, accumulation=3))
    assert found.micro_batch_ms == pytest.approx(OUTSIDE_MS + 4 * (1 + 4 + 6 + 2 + 3 + 8))
    assert found.total_ms == pytest.approx(2 * found.micro_batch_ms + alone.total_ms / 3)
    assert run_step(both, Layout(8, 8)).total_ms == pytest.approx(alone.total_ms / 3), "one has no other beside it"
    spans = run_step(both, Layout(8, 8, accumulation=3), spans=True).spans
    assert {span.name for span in spans} >= {"experts", "experts'", "dispatch", "combine'"}


def test_no_time_gets_shorter_when_a_part_gets_longer() -> None:
    rng = random.Random(5)
    for times, layout in some_steps(25):
        times = dataclasses.replace(times, slowed_by=1.0)
        schedules = [pair.schedule for pair in run_step(times, layout).pairs]
        before_ms = run_step(times, layout, schedules=schedules).total_ms
        for place, pair in enumerate(times.pairs):
            data = json.loads(pair.by_class[0].model_dump_json())
            part = rng.choice(["gate", "decode", "dispatch", "experts", "combine"])
            for each in [data] if part in data else data["chunks"].values():
                each[part][rng.choice(["forward_ms", "backward_ms"])] += rng.uniform(0, 5)
            longer = dataclasses.replace(pair, by_class=(OperatorTimes(**data), *pair.by_class[1:]))
            pairs = (*times.pairs[:place], longer, *times.pairs[place + 1 :])
            after = run_step(dataclasses.replace(times, pairs=pairs), layout, schedules=schedules)
            assert after.total_ms >= before_ms - 1e-9 * before_ms


def test_spans_are_one_micro_batch_and_the_update() -> None:
    pair = pairs_of(operators(), 3, reduce_ms=7.0)
    times = step_of(pair, outside_reduce_ms=2.0, optimizer_ms=3.0, update_gather_ms=4.0)
    step = run_step(times, Layout(8, 8, overlap_comm=True), spans=True)
    assert max(span.end_ms for span in step.spans) == pytest.approx(step.total_ms)
    lengths = dict.fromkeys(("compute", "communication", "wait", "reduction"), 0.0)
    for span in step.spans:
        lengths[span.lane] += span.end_ms - span.start_ms
    assert lengths["compute"] == pytest.approx(step.compute_ms + step.optimizer_ms)
    assert lengths["wait"] == pytest.approx(step.exposed_ms + step.exposed_reduce_ms)
    assert {span.label for span in step.spans} == {-1, 0, 1, 2}
    backward = [span.label for span in step.spans if span.phase == "backward" and span.name == "attention"]
    assert backward == [2, 1, 0]
