"""Training with overlap and without, compared: which is kept, on all ranks alike, and where it is noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lab.distributed import run_distributed
from scmoe_ds.planner import comparison
from scmoe_ds.planner.calibration import TimedPasses
from scmoe_ds.planner.comparison import Comparison
from scmoe_ds.trace.recorder import SILENT, Recorder
from scmoe_ds.training.communication import CommunicationSample, schedule_entries
from tests.distributed.test_calibration import build, train

TIMED, WARM_UP, TURNS = 3, 2, "+--+-++-"
OVERLAP = {"calibration_steps": TIMED, "num_chunks": 1}


class Clock:
    """In place of the time of a micro-batch: 100 ms, and on one rank another time for those that overlap."""

    def __init__(self, with_overlap_ms: float, rank: int) -> None:
        self.with_overlap_ms = with_overlap_ms if dist.get_rank() == rank else 100.0
        self.overlaps: dict[int, bool] = {}
        self.begin, self.duration_ms = Comparison.begin, comparison._duration_ms

    def __enter__(self) -> None:
        def begin(this: Comparison) -> tuple[bool, Recorder]:
            overlap, recorder = self.begin(this)
            self.overlaps[id(recorder)] = overlap
            return overlap, recorder

        def duration_ms(recorder: Recorder) -> float:
            assert self.duration_ms(recorder) > 0, "the exchanges of the micro-batch were recorded"
            return self.with_overlap_ms if self.overlaps[id(recorder)] else 100.0

        Comparison.begin, comparison._duration_ms = begin, duration_ms  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Comparison.begin, comparison._duration_ms = self.begin, self.duration_ms  # type: ignore[method-assign]


def compare(with_overlap_ms: float, rank: int) -> Any:
    """A calibration and a comparison, in whose middle a micro-batch is recorded and a validation runs."""
    turns, middle = "", None
    with Clock(with_overlap_ms, rank):
        engine = build(overlap=OVERLAP)
        overlap, pairs = engine.overlap, engine.module.scheduled_pairs()
        for step in range(1 + TIMED + WARM_UP + len(TURNS) + 2):
            watched = step == 1 + TIMED + 4
            if watched:
                if dist.get_rank() == 0:  # alone: the other ranks leave the turn out, too
                    overlap.record(Recorder(torch.device("cpu"), regions=False))
                middle = overlap.state()
            sample, known = CommunicationSample(engine), not overlap.calibrating
            settled = known and overlap.comparison is None
            if not watched:
                sample.begin()
            train(engine, 1)
            sample.end()
            seen = sample.take()
            compares = overlap.comparison is not None and pairs[0].schedule.overlap
            assert (seen is not None) == (settled or (known and compares and not watched)), step
            turns += "w" if watched else "-+"[pairs[0].schedule.overlap]
            assert all(pair.schedule == pairs[0].schedule for pair in pairs)
            if watched:
                overlap.record(None)
                engine.eval()
                with torch.no_grad():
                    engine(torch.zeros(2, 12, dtype=torch.int64))
                engine.train()
    assert overlap.comparison is None and all(pair.recorder is SILENT for pair in pairs)
    return turns, overlap, middle


def settled_in_its_middle() -> list[tuple[bool, bool]]:
    """Whether pairs overlap and are silent, in a turn without overlap, and after `settle`."""
    engine = build(overlap=OVERLAP)
    train(engine, 1 + TIMED + WARM_UP)
    pairs, found = engine.module.scheduled_pairs(), []
    for _ in range(2):
        found += sorted({(pair.schedule.overlap, pair.recorder is SILENT) for pair in pairs})
        engine.overlap.settle()
    return found


def noted(with_overlap_ms: float, rank: int) -> Any:
    """Its outcome, and what runs that go on from its checkpoints make of it."""
    turns, overlap, middle = compare(with_overlap_ms, rank)
    assert settled_in_its_middle() == [(False, False), (True, True)]
    went_on = []
    damaged = [{**each, "measured": {"overlap": "perhaps"}} for each in overlap.state()]
    for state in (overlap.state(), middle, damaged):
        again = build(overlap=OVERLAP).overlap
        again.resume(state if dist.get_rank() == 0 else None)
        went_on.append((again.calibrating, again.comparison is not None, again.schedules == overlap.schedules))
    forward = [pair.forward_schedule.overlap for pair in overlap.pairs]
    return turns, overlap.measured, overlap.summary()[-1], forward, schedule_entries(overlap)[0]["measured"], went_on


@pytest.mark.parametrize(("with_overlap_ms", "rank", "kept"), [(125.0, 1, False), (80.0, 0, True), (50.0, 1, True)])
def test_the_faster_way_is_kept(with_overlap_ms: float, rank: int, kept: bool) -> None:
    """The slowest rank's time counts: where one rank loses, the whole job does."""
    results = run_distributed(noted, 2, with_overlap_ms, rank)
    assert results[0][1] == results[1][1], "all ranks decide alike"
    for turns, measured, said, forward, entry, went_on in results:
        after = "+" if kept else "-"
        assert turns == "-" * (1 + TIMED) + "+-" + TURNS[:2] + "w" + TURNS[2:] + after
        assert measured.overlap == kept and measured.speedup == (1.0 if kept else 0.8)
        words = "shows no measurable difference to" if kept else "takes 25 % longer than"
        assert (
            said == f"schedule: overlap {'on' if kept else 'off'}, measured: a micro-batch {words} one without overlap"
        )
        assert entry == measured.model_dump() and set(forward) == {kept}
        # A run that stopped in the comparison has its times, and compares again. A damaged file is measured again.
        assert went_on[0] == (False, False, True) and went_on[1][:2] == (False, True) and went_on[2][0]


def test_passes_of_a_gpu_warm_up() -> None:
    passes = TimedPasses((1, 2, 4), 5, torch.device("cuda"))
    assert (passes.warm_up, passes.timed, passes.text) == (6, 9, "micro-batches 7 to 15")
    assert TimedPasses((1, 2, 4), 30, torch.device("cuda")).timed == 30
    on_cpu = TimedPasses((1, 2), 1, torch.device("cpu"))
    begun = []
    while not on_cpu.is_over:
        begun.append(on_cpu.begin())
    assert [(chunks, recorder is not None) for chunks, recorder in begun] == [(1, False), (1, True), (2, True)]
    assert [recording.chunks for recording in on_cpu.recordings()] == [1, 2]
