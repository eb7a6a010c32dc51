"""The search finds what trying all layouts finds; intervals, break-even, scaling and sentences follow from its runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from scmoe_ds.errors import PlanError
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.advice import against, chosen, limit, recommendation, shares
from scmoe_ds.simulate.answers import answer
from scmoe_ds.simulate.break_even import PAYS, around, break_even, with_links
from scmoe_ds.simulate.cluster import Cluster, Curve
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.memory import memory_of
from scmoe_ds.simulate.method import (
    AUTOEP,
    DEEPSPEED_TOPK,
    METHODS,
    PIPELINED,
    SCMOE,
    SCMOE_LATE,
    SHARED,
    TWO_IN_FLIGHT,
)
from scmoe_ds.simulate.model import Experts, Model, Stage
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.rows import Interval, machines, rows
from scmoe_ds.simulate.scaling import first_that_does_not_fit, of_size, scaling
from scmoe_ds.simulate.search import least_ms, run, search
from scmoe_ds.simulate.space import Fixed, layouts, require_possible, why_not
from tests.simulate.clusters import cluster

POS2 = SCMOE[1]


def model(every: int = 2, top_k: int = 2, **changed: Any) -> Model:
    """Four blocks of a GPT."""
    stage = Stage(
        layers=4,
        hidden=256,
        tokens=256,
        span=256,
        heads=4,
        kv_heads=4,
        head_dim=64,
        mlp_hidden=1024,
        moe_layers=tuple(range(every - 1, 4, every)),
        experts=Experts(num_experts=8, hidden=1024, top_k=top_k),
    )
    return Model(name="a GPT", stages=(stage,), vocabulary=1024, positions=256, **changed)


def of_memory(gigabytes: float, nodes: int = 2, gpus_per_node: int = 2, **changed: Any) -> Cluster:
    return cluster(nodes, gpus_per_node, memory=gigabytes * 1e9, **changed)


def smallest(asked: Model, method: Any, here: Cluster, fixed: Fixed) -> float:
    return min(memory_of(asked, method, each).total for each in layouts(asked, method, here, fixed))


@pytest.mark.parametrize("method", [DEEPSPEED_TOPK, AUTOEP, PIPELINED, POS2], ids=lambda each: each.name)
@pytest.mark.parametrize("room", [1.0, 1.02, 1e3])
def test_it_finds_what_trying_all_finds(method: Any, room: float) -> None:
    """With no more memory than the smallest layout needs, with hardly more, and with plenty.

    AutoEP's models have ZeRO-3, which needs less memory and can still be faster: it reduces beside the backward pass.
    """
    fixed = Fixed(batch=16)
    asked = model(autoep=method is AUTOEP)
    least = smallest(asked, method, of_memory(80), fixed)
    here = of_memory(room * least / 1e9 + 1e-9)
    machine = machine_of(here)
    fitting = [
        each for each in layouts(asked, method, here, fixed) if memory_of(asked, method, each).total <= here.gpu.memory
    ]
    best = min(run(asked, method, each, machine, Routing()).step.total_ms for each in fitting)
    found = search(asked, machine, Routing(), fixed, [method])
    assert found.runs[0].step.total_ms == pytest.approx(best, rel=1e-12)
    assert found.runs[0].memory.total <= here.gpu.memory
    assert found.simulated < found.looked_at


@pytest.mark.parametrize(
    ("preset", "method"), [("swinv2-moe-s", SCMOE[0]), ("gpt2-moe-small", TWO_IN_FLIGHT), ("gpt2-moe-small", SHARED)]
)
def test_no_step_is_shorter_than_its_bound(preset: str, method: Any) -> None:
    """The last MoE of a Swin hides nothing beside others that do; two micro-batches hide what one does not."""
    machine = machine_of(of_memory(80, between={"nic_rate": 1e11}))
    layout = Layout(4, expert_parallel=4, micro_batch=8, accumulation=8)
    found = run(model_of_preset(preset), method, layout, machine, Routing())
    assert 0 < least_ms(found.times, layout) <= found.step.total_ms


def test_what_fits_nowhere_is_a_sentence_with_the_least_memory() -> None:
    fixed = Fixed(batch=16)
    methods = [DEEPSPEED_TOPK, POS2]
    least = min(smallest(model(), each, of_memory(80), fixed) for each in methods)
    with pytest.raises(PlanError, match=rf"4 GPUs with 0\.0 GB; the smallest, EP .*, needs {least / 1e9:.1f} GB"):
        search(model(), machine_of(of_memory(1e-3)), Routing(), fixed, methods)


@pytest.mark.parametrize(
    ("asked", "method", "reason"),
    [
        (model(), AUTOEP, "AutoEP distributes Hugging Face models alone"),
        (model(autoep=True), DEEPSPEED_TOPK, "AutoEP's layers take the place"),
        (model(autoep=True), SHARED, "as it is, or as a ScMoE"),
        (model(top_k=1), POS2, "routes a token to one expert"),
        (model(every=1), POS2, "every block has an MoE"),
        (model(every=1), SCMOE[0], None),
        (model(), POS2, None),
    ],
)
def test_methods_that_cannot_run_have_a_reason(asked: Model, method: Any, reason: str | None) -> None:
    found = why_not(asked, method)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (Fixed(16, expert_parallel=3), r"--expert-parallel 3 \(.*possible: 1, 2, 4$"),
        (Fixed(16, tensor_parallel=3), r"--tensor-parallel 3: .*possible: 1, 2$"),
        (Fixed(16, zero_stage=3), r"--zero-stage 3 \(.*possible: 1, 2$"),
        (Fixed(15), r"--global-batch-size 15 \(.*try 16$"),
        (Fixed(16, micro_batch=3), r"--micro-batch 3 \(.*1, 2, 4, 8$"),
    ],
)
def test_values_that_nothing_can_have(fixed: Fixed, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        require_possible(model(), of_memory(80), fixed)


def test_layouts_are_what_runs_here() -> None:
    fixed = Fixed(batch=16)

    def values(asked: Model, method: Any, name: str) -> set[Any]:
        return {getattr(each, name) for each in layouts(asked, method, of_memory(80), fixed)}

    assert values(model(), POS2, "zero_stage") == {1, 2}
    assert values(model(autoep=True), AUTOEP, "zero_stage") == {1, 2, 3}
    assert values(model(autoep=True), AUTOEP, "tensor_parallel") == {1}
    assert values(model(), POS2, "recompute") == {False, "selective", "full"}
    assert values(model(), SCMOE_LATE[1], "recompute") == {False, "selective"}
    assert values(model(), POS2, "copies") == {"rank"} and values(model(), DEEPSPEED_TOPK, "copies") == {"choice"}
    everything = list(layouts(model(), POS2, of_memory(80), fixed))
    assert len(set(everything)) == len(everything)
    assert all(each.micro_batch * each.accumulation * each.data_parallel == 16 for each in everything)
    assert values(model(), POS2, "hierarchical") == {False, True}  # its GPUs are processes on a CPU
    on_gpus = layouts(model(), POS2, of_memory(80, capability=(8, 0)), fixed)
    assert {each.hierarchical for each in on_gpus} == {False}


UNSURE = {"efficiency": Curve(points=((1.0, 0.5),), spread=0.1), "latency": 1e-9}


def slow_links(factor: float = 1.0) -> Cluster:
    return of_memory(80, inside=UNSURE, between={**UNSURE, "nic_rate": 2e10 * factor}, spread=0.2)


def test_intervals_hold_their_numbers_and_the_first_row_is_the_measure() -> None:
    likely, *corners = machines(slow_links(), None)
    found = search(model(), likely, Routing(), Fixed(16), [DEEPSPEED_TOPK, PIPELINED, POS2])
    table = rows(model(), found.runs, corners, Routing(), tokens=1e9)
    for row in table:
        for each in (row.step_ms, row.tokens_per_second, row.mfu, row.exposed_share, row.speedup, row.gpu_hours):
            assert each.low <= each.likely <= each.high
        assert row.step_ms.low < row.step_ms.likely < row.step_ms.high
        tokens = 16 * 256 / row.step_ms.likely * 1e3
        assert row.tokens_per_second.likely == pytest.approx(tokens)
        assert row.gpu_hours.likely == pytest.approx(1e9 / tokens * 4 / 3600)
    assert table[0].speedup == Interval(1.0, 1.0, 1.0)
    assert table[2].speedup.likely == pytest.approx(table[0].step_ms.likely / table[2].step_ms.likely)
    assert sum(shares(table[2].run).values()) == pytest.approx(1.0)
    assert limit(table[2].run).startswith("ScMoE Pos-2 is limited by ")


def test_the_recommendation_is_as_sure_as_the_numbers() -> None:
    likely, *corners = machines(slow_links(0.5), None)
    found = search(model(), likely, Routing(), Fixed(16, expert_parallel=4), [DEEPSPEED_TOPK, SHARED, POS2])
    table = rows(model(), found.runs, corners, Routing(), tokens=1e9)
    row, other = chosen(table), table[1]
    assert row.name == "ScMoE Pos-2"
    gain = against(row, other)
    assert gain.low > 1.01
    assert recommendation(table).startswith("take ScMoE Pos-2 (EP ")
    assert "less than what is not known" not in recommendation(table)
    unsure = replace(other, steps_ms=(other.steps_ms[0], *(each / 2 for each in row.steps_ms[1:])))
    assert "less than what is not known" in recommendation([table[0], unsure, row])


def test_break_even_lies_between_a_rate_that_pays_and_one_that_does_not() -> None:
    machine = machine_of(slow_links())
    found = search(model(), machine, Routing(), Fixed(16, expert_parallel=4), [SHARED, POS2])
    there = break_even(model(), found.runs, machine, Routing(), "network")
    assert there is not None and 0 < there.scmoe < float("inf") and there.rate == 2e10

    def gain(factor: float) -> float:
        at = with_links(machine, "network", factor)
        ms = {
            each.method.name: run(model(), each.method, each.layout, at, Routing()).step.total_ms for each in found.runs
        }
        ours = ms.pop("ScMoE Pos-2")
        return min(ms.values()) / ours

    assert gain(there.scmoe * 0.95) >= PAYS > gain(there.scmoe * 1.05)
    assert gain(there.best) == pytest.approx(there.gain)
    alone = machine_of(of_memory(80, nodes=1))
    assert break_even(model(), found.runs[:1], machine, Routing(), "network") is None, "there is no ScMoE"
    assert break_even(model(), found.runs, alone, Routing(), "network") is None, "there is no network"


@pytest.mark.parametrize(("low", "high"), [(0.3, 5.0), (0.0, 5.0), (0.3, 1e9), (0.0, 1e9)])
def test_a_break_even_has_two_ends_where_slower_links_hide_the_gain(low: float, high: float) -> None:
    def gain(factor: float) -> float:
        return 1.1 if low <= factor <= high else 1.0

    least, most = around(1.0, gain, {4.0**power: gain(4.0**power) for power in range(-3, 4)})
    assert least == pytest.approx(low, rel=0.02)
    assert most == (pytest.approx(high, rel=0.02) if high < 64 else float("inf"))


def test_scaling_keeps_the_batch_or_lets_it_grow() -> None:
    here, fixed = slow_links(), Fixed(16)
    found = search(model(), machine_of(here), Routing(), fixed, [DEEPSPEED_TOPK, POS2])
    weak, strong = (
        scaling(model(), here, None, Routing(), fixed, found.runs, [1, 2, 4, 8, 32], weak=each)
        for each in (True, False)
    )
    assert [(each.gpus, each.batch) for each in weak] == [(1, 4), (2, 8), (4, 16), (8, 32), (32, 128)]
    assert [each.batch for each in strong] == [16] * 4, "32 ranks have less than a sample each"
    assert strong[0].runs[1].step.total_ms > strong[-1].runs[1].step.total_ms
    assert weak[0].efficiency == 1.0
    assert weak[2].runs[1].step.total_ms == pytest.approx(found.runs[1].step.total_ms)
    first = first_that_does_not_fit(weak)
    assert first is None or all(each.exposed_share <= 0.01 for each, _ in pairwise(weak) if each.gpus < first.gpus)
    assert of_size(here, 8).nodes == 4 and of_size(here, 1).gpus_per_node == 1
    with pytest.raises(PlanError, match="--scale 5: must be a number of whole nodes of 2 GPUs"):
        of_size(here, 5)
    with pytest.raises(PlanError, match="no network between nodes"):
        of_size(of_memory(80, nodes=1), 4)


def test_everything_at_once() -> None:
    found = answer(model(), slow_links(), None, Routing(), Fixed(16, Layout(1), 4, 1, 1, 2), tokens=1e9, sizes=[4])
    assert [each.name for each in found.rows] == [each.name for each in METHODS if not why_not(model(), each)]
    assert found.search.missing.keys() == {"AutoEP"}
    assert {each.links for each in found.break_even} == {"network", "inside"}
    assert len(found.weak) == len(found.strong) == 1
    ratio = found.rows[0].step_ms.likely / found.rows[-1].step_ms.likely
    assert found.rows[-1].speedup.likely == pytest.approx(ratio)
