"""The planner of pairs that join late, against hand-made numbers and a row of pairs simulated here, event by event."""

from __future__ import annotations

import random

import pydantic
import pytest

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.plan import break_even, plan
from scmoe_ds.planner.plan_text import plan_lines, summary_line
from scmoe_ds.planner.simulation import Phase, predicted_spans, simulate
from scmoe_ds.planner.times import ChunkTimes, LateTimes, OperatorTime, OperatorTimes, PassTimes

PARTS = ("attention", "shared", "gate", "encode", "decode", "dispatch", "experts", "combine")


def times_of(after_dispatch: bool, chunks: int = 1, **ms: tuple[float, float]) -> OperatorTimes:
    """Of an MoE in every block; those of a chunk are of each of so many."""
    part = {name: dict(zip(("forward_ms", "backward_ms"), ms.get(name, (0, 0)), strict=True)) for name in PARTS}
    passes = {name: PassTimes(**values) for name, values in part.items()}
    backbone = tuple(OperatorTime(name=name, **part[name]) for name in PARTS[:2])
    of_chunk = ChunkTimes(dispatch=passes["dispatch"], experts=passes["experts"], combine=passes["combine"])
    late = LateTimes(operators=backbone[:1], after_dispatch=after_dispatch)
    rest = {name: passes[name] for name in ("gate", "encode", "decode")}
    return OperatorTimes(backbone=backbone, chunks={1: of_chunk, chunks: of_chunk}, late=late, **rest)


def row_by_hand(times: OperatorTimes, schedule: Schedule, phase: Phase, pairs: int) -> tuple[float, float]:
    """Total and exposed time of a row of pairs with one tap per block: two clocks, and the order of the executor."""
    ms = lambda part: getattr(part, f"{phase}_ms")  # noqa: E731
    chunk, (attention, shared) = times.chunks[schedule.num_chunks], map(ms, times.backbone)
    program: list[tuple[str, object, float]] = []

    def join(pair: int) -> None:
        for number in range(schedule.num_chunks):
            program.append(("wait", ("c", pair, number), ms(chunk.combine)))
        program.append(("compute", None, ms(times.decode)))

    for pair in range(pairs):
        program.append(("compute", None, ms(times.gate) + ms(times.encode)))
        for number in range(schedule.num_chunks):
            program.append(("launch", ("d", pair, number), ms(chunk.dispatch)))
        for slot in (1, 2, 3):
            for number, chosen in enumerate(schedule.slots):
                if chosen == slot:
                    program.append(("wait", ("d", pair, number), ms(chunk.dispatch)))
                    program.append(("compute", None, ms(chunk.experts)))
                    program.append(("launch", ("c", pair, number), ms(chunk.combine)))
            if slot < 3:
                program.append(("compute", None, (attention, shared)[slot - 1]))
            if slot == 1 and pair:
                join(pair - 1)
    join(pairs - 1)
    opposite = {"launch": "wait", "wait": "launch", "compute": "compute"}
    if phase == "backward":
        program = [(opposite[does], key, length) for does, key, length in reversed(program)]
    clock = lane = exposed = 0.0
    ends: dict[object, float] = {}
    for does, key, length in program:
        if does == "compute":
            clock += length
        elif does == "launch":
            ends[key] = lane = max(clock, lane) + length
        else:
            exposed += max(0.0, ends[key] - clock)
            clock = max(clock, ends[key])
    return clock, exposed


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_pair_costs_what_one_more_adds_to_a_long_row(chunks: int) -> None:
    rng = random.Random(chunks)
    for _ in range(60):
        scale = rng.choice([0.2, 1, 3])
        ms = {name: (rng.uniform(0, 3), rng.uniform(0, 3)) for name in PARTS}
        ms |= {name: (scale * ms[name][0] / chunks, scale * ms[name][1] / chunks) for name in ("dispatch", "combine")}
        times = times_of(True, chunks, **ms)
        schedule = Schedule(tuple(sorted(rng.randint(1, 3) for _ in range(chunks))), chunks)
        by_phase = []
        for phase in ("forward", "backward"):
            long, short = (row_by_hand(times, schedule, phase, pairs) for pairs in (9, 8))
            by_phase.append((long[0] - short[0], long[1] - short[1]))
        for mode, phases in (("forward", by_phase[:1]), ("train", by_phase)):
            found = simulate(times, schedule, mode)
            assert found.total_ms == pytest.approx(sum(each[0] for each in phases))
            assert found.exposed_ms == pytest.approx(sum(each[1] for each in phases), abs=1e-9)
            transfers = [sum(ms[name][phase] for phase in range(len(phases))) for name in ("dispatch", "combine")]
            assert found.communication_ms == pytest.approx(chunks * sum(transfers))


MS = {"attention": (4, 8), "shared": (2, 4), "dispatch": (5, 5), "combine": (5, 5), "experts": (3, 6)}


def test_a_window_behind_the_backbone_by_hand() -> None:
    """attention 4, shared 2 | next attention 4: one chunk behind attention exposes 1 of the dispatch, none of the
    combine; behind shared, 1 of the combine."""
    times = times_of(False, **MS)
    totals = [simulate(times, Schedule(slot), "forward") for slot in (1, 2, 3)]
    assert [each.exposed_ms for each in totals] == [5, 1, 1]
    assert [each.total_ms for each in totals] == [18, 14, 14], "the next attention is between shortcut and join"
    assert plan(times, "forward").schedule == Schedule(2)
    at_the_end = plan(times.model_copy(update={"late": None}), "forward").predicted
    assert at_the_end.exposed_ms == 1 + 3, "without it, the combine has shared alone"
    assert break_even(times, "forward").largest_hidden_ms == 4
    text = summary_line("MoE layer 0", times, plan(times), plan(times, "forward"))
    assert "from shortcut to join" in text
    lines = plan_lines("MoE layer 0", times, plan(times), plan(times, "forward"))
    assert any(line.split()[:2] == ["next", "attention"] for line in lines)
    assert any(line.split()[:3] == ["window", "10.00", "20.00"] for line in lines)


def test_two_moes_on_the_way_share_the_lane() -> None:
    """No dispatch can pass the combine before it, and no combine begins before its experts: 5 + 3 + 5 per pair. The
    windows alone, 4 for the dispatch and 6 for the combine, would say 1."""
    times = times_of(True, **MS)
    found = plan(times, "forward").predicted
    assert (found.total_ms, found.exposed_ms, found.communication_ms) == (13, 4, 10)
    assert found.hidden_share == pytest.approx(0.6)
    assert "from one shortcut to the next" in summary_line("MoE layer 0", times, plan(times), plan(times, "forward"))


@pytest.mark.parametrize("after_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_longest_hidden_transfer_against_a_search(after_dispatch: bool, mode: str) -> None:
    rng = random.Random(3)
    for _ in range(4):
        ms = {name: (rng.uniform(0, 3), rng.uniform(0, 3)) for name in PARTS} | {"experts": (0, 0)}
        low, high = 0.0, 20.0
        for _ in range(24):
            middle = (low + high) / 2
            times = times_of(after_dispatch, **{**ms, "dispatch": (middle,) * 2, "combine": (middle,) * 2})
            exposed = min(costs.exposed_ms for _, costs in plan(times, mode).unchunked)
            low, high = (middle, high) if exposed < 1e-9 else (low, middle)
        assert break_even(times, mode).largest_hidden_ms == pytest.approx(low, abs=1e-5)


@pytest.mark.parametrize("after_dispatch", [False, True])
def test_predicted_spans_are_one_pair_and_its_late_window(after_dispatch: bool) -> None:
    times = times_of(after_dispatch, **{**MS, "gate": (1, 1), "decode": (1, 1)})
    spans = [span for span in predicted_spans(times, Schedule(2), "train") if span.start_ms < span.end_ms]
    for phase in ("forward", "backward"):
        names = [span.name for span in spans if span.phase == phase and span.lane == "compute"]
        assert sorted(set(names)) == sorted(
            ["gate", "attention", "experts", "shared", "next attention", "decode", *["next gate"] * after_dispatch]
        )
        assert len(names) == len(set(names))
        transfers = {span.name for span in spans if span.phase == phase and span.lane == "communication"}
        assert transfers == {"dispatch", "combine", *["next dispatch"] * after_dispatch}
        assert min(span.start_ms for span in spans if span.phase == phase) == 0
    (combine,) = (
        span for span in spans if (span.phase, span.name, span.lane) == ("forward", "combine", "communication")
    )
    (beside,) = (span for span in spans if (span.phase, span.name) == ("forward", "next attention"))
    assert combine.start_ms < beside.start_ms < combine.end_ms or combine.end_ms <= beside.start_ms


def test_times_survive_json_and_bad_ones_do_not() -> None:
    times = times_of(True, **MS)
    assert OperatorTimes.model_validate_json(times.model_dump_json()) == times
    data = times.model_dump(mode="json")
    for change in ({"operators": []}, {"after_dispatch": 1}, {"operators": data["backbone"] * 2}):
        with pytest.raises(pydantic.ValidationError):
            OperatorTimes.model_validate({**data, "late": {**data["late"], **change}})
