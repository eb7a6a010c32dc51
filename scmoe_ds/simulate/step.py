"""From the times of a step's parts to the whole step, on simulated lanes.

A rank computes in one order: all pairs forward, head and loss, all pairs backward, for every micro-batch. All-to-alls
have one lane, gradients' reductions and the gathers of ZeRO-3 another. Every pair has the schedule that the planner
chooses for its times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scmoe_ds.planner.lanes import Lanes, LaneSpan
from scmoe_ds.planner.plan import MIN_GAIN, Plan, Schedule, plan
from scmoe_ds.planner.simulation import Simulated, simulate, total_ms
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.step_program import ALL_TO_ALL, REDUCTIONS, Mode, StepProgram
from scmoe_ds.simulate.times import PairTimes, StepTimes


@dataclass(frozen=True)
class PairStep:
    """What the planner says of a kind of pairs, from shortcut to join.

    Attributes:
        count: like pairs in a row.
        predicted, serial: with the schedule, and without overlap.
    """

    count: int
    schedule: Schedule
    predicted: Simulated
    serial: Simulated


@dataclass(frozen=True)
class Step:
    """A simulated step of the ranks that compute most; milliseconds.

    `total_ms` is the sum of `compute_ms`, `slowed_ms`, `exposed_ms`, `exposed_reduce_ms` and `optimizer_ms`.

    Attributes:
        total_ms: of all micro-batches and the optimizer.
        micro_batch_ms: of a micro-batch as most are: of the first one where there are several, else of the only one.
        compute_ms: computation of all micro-batches.
        slowed_ms: what transfers beside computation add to it.
        exposed_ms: in which the computation stood still for an all-to-all, or for a busier rank to launch it.
        exposed_reduce_ms: the same for reductions of gradients and gathers of parameters.
        communication_ms: duration of all all-to-alls, hidden or not.
        optimizer_ms: the update.
        pairs: by kind, in forward order.
        spans: of the last micro-batch and the update, from 0, if asked for; with two micro-batches on their way, of a
            pass of each. `label` is the number of a pair, −1 outside of pairs.
        busiest: class of the ranks that compute most.
    """

    total_ms: float
    micro_batch_ms: float
    compute_ms: float
    slowed_ms: float
    exposed_ms: float
    exposed_reduce_ms: float
    communication_ms: float
    optimizer_ms: float
    pairs: tuple[PairStep, ...]
    spans: tuple[LaneSpan, ...] = ()
    busiest: int = 0

    @property
    def hidden_share(self) -> float:
        """Share of the all-to-alls that ran beside computation, 0 … 1; 1 if there are none."""
        return max(0.0, 1.0 - self.exposed_ms / self.communication_ms) if self.communication_ms else 1.0


def run_step(
    times: StepTimes,
    layout: Layout,
    mode: Mode = "train",
    spans: bool = False,
    schedules: Sequence[Schedule] | None = None,
) -> Step:
    """Simulates a step.

    Args:
        mode: "forward" is the forward pass of one micro-batch.
        spans: whether to note when everything runs; costs time.
        schedules: one per kind of pairs, in the planner's place.

    Raises:
        ValueError: a schedule that a pair cannot have.
    """
    given: Sequence[Schedule | None] = [None] * len(times.pairs) if schedules is None else schedules
    pairs = tuple(_pair(pair, schedule, mode) for pair, schedule in zip(times.pairs, given, strict=True))
    program = StepProgram(times, layout, [pair.schedule for pair in pairs])
    lanes = program.lanes()
    trains, count = mode == "train", layout.accumulation if mode == "train" else 1
    micro_batch_ms = _run_micro_batches(program, lanes, count, mode, times.in_flight)
    optimizer_ms, update_ms = (times.optimizer_ms, times.update_gather_ms) if trains else (0.0, 0.0)
    compute_ms = [count * ms for ms in program.compute_ms(mode)]
    busiest = compute_ms.index(max(compute_ms))
    exposed_ms, exposed_reduce_ms = (lanes.exposed_ms[lane][busiest] for lane in (ALL_TO_ALL, REDUCTIONS))
    passes_ms = max(lanes.clocks)
    return Step(
        total_ms=passes_ms + optimizer_ms + update_ms,
        micro_batch_ms=micro_batch_ms,
        compute_ms=compute_ms[busiest],
        slowed_ms=max(0.0, passes_ms - compute_ms[busiest] - exposed_ms - exposed_reduce_ms),
        exposed_ms=exposed_ms,
        exposed_reduce_ms=exposed_reduce_ms + update_ms,
        communication_ms=lanes.transfers_ms[ALL_TO_ALL],
        optimizer_ms=optimizer_ms,
        pairs=pairs,
        spans=tuple(_spans(program, mode, times.in_flight, optimizer_ms, update_ms)) if spans else (),
        busiest=busiest,
    )


def _run_micro_batches(program: StepProgram, lanes: Lanes, count: int, mode: Mode, in_flight: int) -> float:
    """Runs all of them; the duration of one as most are, which is the first one."""
    durations: list[float] = []

    def timed(run: Callable[[], None]) -> None:
        start_ms = max(lanes.clocks)
        run()
        durations.append(max(lanes.clocks) - start_ms)

    def one(reduces: bool) -> None:
        program.forward(lanes)
        if mode == "train":
            program.backward(lanes, reduces)

    if in_flight > 1 and count > 1 and mode == "train":
        program.forward(lanes)
        lanes.repeat(lambda _: timed(lambda: program.both(lanes, program.reduces_always)), count - 1)
        program.backward(lanes, True)
    elif program.reduces_always or mode == "forward":
        lanes.repeat(lambda _: timed(lambda: one(True)), count)
    else:
        lanes.repeat(lambda _: timed(lambda: one(False)), count - 1)
        timed(lambda: one(True))
    return durations[0]


def _spans(program: StepProgram, mode: Mode, in_flight: int, optimizer_ms: float, update_ms: float) -> list[LaneSpan]:
    lanes = program.lanes(spans=True)
    if in_flight > 1 and mode == "train":
        program.both(lanes, program.reduces_always)
    else:
        _run_micro_batches(program, lanes, 1, mode, 1)
    lanes.label = -1
    lanes.compute([optimizer_ms] * len(lanes.clocks), "backward", "optimizer")
    lanes.launch(update_ms, "backward", "gather of updated parameters", None, REDUCTIONS)
    lanes.finish(REDUCTIONS, "backward", "gather of updated parameters")
    return [span for span in lanes.spans() if span.end_ms > span.start_ms]


def _pair(pair: PairTimes, schedule: Schedule | None, mode: Mode) -> PairStep:
    # As the calibration does: the slowest rank's times count.
    slowest = max(pair.by_class, key=lambda each: sum(dict(each.chunks[1].experts).values()))
    found = _planned(slowest.model_dump_json(), mode)
    if schedule is None:
        schedule = found.schedule if pair.overlapped else Schedule(1, overlap=False)
    predicted = found.predicted if schedule == found.schedule else simulate(slowest, schedule, mode)
    return PairStep(pair.count, schedule, predicted, found.serial)


@functools.lru_cache(maxsize=4096)
def _planned(times: str, mode: Mode) -> Plan:
    """Points of a search share most of their pairs. Chunks are tried where they can gain what they have to."""
    pair = OperatorTimes.model_validate_json(times)
    unchunked = plan(pair, mode, num_chunks=1)
    most_ms = unchunked.predicted.exposed_ms + _less_computation_ms(pair, mode)
    return unchunked if most_ms < MIN_GAIN * unchunked.predicted.total_ms else plan(pair, mode)


def _less_computation_ms(pair: OperatorTimes, mode: Mode) -> float:
    """By what chunks shorten the experts' computation; measured ones may do so."""
    return max(
        total_ms(pair.chunks[1].experts, mode) - count * total_ms(each.experts, mode)
        for count, each in pair.chunks.items()
    )
