"""One run, three layouts: one process that accumulates micro-batches, two expert-parallel ones, and two times two."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor

import scmoe_ds
from scmoe_ds.engine import connect, expert_parallel_rank
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.training import seed_micro_batch
from tests.helpers.distributed import run_distributed

STEPS, VOCABULARY, SEQUENCE, MICRO_BATCHES = 20, 64, 32, 4


def micro_batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator)


def train(ep_size: int, zero_stage: int, architecture: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of 20 steps, and the final weights by global name.

    Capacity factor 1 with random token selection and dropout: drops and random numbers must agree as well.
    """
    connect()
    ranks = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES // ranks,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "torch_adam": True, "weight_decay": 0.1}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero_stage},
        "scmoe": {"architecture": architecture, "num_experts": 4, "expert_parallel_size": ep_size,
                  "capacity_factor": 1.0, "min_capacity": 1, "top2_2nd_expert_sampling": False},
    }  # fmt: skip
    settings = GPTSettings(4, 32, 4, VOCABULARY, SEQUENCE, hidden_dropout=0.1)
    model = GPT(settings, scmoe_ds.ScMoEConfig.from_deepspeed(config))
    initialize_parameters(model, 7, 0.1, settings.num_layers, expert_parallel_rank(ep_size))
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro_step in range(MICRO_BATCHES // ranks):
            number = micro_step * ranks + dist.get_rank()
            seed_micro_batch(1, step, number)
            tokens = micro_batch(step * MICRO_BATCHES + number)
            output = engine(tokens[:, :-1], labels=tokens[:, 1:])
            engine.backward(output.loss)
            engine.step()
            total += output.loss.detach() / MICRO_BATCHES
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, global_weights(engine.module, expert_parallel_rank(ep_size))


def global_weights(model: torch.nn.Module, ep_rank: int) -> dict[str, Tensor]:
    local = {name: module.num_local_experts for name, module in model.named_modules() if isinstance(module, MoE)}
    weights = {}
    for name, parameter in model.named_parameters():
        first = ep_rank * local.get(name.split(".deepspeed_moe.")[0], 0)
        name = re.sub(r"(?<=deepspeed_experts\.)\d+", lambda match, first=first: str(int(match[0]) + first), name)
        weights[name] = parameter.detach().clone()
    return weights


@pytest.mark.parametrize(("zero_stage", "architecture"), [(1, "scmoe"), (2, "scmoe"), (2, "dgmoe")])
def test_layouts_train_alike(zero_stage: int, architecture: str) -> None:
    [(losses, norms, weights)] = run_distributed(train, 1, 1, zero_stage, architecture)
    assert losses[-1] < losses[0]
    for ranks in (2, 4):  # expert-parallel size 2 both times
        by_rank = run_distributed(train, ranks, 2, zero_stage, architecture)
        for split_losses, split_norms, split_weights in by_rank:
            assert split_losses == pytest.approx(losses, rel=1e-5)
            assert split_norms == pytest.approx(norms, rel=1e-4)
            for name, weight in split_weights.items():
                assert (weight - weights[name]).abs().max() <= 1e-5 * max(1, weights[name].abs().max()), name
        assert by_rank[0][2].keys() | by_rank[1][2].keys() == weights.keys()
        assert by_rank[0][2].keys() != by_rank[1][2].keys(), "each rank holds experts of its own"
