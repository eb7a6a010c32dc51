"""Work to times, against sums written down here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from scmoe_ds.simulate.collectives import all_to_all_ms, reduce_ms
from scmoe_ds.simulate.kernels import kernel_ms
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.price import price
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.work import Exchange, Kernel, PairWork, Parameters, Reduced, StepWork, Work
from tests.simulate.clusters import machine

SCMOE = Method("ScMoE", "scmoe", position="pos2", most_chunks=8)
EVEN = Routing(skew=1.0)


def product(rows: int, inner: int, columns: int, **changed: Any) -> Kernel:
    numbers = rows * inner + inner * columns + rows * columns
    return Kernel("product", 2.0 * rows * inner * columns, 2.0 * numbers, (rows, inner, columns), **changed)


def step_work(exchange: Exchange | None = None, method: Method = SCMOE, count: int = 3) -> StepWork:
    forward = (product(1024, 512, 2048),)
    backward = (product(1024, 2048, 512), product(512, 1024, 2048, tokens=1))
    moved = Kernel("pointwise", bytes=1e7)
    operators = [Work(name, (moved,), (moved, moved)) for name in ("mlp", "attention", "shared")]
    pair = PairWork(
        method=method,
        count=count,
        before=(Work("attention 0", (moved,), (moved,)),) * 2,
        gate=Work("gate", (moved,)),
        encode=Work("encode", (moved,)),
        backbone=tuple(operators),
        experts=Work("experts", forward, backward),
        decode=Work("decode", (moved,)),
        exchange=exchange,
        parameters=Parameters(dense=1e7, experts=2e7),
        num_experts=8,
    )
    return StepWork((pair,), Work("first", (moved,)), Work("last", (moved,)), Parameters(1e6), 1024.0, 1e12)


EXCHANGE = Exchange(1024.0, 1, 1024.0, padded=False)
LAYOUT = Layout(world=8, expert_parallel=8)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def test_one_gpu_sends_nothing() -> None:
    times = price(step_work(), Layout(world=1), machine(1, 1), Routing())
    assert times.pairs[0].reduce_ms == times.outside_reduce_ms == times.update_gather_ms == 0.0
    assert set(times.parts) == {"memory", "compute"} and times.shares == (1.0,)


def test_operators_are_sums_of_their_parts() -> None:
    times = price(step_work(), Layout(world=8), machine(), EVEN)
    (pair,) = times.pairs
    assert (pair.count, pair.before.forward_ms, pair.before.backward_ms) == (3, close(0.02), close(0.02))
    (ranks,) = pair.by_class
    assert [each.name for each in ranks.backbone] == ["mlp", "attention", "shared"]
    assert (ranks.backbone[0].forward_ms, ranks.backbone[0].backward_ms) == (close(0.01), close(0.02))
    assert list(ranks.chunks) == [1] and ranks.chunks[1].dispatch.forward_ms == 0.0
    flops = 2 * 1024 * 512 * 2048
    assert ranks.chunks[1].experts.forward_ms == close(1e3 * flops / 1e14)
    assert ranks.chunks[1].experts.backward_ms == close(1e3 * 2 * flops / 1e14)
    assert times.shares == (1.0,)


def test_gradients_of_micro_batches_are_summed() -> None:
    """All but the first micro-batch read the sum and their own gradient, and write the sum; bf16."""
    one, four = (price(step_work(), Layout(world=8, accumulation=steps), machine(), EVEN) for steps in (1, 4))
    sums = 0.75 * kernel_ms(Kernel("pointwise", bytes=3 * 3e7 * 2), machine(), "bf16")[0]
    assert four.pairs[0].before.backward_ms == close(one.pairs[0].before.backward_ms + sums)
    assert four.pairs[0].before.forward_ms == one.pairs[0].before.forward_ms
    assert four.parts["memory"] > one.parts["memory"] + 3 * sums


def test_what_bounds_a_micro_batch_adds_up() -> None:
    times = price(step_work(EXCHANGE), LAYOUT, machine(), EVEN)
    pair = times.pairs[0].by_class[0]
    parts = [pair.gate, pair.encode, pair.decode, *pair.backbone, times.pairs[0].before]
    memory = 3 * sum(each.forward_ms + each.backward_ms for each in parts)
    memory += times.first.forward_ms + times.last.forward_ms
    assert times.parts["memory"] == close(memory)
    assert times.parts["compute"] == close(3 * (pair.chunks[1].experts.forward_ms * 3))
    assert times.parts["NIC"] == close(3 * 4 * pair.chunks[1].dispatch.forward_ms)


def test_chunks_repeat_latencies_launches_and_the_reading_of_weights() -> None:
    priced = machine(bandwidth=1e11, launch=0.0)  # experts are bound by memory
    pair = price(step_work(EXCHANGE), LAYOUT, priced, EVEN).pairs[0].by_class[0]
    assert list(pair.chunks) == [1, 2, 4, 8]
    for count, chunk in pair.chunks.items():
        assert chunk.dispatch.forward_ms == all_to_all_ms(EXCHANGE, LAYOUT, priced, 8, chunks=count)[0]
        rows, inner, columns = 1024 // count, 512, 2048
        numbers = rows * inner + inner * columns + rows * columns
        assert chunk.experts.forward_ms == close(1e3 * 2 * numbers / 1e11)
        added = 1e3 * 3 * 2 * inner * columns * (count - 1) / count / 1e11  # to the gradient of earlier chunks
        assert chunk.experts.backward_ms == close(2 * chunk.experts.forward_ms + added)
    launched = price(step_work(EXCHANGE), LAYOUT, machine(launch=1e-3), EVEN).pairs[0].by_class[0]
    assert [each.experts.backward_ms for each in launched.chunks.values()] == [close(2.0), *[close(3.0)] * 3]


def test_most_chunks_of_the_method() -> None:
    method = dataclasses.replace(SCMOE, most_chunks=1, overlap=False)
    times = price(step_work(EXCHANGE, method), LAYOUT, machine(), EVEN)
    assert list(times.pairs[0].by_class[0].chunks) == [1] and not times.pairs[0].overlapped


def test_the_busiest_ranks_are_a_class() -> None:
    times = price(step_work(EXCHANGE), LAYOUT, machine(), Routing(skew=2.0))
    even = price(step_work(EXCHANGE), LAYOUT, machine(), EVEN).pairs[0].by_class[0].chunks[1]
    busiest, others = (each.chunks[1] for each in times.pairs[0].by_class)
    assert times.shares == (close(1 / 8), close(7 / 8))
    assert busiest.experts.forward_ms == close(2 * even.experts.forward_ms)
    assert others.experts.forward_ms == pytest.approx(6 / 7 * even.experts.forward_ms, rel=1e-3)
    assert busiest.dispatch == others.dispatch and busiest.dispatch.forward_ms > even.dispatch.forward_ms
    padded = price(step_work(dataclasses.replace(EXCHANGE, padded=True)), LAYOUT, machine(), Routing(skew=2.0))
    assert padded.shares == times.shares and len(padded.pairs[0].by_class) == 2
    assert {each.chunks[1].experts for each in padded.pairs[0].by_class} == {even.experts}


def test_recomputation_of_pairs_is_the_steps_and_its_parts_count_twice() -> None:
    work = step_work(EXCHANGE)
    repeated = dataclasses.replace(work, pairs=(dataclasses.replace(work.pairs[0], repeated=True),))
    once, again = price(work, LAYOUT, machine(), EVEN), price(repeated, LAYOUT, machine(), EVEN)
    assert again.pairs == (dataclasses.replace(once.pairs[0], repeated=True),)
    experts_ms = 3 * once.pairs[0].by_class[0].chunks[1].experts.forward_ms
    assert again.parts["compute"] == close(once.parts["compute"] + experts_ms)
    transfers_ms = 2 * 3 * once.pairs[0].by_class[0].chunks[1].dispatch.forward_ms
    assert again.parts["NIC"] == close(once.parts["NIC"] + transfers_ms)


def test_reductions_share_the_link_of_all_to_alls_unless_these_stay_inside_nodes() -> None:
    def shares(world: int, expert_parallel: int) -> bool:
        return price(step_work(EXCHANGE), Layout(world, expert_parallel), machine(nodes=2), EVEN).shared_link

    assert shares(8, 8) and shares(4, 4) and not shares(8, 4), "4 GPUs per node"


def test_a_forward_pass_alone() -> None:
    times = price(step_work(EXCHANGE), dataclasses.replace(LAYOUT, training=False), machine(), EVEN)
    pair = times.pairs[0]
    assert pair.before.backward_ms == pair.by_class[0].chunks[1].dispatch.backward_ms == 0.0
    assert pair.reduce_ms == times.optimizer_ms == times.update_gather_ms == times.outside_reduce_ms == 0.0
    assert times.parts["compute"] == close(3 * pair.by_class[0].chunks[1].experts.forward_ms)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_and_parameters_by_stage(stage: int) -> None:
    layout, priced = Layout(world=8, expert_parallel=4, zero_stage=stage), machine()
    times = price(step_work(EXCHANGE), layout, priced, EVEN)
    collective: Any = "reduce-scatter" if stage == 3 else "all-reduce"
    dense = reduce_ms(collective, 2e7, "dp", layout, priced)[0]
    experts = reduce_ms(collective, 4e7, "edp", layout, priced)[0]
    assert times.pairs[0].reduce_ms == close(dense + experts)
    assert (times.pairs[0].gather_ms > 0) == (times.outside_gather_ms > 0) == (stage == 3)
    gathered = [
        reduce_ms("all-gather", size, group, layout, priced)[0] for size, group in ((6.2e7, "dp"), (1.2e8, "edp"))
    ]  # type: ignore[arg-type]
    assert times.update_gather_ms == (close(sum(gathered)) if stage in (1, 2) else 0.0)
    own = 3.1e7 + 6e7 if stage == 0 else 3.1e7 / 8 + 6e7 / 2  # parameters
    assert times.optimizer_ms == close(1e3 * own * 40 / 1e12)


def test_collectives_inside_an_operator_are_waited_for() -> None:
    layout = Layout(world=8, tensor_parallel=4)
    reduced = Reduced("all-reduce", "tp", 1e7)
    work = dataclasses.replace(step_work(), first=Work("first", (Kernel("pointwise", bytes=1e7), reduced), (reduced,)))
    times = price(work, layout, machine(), EVEN)
    own = reduce_ms("all-reduce", 1e7, "tp", layout, machine())[0]
    assert (times.first.forward_ms, times.first.backward_ms) == (close(0.01 + own), close(own))
    assert times.parts["link"] == close(2 * own)


def test_counts_ahead_belong_to_the_encoding() -> None:
    counted = price(step_work(dataclasses.replace(EXCHANGE, count_bytes=64.0)), LAYOUT, machine(), EVEN)
    plain = price(step_work(EXCHANGE), LAYOUT, machine(), EVEN)
    encode, without = counted.pairs[0].by_class[0].encode, plain.pairs[0].by_class[0].encode
    assert encode.forward_ms > without.forward_ms + 0.04 and encode.backward_ms == without.backward_ms


def test_late_operators_are_those_of_the_backbone() -> None:
    work = step_work(EXCHANGE)
    late = dataclasses.replace(work.pairs[0], late=("mlp",), late_after_dispatch=True)
    times = price(dataclasses.replace(work, pairs=(late,)), LAYOUT, machine(), EVEN).pairs[0].by_class[0]
    assert times.late is not None and times.late.operators == times.backbone[:1] and times.is_periodic


def test_a_slower_gpu_takes_longer() -> None:
    (kernel,) = step_work().pairs[0].experts.forward
    assert isinstance(kernel, Kernel)
    assert kernel_ms(kernel, machine(peak={"bf16": 1e13}), "bf16")[0] == close(
        10 * kernel_ms(kernel, machine(), "bf16")[0]
    )
