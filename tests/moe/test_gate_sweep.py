"""The gate against DeepSpeed's in every mode, with equal probabilities and few or many experts; masks; what is kept."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.speed import gate as benchmark
from scmoe_ds.moe.capacity import capacity
from scmoe_ds.moe.gate import Routing, route
from scmoe_ds.moe.logits import fp32_logits

HIDDEN = 8


def draw_case(seed: int) -> tuple[dict[str, Any], TopKGate, Tensor]:
    """A gate and tokens. Some tokens are the same, and some experts: their probabilities are equal."""
    pick = random.Random(seed)
    experts = pick.choice([1, 2, 3, 5, 8, 64, 512])
    case: dict[str, Any] = {
        "k": pick.choice([k for k in (1, 2, 3) if k <= experts]),
        "capacity_factor": pick.choice([0.1, 0.5, 1.0, 1.25, 3.0]),
        "eval_capacity_factor": pick.choice([0.3, 2.0]),
        "min_capacity": pick.choice([0, 1, 4]),
        "drop_tokens": pick.random() < 0.8,
        "use_rts": pick.random() < 0.6,
        "top2_2nd_expert_sampling": pick.random() < 0.5,
    }
    case["noisy_gate_policy"] = pick.choice([None, "Jitter", "RSample"] if case["k"] == 1 else [None, "Jitter"])
    torch.manual_seed(seed)
    gate = TopKGate(HIDDEN, experts, **case).train(pick.random() < 0.7)
    tokens = pick.choice([4, 7, 33, 200])
    x = torch.randn(tokens, HIDDEN).to(pick.choice([torch.float32, torch.bfloat16, torch.float16]))
    if pick.random() < 0.4:
        x = x[torch.randint(0, 3, (tokens,))]
    if pick.random() < 0.2:
        gate.wg.weight.data[: experts // 2] = gate.wg.weight.data[0]
    if pick.random() < 0.3:
        gate.bfloat16()
    return case | {"experts": experts, "training": gate.training, "x": (x.shape, x.dtype)}, gate, x


def seeded(seed: int, gate: TopKGate, *args: Any, **kwargs: Any) -> tuple[Routing, Tensor]:
    torch.manual_seed(seed)
    return route(gate, *args, **kwargs), torch.rand(1)


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_any_gate_is_deepspeeds_to_the_bit(first: int) -> None:
    for seed in range(first, first + 100):
        case, gate, x = draw_case(seed)
        torch.manual_seed(seed)
        l_aux, rows, _, expert, _, weight, counts = gate(x, None, True)
        after = torch.rand(1)
        found, our_after = seeded(seed, gate, x)
        for theirs, ours in (
            (expert.long(), found.expert_KT),
            (weight, found.weight_KT),
            (counts, found.exp_counts),
            (l_aux, found.l_aux),
            (after, our_after),
        ):
            assert torch.equal(theirs, ours), (seed, case)
        assert int(found.capacity) == min(int(rows), len(x)), (seed, case)
        check_rows(found, seed)


def check_rows(routing: Routing, seed: int) -> None:
    """The sorted choices are the kept ones by expert and location, and then the others. Which token of an expert has
    which location is free: DeepSpeed numbers them in their order, and here the limit does."""
    kept_KT, order = routing.expert_KT >= 0, routing.choices.order
    experts = routing.expert_KT.flatten()[order.choice_X].tolist()
    locations = routing.location_KT.flatten()[order.choice_X].tolist()
    rows = int(kept_KT.sum())
    pairs = list(zip(experts, locations, strict=True))[:rows]
    assert pairs == [(e, row) for e, count in enumerate(routing.choices.rows_E) for row in range(int(count))], seed
    assert set(experts[rows:]) <= {-1} and set(locations[rows:]) <= {0}, seed
    assert torch.equal(order.choice_X[order.place_KT.flatten()], torch.arange(kept_KT.numel())), seed


@pytest.mark.parametrize("use_rts", [True, False])
def test_equal_random_numbers_keep_what_deepspeed_keeps(use_rts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens that draw the same number at the limit: in long runs it happens."""
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: (rand(*args, **kwargs) * 4 + 1).floor() / 8)
    for seed in range(40):
        torch.manual_seed(seed)
        gate, x = TopKGate(HIDDEN, 4, 1, 0.7, min_capacity=0, use_rts=use_rts), torch.randn(90, HIDDEN)
        expert = gate(x, None, True)[3]
        torch.manual_seed(seed)
        gate, x = TopKGate(HIDDEN, 4, 1, 0.7, min_capacity=0, use_rts=use_rts), torch.randn(90, HIDDEN)
        assert torch.equal(expert.long(), route(gate, x).expert_KT), seed


@pytest.mark.parametrize("softmax", ["deepspeed", "all", "chosen", "kept"])
def test_any_mask_is_as_good_as_absence(softmax: Any) -> None:
    """Choices, places, weights and random numbers are the same, with noise and an excluded expert, too."""
    for seed in range(80):
        case, gate, x = draw_case(seed)
        used = torch.rand(len(x)) < random.Random(seed).choice([0.0, 0.3, 0.9, 1.0])
        exclude = torch.randint(-1, max(case["experts"] - 1, 0), (len(x),)) if case["k"] == 1 else None
        x = x.masked_fill(~used.unsqueeze(1), float("nan")).requires_grad_()
        found, after = seeded(seed, gate, x, used, exclude, softmax)
        alone = x.detach()[used].requires_grad_()
        absent, absent_after = seeded(seed, gate, alone, None, None if exclude is None else exclude[used], softmax)
        for ours, expected in (
            (found.expert_KT[:, used], absent.expert_KT),
            (found.location_KT[:, used], absent.location_KT),
            (found.exp_counts, absent.exp_counts),
            (after, absent_after),
        ):
            assert torch.equal(ours, expected), (seed, case)
        assert int(found.capacity) == int(absent.capacity) and (found.expert_KT[:, ~used] == -1).all(), (seed, case)
        assert not found.location_KT[:, ~used].any() and not found.weight_KT[:, ~used].any(), (seed, case)
        torch.testing.assert_close(found.weight_KT[:, used], absent.weight_KT, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.l_aux, absent.l_aux, rtol=1e-5, atol=1e-6)
        check_rows(found, seed)
        sources = [gate.wg.weight, x]
        weight, grad = torch.autograd.grad(found.l_aux + found.weight_KT.square().sum(), sources)
        others = torch.autograd.grad(absent.l_aux + absent.weight_KT.square().sum(), [gate.wg.weight, alone])
        assert not grad[~used].any()
        for ours, theirs in zip((weight, grad[used]), others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2 if weight.dtype == torch.bfloat16 else 2e-3)


def test_capacity_of_a_count_on_the_device() -> None:
    """The same rounding, for all that can be counted."""
    for factor, experts, least in ((0.3, 7, 0), (1.25, 16, 4), (2.2, 3, 1), (3.3, 512, 4), (1.1, 10, 0)):
        counts = torch.cat([torch.arange(1500), torch.tensor([2**20 + 1, 16_777_217])])
        found = capacity(counts, experts, factor, least)
        assert found.tolist() == [capacity(tokens, experts, factor, least) for tokens in counts.tolist()]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_a_plain_product(tokens: torch.dtype, weights: torch.dtype) -> None:
    x, weight = torch.randn(50, 24).to(tokens).requires_grad_(), torch.randn(6, 24).to(weights).requires_grad_()
    grad = torch.randn(50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = fp32_logits(x, weight)
    plain = F.linear(x.float(), weight.float())
    assert torch.equal(found, plain)
    for ours, expected in zip(*(torch.autograd.grad(each, [x, weight], grad) for each in (found, plain)), strict=True):
        assert torch.equal(ours, expected) and ours.dtype == expected.dtype


@pytest.mark.parametrize("masked", [False, True])
def test_no_copy_of_the_tokens_is_kept_for_backward(masked: bool) -> None:
    gate, x = TopKGate(64, 4), torch.randn(40, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        route(gate, x, torch.rand(40) < 0.5 if masked else None)
    wide = [each for each in kept if each.shape == x.shape]
    assert [each.data_ptr() for each in wide] == [x.data_ptr()]


def test_the_benchmark_compares_the_same_routing() -> None:
    gate, x = TopKGate(HIDDEN, 4, 2, 0.8, top2_2nd_expert_sampling=False), torch.randn(40, HIDDEN, requires_grad=True)
    runs = benchmark.variants(gate, x)
    theirs, ours = runs[benchmark.BASELINE](), runs["ours, padded"]()
    for expected, found in zip(theirs, ours, strict=True):
        assert torch.equal(expected.flatten(), found.flatten())
    for run in runs.values():
        benchmark.train(run, gate, x, {})
