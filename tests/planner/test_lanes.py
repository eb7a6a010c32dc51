"""Simulated lanes against numbers worked out by hand, and against a simulation that goes from moment to moment."""

from __future__ import annotations

import math
import random

import pytest

from scmoe_ds.planner.lanes import Event, Lanes

Program = list[tuple[str, int, list[float], int]]  # what is done, number of a transfer, ms (by class), lane


def run(lanes: Lanes, program: Program) -> Lanes:
    for does, number, ms, lane in program:
        if does == "compute":
            lanes.compute(ms, "forward", "computation")
        elif does == "launch":
            lanes.launch(ms[0], "forward", f"transfer {number}", number, lane)
        else:
            lanes.wait(number, "forward", f"transfer {number}")
    return lanes


def moment_by_moment(program: Program, classes: int, slowed_by: float, shared: bool) -> list[float]:
    """When each class ends: all that runs goes on at its rate until the first part of it is over."""
    place, left, clocks = [0] * classes, [math.nan] * classes, [math.nan] * classes
    launched = {number: 0 for does, number, _, _ in program if does == "launch"}
    queues: dict[int, list[list[float]]] = {0: [], 1: []}
    over: set[float] = set()
    now = 0.0
    while any(math.isnan(clock) for clock in clocks):
        moved = True
        while moved:  # everything that takes no time
            moved = False
            for number in range(classes):
                if not math.isnan(clocks[number]):
                    continue
                if place[number] == len(program):
                    clocks[number], moved = now, True
                    continue
                does, transfer, ms, lane = program[place[number]]
                if does == "compute":
                    if math.isnan(left[number]):
                        left[number] = ms[number]
                    if left[number] > 1e-12:
                        continue
                    left[number] = math.nan
                elif does == "launch":
                    launched[transfer] += 1
                    if launched[transfer] == classes:
                        queues[lane].append([transfer, ms[0]])
                elif transfer not in over:
                    continue
                place[number], moved = place[number] + 1, True
            for queue in queues.values():
                while queue and queue[0][1] <= 1e-12:
                    over.add(queue.pop(0)[0])
                    moved = True
        busy = [queue for queue in queues.values() if queue]
        share = len(busy) if shared else 1
        slow = slowed_by if busy else 1.0
        computing = [number for number in range(classes) if not math.isnan(left[number])]
        steps = [queue[0][1] * share for queue in busy] + [left[number] * slow for number in computing]
        if not steps:
            break
        step = min(steps)
        now += step
        for queue in busy:
            queue[0][1] -= step / share
        for number in computing:
            left[number] -= step / slow
    return clocks


def some_program(rng: random.Random, classes: int) -> Program:
    program: Program = []
    waiting: dict[int, int] = {}
    for number in range(rng.randint(1, 14)):
        lane = rng.randint(0, 1)
        program.append(("compute", -1, [rng.choice([0.0, rng.uniform(0, 3)]) for _ in range(classes)], 0))
        program.append(("launch", number, [rng.choice([0.0, rng.uniform(0, 4)])], lane))
        waiting[number] = lane
        while waiting and rng.random() < 0.4:
            known = rng.choice(list(waiting))
            program.append(("compute", -1, [rng.uniform(0, 2) for _ in range(classes)], 0))
            program.append(("wait", known, [0.0], waiting.pop(known)))
    return program + [("wait", number, [0.0], lane) for number, lane in waiting.items()]


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("slowed_by", [1.0, 1.3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_the_program_is_the_order_of_time(classes: int, slowed_by: float, shared: bool) -> None:
    rng = random.Random(f"{classes} {slowed_by} {shared}")
    for _ in range(60):
        program = some_program(rng, classes)
        lanes = run(Lanes(classes, 2, slowed_by, shared), program)
        assert lanes.clocks == pytest.approx(moment_by_moment(program, classes, slowed_by, shared), abs=1e-8)


def test_two_lanes_share_the_link_by_hand() -> None:
    """10 ms from 0 on, 4 ms from 2 on: both at half the rate until 10, when the shorter one is over."""
    program: Program = [("launch", 0, [10.0], 0), ("compute", -1, [2.0], 0), ("launch", 1, [4.0], 1)]
    waits: Program = [("wait", 1, [0.0], 1), ("wait", 0, [0.0], 0)]
    lanes = run(Lanes(1, 2, spans=True), program + waits)
    assert lanes.clocks == [14]
    assert lanes.exposed_ms == [[4], [8]]
    assert lanes.transfers_ms == [14, 8]
    spans = {span.name: (span.start_ms, span.end_ms) for span in lanes.spans() if span.lane != "wait"}
    assert spans == {"transfer 0": (0, 14), "transfer 1": (2, 10), "computation": (0, 2)}
    assert run(Lanes(1, 2, shared=False), program + waits).clocks == [10]


def test_computation_beside_a_transfer_is_slower_by_hand() -> None:
    """Beside 9 ms of a transfer 6 ms of computation are done; the other 2 take 2."""
    program: Program = [("launch", 0, [9.0], 0), ("compute", -1, [3.0], 0), ("compute", -1, [5.0], 0)]
    assert run(Lanes(1, 1, 1.5), program).clocks == [11]
    assert run(Lanes(1, 2, 1.5), program).clocks == [11]


def test_the_last_class_starts_a_transfer() -> None:
    program: Program = [("compute", -1, [1.0, 4.0], 0), ("launch", 0, [5.0], 0), ("compute", -1, [7.0, 2.0], 0)]
    lanes = run(Lanes(2), [*program, ("wait", 0, [0.0], 0)])
    assert lanes.clocks == [9, 9]
    assert lanes.exposed_ms == [[1, 3]]


def test_the_backward_pass_mirrors_a_program() -> None:
    """Forward 1, launch of 4, 2, wait; backward the gradient is launched first and waited for behind the 2nd of 20."""
    program = [
        Event("compute", "a", (1.0,), (10.0,)),
        Event("launch", "x", (4.0,), (25.0,), 0),
        Event("compute", "b", (2.0,), (20.0,)),
        Event("wait", "x", (4.0,), (25.0,), 0),
    ]
    forward, backward = Lanes(), Lanes()
    forward.run(program, "forward")
    backward.run(program, "backward")
    assert (forward.clocks, forward.exposed_ms) == ([5], [[2]])
    assert (backward.clocks, backward.exposed_ms) == ([35], [[5]])
