"""Padding and unequal numbers of tokens over expert- and tensor-parallel ranks, against layers that hold all experts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds import ScMoE, ScMoEConfig, load_balancing_loss, moe_from_dense
from scmoe_ds.moe.deepspeed_gate import admit_any_tokens
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.shortcut import DGMoE
from scmoe_ds.parallel import tensor
from tests.helpers.hugging_face import gpt2

HIDDEN, EXPERTS = 16, 4
UNEQUAL = [(5, 0), (1, 3), (12, 2), (0, 0)]
"""Tokens of each rank."""


def make(name: str, ep_size: int, k: int, drop: bool) -> MoE:
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(), nn.Linear(32, HIDDEN))
    settings = dict(
        k=k, capacity_factor=1.0, min_capacity=2, drop_tokens=drop, use_rts=False, top2_2nd_expert_sampling=False
    )
    kind, _, dispatch = name.partition(" ")
    if kind == "DeepSpeed's":
        layer = MoE(HIDDEN, expert, EXPERTS, ep_size, **settings)
        admit_any_tokens(layer, "deepspeed", unequal=dispatch == "unequal")
    else:
        layer = {"StagedMoE": StagedMoE, "ScMoE": ScMoE, "DGMoE": DGMoE}[kind](
            HIDDEN, expert, EXPERTS, ep_size, dispatch=dispatch, **settings
        )
    layer.set_deepspeed_parallelism()
    return layer


def compare(layer: MoE, alone: MoE, tokens: int, used: Tensor | None) -> None:
    """Outputs, losses, counts and all gradients; those of an expert are of all ranks' tokens."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    found = []
    for each in (layer, alone):
        each.zero_grad()
        mine = x.clone().requires_grad_()
        output, l_aux, counts = each(mine, used)
        (output.square().sum() + l_aux).backward()
        found.append([output, l_aux, counts, mine.grad, each.deepspeed_moe.gate.wg.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    first = dist.get_rank() * layer.num_local_experts
    for number, expert in enumerate(alone.deepspeed_moe.experts.deepspeed_experts):
        for name, parameter in expert.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(expected)
            if first <= number < first + layer.num_local_experts:
                local = layer.deepspeed_moe.experts.deepspeed_experts[number - first].get_parameter(name)
                torch.testing.assert_close(local.grad, expected, rtol=1e-4, atol=1e-5)


def unequal_numbers_of_tokens() -> int:
    rank, cases = dist.get_rank(), 0
    names = (
        "StagedMoE exact",
        "StagedMoE padded",
        "ScMoE padded",
        "DeepSpeed's unequal",
        "DGMoE exact",
        "DGMoE padded",
    )
    for name, k, drop in product(names, (1, 2, 3), (True, False)):
        if name.startswith("DGMoE") and k > 1:
            continue
        layer, alone = make(name, 2, k, drop), make(name, 1, k, drop)
        for numbers in UNEQUAL:
            compare(layer, alone, numbers[rank], None)
        compare(layer, alone, 12, torch.arange(12) < 5 if rank == 0 else None)
        compare(layer, alone, 12, torch.zeros(12) if rank == 0 else torch.arange(12) % 2)
        cases += 1
    return cases


def one_rank_has_padding_in_deepspeeds_layer() -> None:
    """The other one runs DeepSpeed's gate, and both must have buffers of one size."""
    for k, drop, tokens in product((1, 2, 3), (True, False), (1, 12)):
        layer, alone = make("DeepSpeed's", 2, k, drop), make("DeepSpeed's", 1, k, drop)
        compare(layer, alone, tokens, None if dist.get_rank() else torch.arange(tokens) % 3)


def tensor_parallel() -> None:
    """Both ranks hold the same tokens, and one expert-parallel rank's experts each."""
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))
    masks = (None, torch.arange(7) % 2, torch.arange(7) == 3, torch.zeros(7))
    cases = list(product(("StagedMoE exact", "StagedMoE padded"), (1, 2), (True, False)))
    expected = {case: [make(case[0], 1, *case[1:])(x, used)[:2] for used in masks] for case in cases}
    tensor.start_tensor_parallel(2)
    for case in cases:
        layer = make(case[0], 2, *case[1:])
        for used, (output, l_aux) in zip(masks, expected[case], strict=True):
            found = layer(x, used)
            torch.testing.assert_close(found[0], output, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[1], l_aux)


def upcycled(architecture: str) -> None:
    """Batches of other lengths and padding on each rank, as a collator makes them."""
    models = []
    for ep_size in (1, 2):
        torch.manual_seed(0)
        dense = gpt2().eval()
        for parameter in dense.parameters():
            nn.init.normal_(parameter, std=0.2)
        section = {
            "architecture": architecture,
            "num_experts": 4,
            "expert_parallel_size": ep_size,
            "min_capacity": 1,
            "use_rts": False,
            "eval_capacity_factor": 0.7,
        }
        model = moe_from_dense(dense, ScMoEConfig.from_deepspeed({"scmoe": section}), noise=0.5)
        for module in model.modules():
            if isinstance(module, MoE):
                module.set_deepspeed_parallelism()
                module.deepspeed_moe.gate.wg.weight.data.normal_(generator=torch.Generator().manual_seed(9))
        models.append(model)
    rank = dist.get_rank()
    for shape, real in (((2, 9), (9, 4)), ((1, 3), (3,)), ((3, 5), (5, 5, 5)))[:: 1 if rank == 0 else -1]:
        tokens = torch.randint(32, shape, generator=torch.Generator().manual_seed(rank))
        mask = torch.arange(shape[1]) < torch.tensor(real).unsqueeze(1)
        logits, losses = [], []
        for model in models:
            with torch.no_grad():
                logits.append(model(tokens, attention_mask=mask.long()).logits[mask])
            losses.append(load_balancing_loss(model))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*losses)


def test_ranks_with_other_numbers_of_tokens_and_masks() -> None:
    assert run_distributed(unequal_numbers_of_tokens, 2) == [28, 28]


def test_padding_on_one_rank_of_deepspeeds_layer() -> None:
    run_distributed(one_rank_has_padding_in_deepspeeds_layer, 2)


def test_padding_under_tensor_parallelism() -> None:
    run_distributed(tensor_parallel, 2)


@pytest.mark.parametrize("architecture", ["scmoe", "topk"])
def test_upcycled_model_with_other_batches_on_each_rank(architecture: str) -> None:
    run_distributed(upcycled, 2, architecture)
