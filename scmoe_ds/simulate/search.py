"""The fastest layout of each method that fits into the GPUs' memory.

Every layout of `space.layouts` is priced, but few are run on the simulated lanes. A layout that saves memory and not
time is looked at where its twin does not fit; one whose computation or communication alone takes longer than the best
step so far cannot win.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scmoe_ds.errors import PlanError
from scmoe_ds.planner.simulation import PHASES, Mode, ms_of
from scmoe_ds.planner.times import OperatorTimes, PassTimes
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.memory import Memory, memory_of
from scmoe_ds.simulate.method import METHODS, Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.price import price
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.space import Fixed, layouts, why_not
from scmoe_ds.simulate.step import Step, run_step
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.times import StepTimes
from scmoe_ds.simulate.work import StepWork


@dataclass(frozen=True)
class Run:
    """A method in one layout, and what its step takes."""

    method: Method
    layout: Layout
    memory: Memory
    work: StepWork
    times: StepTimes
    step: Step


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        runs: the fastest of each method that fits, in the order of the methods.
        missing: why another method is not among them, by its name.
        looked_at: layouts in all.
        simulated: of them, those that were run on lanes.
    """

    runs: tuple[Run, ...]
    missing: dict[str, str]
    looked_at: int
    simulated: int


def run(model: Model, method: Method, layout: Layout, machine: Machine, routing: Routing) -> Run:
    """One method in one layout, whether it fits or not."""
    work = step_work(model, method, layout)
    times = price(work, layout, machine, routing)
    return Run(method, layout, memory_of(model, method, layout), work, times, run_step(times, layout, mode_of(layout)))


def mode_of(layout: Layout) -> Literal["train", "forward"]:
    """What the planner of schedules calls the layout's passes."""
    return "train" if layout.training else "forward"


def search(
    model: Model, machine: Machine, routing: Routing, fixed: Fixed, methods: Sequence[Method] = METHODS
) -> Search:
    """The fastest layout of every method.

    Raises:
        PlanError: none of the methods fits with any layout.
    """
    runs, missing, looked_at, simulated = [], dict[str, str](), 0, 0
    least: tuple[float, Layout] | None = None
    for method in methods:
        if reason := why_not(model, method):
            missing[method.name] = reason
            continue
        tried = _Fitting(model, method, machine, layouts(model, method, machine.cluster, fixed))
        looked_at += tried.count
        if tried.smallest is None:
            missing[method.name] = "no layout has the values that are fixed"
            continue
        least = min(least or tried.smallest, tried.smallest, key=lambda each: each[0])
        if not tried.found:
            missing[method.name] = f"it needs at least {tried.smallest[0] / 1e9:.1f} GB per GPU"
            continue
        best, count = _fastest(model, method, machine, routing, tried.found)
        runs.append(best)
        simulated += count
    if not runs:
        raise PlanError(_nothing_fits(model, machine, missing, least))
    return Search(tuple(runs), missing, looked_at, simulated)


def _nothing_fits(model: Model, machine: Machine, missing: dict[str, str], least: tuple[float, Layout] | None) -> str:
    if least is None:
        return f"{model.name}: no method runs it: " + "; ".join(f"{name}: {why}" for name, why in missing.items())
    needs, layout = least
    there = machine.cluster.gpu.memory
    return (
        f"{model.name}: fits into no layout of {layout.world} GPUs with {there / 1e9:.1f} GB; the smallest, "
        f"{layout_text(layout)}, needs {needs / 1e9:.1f} GB per GPU, {(needs - there) / 1e9:.1f} GB more: take more "
        "GPUs, larger ones, or a smaller model"
    )


def layout_text(layout: Layout) -> str:
    """A layout in a few words: "EP 8 · TP 1 · ZeRO-1 · 4 × 8"; the last are micro-batch and accumulation."""
    parts = [f"EP {layout.expert_parallel}", f"TP {layout.tensor_parallel}", f"ZeRO-{layout.zero_stage}"]
    parts += [f"{layout.micro_batch} × {layout.accumulation}"]
    parts += [f"recompute {layout.recompute}"] if layout.recompute else []
    parts += ["hierarchical"] * layout.hierarchical
    return " · ".join(parts)


class _Fitting:
    """The layouts that fit, without those whose faster twin fits, too: less recomputation, ZeRO-1 instead of 2.

    Attributes:
        found: with their memory.
        smallest: bytes and layout of the one that needs least, of those that were looked at; None: there is none.
        count: of all layouts.
    """

    def __init__(self, model: Model, method: Method, machine: Machine, everything: Iterable[Layout]) -> None:
        twins: dict[Layout, list[Layout]] = {}
        self.found: list[tuple[Memory, Layout]] = []
        self.smallest: tuple[float, Layout] | None = None
        self.count = 0
        for layout in everything:
            self.count += 1
            fitting = twins.setdefault(replace(layout, recompute=False, zero_stage=0), [])
            if any(_is_faster(twin, layout) for twin in fitting):
                continue
            memory = memory_of(model, method, layout)
            if self.smallest is None or memory.total < self.smallest[0]:
                self.smallest = memory.total, layout
            if memory.total <= machine.cluster.gpu.memory:
                fitting.append(layout)
                self.found.append((memory, layout))


_RECOMPUTED = (False, "selective", "full")
"""From least to most."""


def _is_faster(twin: Layout, layout: Layout) -> bool:
    """Whether a layout does nothing that its twin does not.

    ZeRO-0 updates all parameters on every rank, others not. ZeRO-3 reduces beside the backward pass by default.
    """
    fewer = twin.zero_stage == layout.zero_stage or (twin.zero_stage, layout.zero_stage) == (1, 2)
    return fewer and _RECOMPUTED.index(twin.recompute) <= _RECOMPUTED.index(layout.recompute)


def _fastest(
    model: Model,
    method: Method,
    machine: Machine,
    routing: Routing,
    fitting: Sequence[tuple[Memory, Layout]],
) -> tuple[Run, int]:
    """The fastest, and how many were simulated. Among equals the first wins, whose groups are smallest."""
    priced = []
    for memory, layout in fitting:
        work = step_work(model, method, layout)
        times = price(work, layout, machine, routing)
        priced.append((least_ms(times, layout), memory, layout, work, times))
    priced.sort(key=lambda each: each[0])
    best, simulated = None, 0
    for bound, memory, layout, work, times in priced:
        if best is not None and bound >= best.step.total_ms:
            break
        found = Run(method, layout, memory, work, times, run_step(times, layout, mode_of(layout)))
        simulated += 1
        if best is None or found.step.total_ms < best.step.total_ms:
            best = found
    assert best is not None
    return best, simulated


def least_ms(times: StepTimes, layout: Layout) -> float:
    """No step of these times is shorter: all that one class of ranks computes and waits for, or all transfers."""
    mode = mode_of(layout)
    around = _ms(times.first, mode) + _ms(times.last, mode)
    of_classes = []
    for place in range(len(times.shares)):
        busy = transfers = 0.0
        for pair in times.pairs:
            of_class = pair.by_class[place]
            sent = pair.count * _transfers_ms(of_class, mode)
            busy += pair.count * (_ms(pair.before, mode) + _compute_ms(of_class, mode))
            busy += 0.0 if pair.overlapped or times.in_flight > 1 else sent
            transfers += sent
        of_classes.append(around + max(busy, transfers))
    micro_batches = max(of_classes) * layout.accumulation
    return micro_batches + (times.optimizer_ms if layout.training else 0.0)


def _ms(times: PassTimes, mode: Mode) -> float:
    return sum(ms_of(times, phase) for phase in PHASES[mode])


def _compute_ms(times: OperatorTimes, mode: Mode) -> float:
    outside = [times.gate, times.encode, times.decode, *times.backbone]
    experts = min(count * _ms(chunk.experts, mode) for count, chunk in times.chunks.items())
    return sum(_ms(each, mode) for each in outside) + experts


def _transfers_ms(times: OperatorTimes, mode: Mode) -> float:
    return min(count * (_ms(each.dispatch, mode) + _ms(each.combine, mode)) for count, each in times.chunks.items())
