"""LongCat-Flash under a schedule beside transformers' own model, which computes the tokens of all ranks in one process.

For tests and for the record (benchmarks/quality/longcat_parity.py). Functions without "alone" run on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import scmoe_ds
from lab.moe_families import EXPERTS, batch, tiny
from scmoe_ds.overlap.schedule import Schedule

FAMILY = "longcat_flash"
SCHEDULES = [Schedule(1), Schedule(2), Schedule(3, 2), Schedule((1, 4), 2), Schedule(4, overlap=False)]
CLIPPING, LEARNING_RATE, DECAY = 0.5, 3e-3, 0.01


def config(ep: int, stage: int = 1, **more: Any) -> dict[str, Any]:
    """The DeepSpeed JSON."""
    adam = {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIPPING if stage else 0,  # without ZeRO the norm would be wrong
        "expert_parallel": {"enabled": True, "autoep_size": ep},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": stage},
        "scmoe": {"overlap": {"calibration_steps": 0}},
        **more,
    }


def tokens_of(rank: int, like: Tensor) -> Tensor:
    """[2, S, D] of a rank, of which each has another number."""
    return torch.randn(2, 7 + 2 * rank, 32, generator=torch.Generator().manual_seed(rank)).to(like)


def differences(ep: int, dtype: torch.dtype) -> dict[str, float]:
    """Decoder layers against transformers' own under five schedules: the largest differences of the output, of the
    gradients of input, router and dense parameters, and of the experts' gradients.

    Raises:
        AssertionError: another routing, or one without identity experts.
    """
    autoep = {"enabled": True, "autoep_size": ep, "use_grouped_mm": dtype is not torch.float64}
    engine, *_ = scmoe_ds.initialize(model=tiny(FAMILY).to(dtype), config=config(ep, 0, expert_parallel=autoep))
    model, reference, rank = engine.module.model, tiny(FAMILY).to(dtype).model, dist.get_rank()
    own = EXPERTS // ep
    worst = {"output": 0.0, "gradients": 0.0, "gradients of experts": 0.0}
    for block, their_block in zip(model.layers, reference.layers, strict=True):
        *of_ranks, experts = _theirs(their_block, reference.rotary_emb, ep, rank * own, own)
        chosen_TK = _compare_routing(block, their_block, tokens_of(rank, model.norm.weight))
        for schedule in SCHEDULES:
            block.mlp.pair.schedule = schedule
            block.mlp.tokens_per_expert.zero_()
            (output, *grads), of_experts = _ours(block, model.rotary_emb, rank)
            assert int(block.mlp.tokens_per_expert.sum()) == chosen_TK.numel()
            found = dict(zip(worst, ([output], grads, of_experts), strict=True))
            expected = dict(zip(worst, (of_ranks[rank][:1], of_ranks[rank][1:], experts), strict=True))
            for name in worst:
                both = zip(found[name], expected[name], strict=True)
                worst[name] = max(worst[name], *(float((a - b).detach().abs().max()) for a, b in both))
    return worst


def _compare_routing(block: Any, their_block: Any, hidden: Tensor) -> Tensor:
    """[T, K] the experts that both have chosen."""
    hidden = their_block.post_attention_layernorm[0](hidden)
    _, their_weight_TK, chosen_TK = their_block.mlp.router(hidden)
    weight_TK, here_TK, _ = block.mlp.router(hidden.flatten(0, 1))
    assert torch.equal(chosen_TK, here_TK) and torch.equal(their_weight_TK, weight_TK)
    assert (chosen_TK >= EXPERTS).any() and (chosen_TK < EXPERTS).any()
    return chosen_TK


def _run(block: nn.Module, rotary: nn.Module, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    call = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary(hidden, positions)}
    output: Tensor = block(hidden, **call)
    return output


def _loss(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def _dense(block: nn.Module) -> list[nn.Parameter]:
    return [each for name, each in block.named_parameters() if not name.startswith("mlp.")]


def _theirs(block: Any, rotary: nn.Module, ranks: int, first: int, experts: int) -> list[list[Tensor]]:
    """For every rank: output, gradients of input, router and dense parameters; at the end, of some experts for all."""
    found, of_experts = [], []
    for rank in range(ranks):
        hidden = tokens_of(rank, next(block.parameters())).requires_grad_()
        output, own = _run(block, rotary, hidden), block.mlp.experts
        read = [hidden, block.mlp.router.classifier.weight, *_dense(block), own.gate_up_proj, own.down_proj]
        *grads, gate_up, down = torch.autograd.grad(_loss(output), read)
        found.append([output, *grads])
        of_experts.append([*gate_up.chunk(2, dim=1), down])
    summed = [
        torch.stack([part[first : first + experts] for part in each]).sum(0) for each in zip(*of_experts, strict=True)
    ]
    return [*found, summed]


def _ours(block: Any, rotary: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    hidden = tokens_of(rank, next(block.parameters())).requires_grad_()
    output, own = _run(block, rotary, hidden), block.mlp.experts
    read = [hidden, block.mlp.router.gate.weight, *_dense(block), own.w1, own.w3, own.w2]
    grads = torch.autograd.grad(_loss(output), read)
    return [output, *grads[:-3]], list(grads[-3:])


def train(ep: int, stage: int, steps: int, checkpointing: bool = False) -> list[tuple[float, float]]:
    """Mean loss of all ranks and gradient norm, of each step."""
    model = tiny(FAMILY)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = scmoe_ds.initialize(model=model, config=config(ep, stage))
    engine.train()
    found = []
    for step in range(steps):
        loss = engine(**batch(step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append((float(mean) / dist.get_world_size(), float(engine.get_global_grad_norm())))
    return found


def train_alone(ranks: int, steps: int) -> list[tuple[float, float]]:
    """The same in one process, by transformers and torch."""
    model = tiny(FAMILY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    found = []
    for step in range(steps):
        losses = [model(**batch(step, rank)).loss / ranks for rank in range(ranks)]
        torch.stack(losses).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        found.append((sum(float(each.detach()) for each in losses), float(norm)))
    return found
