"""Work of a rank against closed forms, the model's own operations, and launches that are counted elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from lab import gpu_budgets
from scmoe_ds.errors import ModelError
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.memory import memory_of
from scmoe_ds.simulate.method import AUTOEP, DEEPSPEED_TOPK, METHODS, SCMOE, Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.model_flops import forward_flops
from scmoe_ds.simulate.refusals import refusal
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.work import Kernel, PairWork, Part, StepWork, Work

MEDIUM = model_of_preset("gpt2-moe-medium")
POS2 = SCMOE[1]


def works(pair: PairWork) -> list[Work]:
    return [*pair.before, pair.gate, pair.encode, *pair.backbone, pair.experts, pair.decode]


def kernels(parts: Iterable[Part]) -> list[Kernel]:
    return [part for part in parts if isinstance(part, Kernel)]


def flops(work: StepWork) -> float:
    """Of a forward pass."""
    pairs = sum(
        pair.count * each.flops for pair in work.pairs for part in works(pair) for each in kernels(part.forward)
    )
    return pairs + sum(each.flops for each in kernels((*work.first.forward, *work.last.forward)))


@pytest.mark.parametrize("preset", ["gpt2-moe-small", "llama2-moe", "swinv2-moe-b"])
def test_exact_rows_take_the_operations_of_the_model(preset: str) -> None:
    """Every product is counted once, whoever computes it. A Swin's last stage is padded: there a ScMoE keeps top-2."""
    model = model_of_preset(preset)
    layout = Layout(8, expert_parallel=4, micro_batch=2)
    for method in METHODS:
        if refusal(model, method, layout) or (model.images and method.architecture == "scmoe"):
            continue
        counted, needed = flops(step_work(model, method, layout)), 2 * forward_flops(model, method)
        if method.dispatch == "padded":
            assert counted > 1.05 * needed
        else:
            assert counted == pytest.approx(needed, rel=5e-3)  # Swin's network for position biases


def test_the_launches_of_a_pair_are_those_of_the_simulated_gpu() -> None:
    """The budgets are for two local experts on each of two ranks, top-1, bf16, without dropout."""
    model = MEDIUM.model_copy(update={"dropout": 0.0, "stages": (_with_experts(MEDIUM, 4),)})
    (pair,) = step_work(model, POS2, Layout(2, expert_parallel=2)).pairs
    forward = sum(each.launches for part in works(pair) for each in kernels(part.forward))
    backward = sum(each.launches for part in works(pair) for each in kernels(part.backward))
    assert forward == pytest.approx(gpu_budgets.LAUNCHES_FORWARD, rel=0.1)
    assert backward == pytest.approx(gpu_budgets.LAUNCHES_BACKWARD, rel=0.1)


def _with_experts(model: Model, number: int) -> Any:
    (stage,) = model.stages
    assert stage.experts is not None
    return stage.model_copy(update={"experts": stage.experts.model_copy(update={"num_experts": number})})


def test_rows_that_travel_follow_from_the_routing() -> None:
    tokens, row = 8 * 2048, 2 * 1024
    alone = step_work(MEDIUM, POS2, Layout(4)).pairs[0]
    assert alone.exchange is None
    layout = Layout(16, expert_parallel=16, micro_batch=8)
    (exact,) = step_work(MEDIUM, POS2, layout).pairs
    assert exact.exchange is not None
    assert (exact.exchange.rows, exact.exchange.row_bytes, exact.exchange.padded) == (tokens, row, False)
    (padded,) = step_work(MEDIUM, DEEPSPEED_TOPK, layout).pairs
    assert padded.exchange is not None
    assert padded.exchange.rows == 16 * (tokens / 16 * 2 * 2.0)
    (halves,) = step_work(MEDIUM, replace(POS2, routed=2), replace(layout, world=32, tensor_parallel=2)).pairs
    assert halves.exchange is not None
    assert (halves.exchange.rows, halves.exchange.combine_rows) == (tokens, 2 * tokens)
    (autoep,) = step_work(MEDIUM, AUTOEP, layout).pairs
    assert autoep.exchange is not None and autoep.exchange.rows == 2 * tokens and autoep.exchange.choices == 1


def test_a_token_of_two_experts_travels_twice_where_each_rank_has_one() -> None:
    model = MEDIUM.model_copy(update={"stages": (_with_experts(MEDIUM, 16),)})
    one_each, two_each = (
        Ground(model, model.stages[0], replace(POS2, routed=2), Layout(16, expert_parallel=ranks)) for ranks in (16, 8)
    )
    assert one_each.copies == pytest.approx(2 * one_each.rows)
    assert two_each.copies == pytest.approx((2 - 1 / 15) * two_each.rows)


def test_parts_get_the_rows_of_their_expert() -> None:
    """Bytes and memory are those of `scmoe check` on 8 ranks of gpt2-moe-small, per layer and micro-batch of a step."""
    model, tokens = model_of_preset("gpt2-moe-small"), 32 * 1024
    for ranks, experts, parts, sent_gb, peak_gb in (
        (8, 8, 1, 0.176, 34.2),
        (8, 8, 2, 0.176, 34.8),  # a row goes once to the rank that has both parts
        (4, 8, 2, 0.151, 34.9),
        (8, 4, 2, 0.352, 34.6),  # each part is another rank's
        (8, 4, 4, 0.352, 35.8),
        (8, 8, 3, 0.176, 35.4),
    ):
        layout = Layout(8, expert_parallel=ranks, micro_batch=32, accumulation=2, reduce_bucket=200_000_000)
        of_stage = {"stages": (_with_experts(model, experts),)}
        method = replace(POS2, routed=1, parts=parts)
        (pair,) = step_work(model.model_copy(update=of_stage), method, layout).pairs
        assert pair.exchange is not None and pair.exchange.rows == parts * tokens
        ground = Ground(model.model_copy(update=of_stage), of_stage["stages"][0], method, layout)
        others = 4 * ground.copies * (1 - 1 / ranks) * 768 * 2 / 1e9  # both ways, and their gradients
        assert others == pytest.approx(sent_gb, abs=5e-4)
        assert sum(each.flops for each in kernels(pair.experts.forward)) == 2 * tokens * 2 * 768 * 3072
        memory = memory_of(model.model_copy(update=of_stage), method, layout)
        assert memory.tensors / 1e9 == pytest.approx(peak_gb, rel=0.005)


def test_parts_over_tensor_parallel_ranks_are_rows_of_their_own() -> None:
    """S-ETP: each rank sends a half of its choices, and gets all results; bytes and memory of `scmoe check`."""
    model = model_of_preset("gpt2-moe-small")
    layout = Layout(8, 8, 2, micro_batch=32, accumulation=4, reduce_bucket=200_000_000)
    method = replace(POS2, routed=1, parts=2)
    of_stage = {"stages": (_with_experts(model, 8),)}
    model = model.model_copy(update=of_stage)
    (pair,) = step_work(model, method, layout).pairs
    assert pair.exchange is not None
    rows = pair.exchange.rows + pair.exchange.combine_rows  # and the gradients of both
    assert 2 * rows * 7 / 8 * pair.exchange.row_bytes / 1e9 == pytest.approx(0.264, abs=5e-4)
    assert memory_of(model, method, layout).tensors / 1e9 == pytest.approx(15.2, rel=0.005)
    assert "must divide the 4 data-parallel ranks" in str(refusal(model, POS2, layout))


def test_a_pass_without_gradients_has_nothing_behind_it() -> None:
    (pair,) = step_work(MEDIUM, POS2, Layout(2, expert_parallel=2, training=False)).pairs
    assert not any(part.backward or part.kept for part in works(pair))


def test_what_is_computed_again_is_not_kept() -> None:
    whole, dense, pairs = (
        step_work(MEDIUM, POS2, Layout(2, expert_parallel=2, recompute=each)).pairs[0]
        for each in (False, "selective", "full")
    )
    kept = [sum(part.kept for part in works(pair)) for pair in (whole, dense, pairs)]
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2] > 0
    assert [pair.repeated for pair in (whole, dense, pairs)] == [False, False, True]
    mlp, again = (next(part for part in pair.backbone if part.name == "mlp") for pair in (whole, dense))
    assert again.backward == mlp.forward + mlp.backward and pairs.backbone[0].backward == mlp.backward


def test_layouts_that_cannot_be_are_refused() -> None:
    for method, layout, says in (
        (POS2, Layout(16, expert_parallel=3), "must divide the world size 16"),
        (POS2, Layout(32, expert_parallel=32), "num_experts = 16"),
        (POS2, Layout(16, tensor_parallel=3), "tensor_parallel = 3"),
        (Method("x", "topk", join="late"), Layout(2, recompute="full"), "use selective"),
        (replace(POS2, routed=17), Layout(2), "top_k = 17"),
        (replace(POS2, parts=3), Layout(2), "expert_partition = 3: must divide the 4096 neurons"),
        (replace(POS2, parts=2), Layout(64, expert_parallel=64), "num_experts = 16 times expert_partition = 2"),
        (replace(POS2, parts=2), Layout(2, tensor_parallel=2, expert_tensor_parallel=True), "are not divided again"),
        (replace(DEEPSPEED_TOPK, parts=2), Layout(2), "DeepSpeed's own layers, and those of a Swin"),
    ):
        assert says in str(refusal(MEDIUM, method, layout))
        with pytest.raises(ModelError, match=says):
            step_work(MEDIUM, method, layout)
    assert "use pos1" in str(refusal(model_of_preset("llama2-moe"), POS2, Layout(2)))
