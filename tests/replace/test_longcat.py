"""LongCat-Flash under a schedule: transformers' own model, in one process on the tokens of all ranks, is the reference."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import EXPERTS, batch, tiny
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.schedule import Schedule

FAMILY = "longcat_flash"
SCHEDULES = [Schedule(1), Schedule(2), Schedule(3, 2), Schedule((1, 4), 2), Schedule(4, overlap=False)]
CLIPPING, LEARNING_RATE, DECAY = 0.5, 3e-3, 0.01


def config(ep: int, stage: int = 1, **more: Any) -> dict[str, Any]:
    adam = {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIPPING,
        "expert_parallel": {"enabled": True, "autoep_size": ep},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": stage},
        "scmoe": {"overlap": {"calibration_steps": 0}},
        **more,
    }


def tokens_of(rank: int, like: Tensor) -> Tensor:
    return torch.randn(2, 7 + 2 * rank, 32, generator=torch.Generator().manual_seed(rank)).to(like)


def run_block(block: nn.Module, rotary: nn.Module, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    call = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary(hidden, positions)}
    output: Tensor = block(hidden, **call)
    return output


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def dense(block: nn.Module) -> list[nn.Parameter]:
    return [each for name, each in block.named_parameters() if not name.startswith("mlp.")]


def theirs(block: Any, rotary: nn.Module, ranks: int, first: int, experts: int) -> list[list[Tensor]]:
    """For every rank: output, gradients of input, router and dense parameters; at the end, of some experts for all."""
    found, of_experts = [], []
    for rank in range(ranks):
        hidden = tokens_of(rank, next(block.parameters())).requires_grad_()
        output = run_block(block, rotary, hidden)
        own = block.mlp.experts
        read = [hidden, block.mlp.router.classifier.weight, *dense(block), own.gate_up_proj, own.down_proj]
        *grads, gate_up, down = torch.autograd.grad(loss_of(output), read)
        found.append([output, *grads])
        of_experts.append([*gate_up.chunk(2, dim=1), down])
    summed = [sum(each)[first : first + experts] for each in zip(*of_experts, strict=True)]
    return [*found, summed]


def ours(block: Any, rotary: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    hidden = tokens_of(rank, next(block.parameters())).requires_grad_()
    output = run_block(block, rotary, hidden)
    own = block.mlp.experts
    read = [hidden, block.mlp.router.gate.weight, *dense(block), own.w1, own.w3, own.w2]
    grads = torch.autograd.grad(loss_of(output), read)
    return [output, *grads[:-3]], list(grads[-3:])


def blocks(ep: int, dtype: torch.dtype) -> float:
    """The largest difference between a decoder layer and transformers' own: output, and gradients of everything."""
    autoep = {"enabled": True, "autoep_size": ep, "use_grouped_mm": dtype is not torch.float64}
    engine, *_ = scmoe_ds.initialize(model=tiny(FAMILY).to(dtype), config=config(ep, 0, expert_parallel=autoep))
    model, reference, rank = engine.module.model, tiny(FAMILY).to(dtype).model, dist.get_rank()
    own, worst = EXPERTS // ep, 0.0
    for block, their_block in zip(model.layers, reference.layers, strict=True):
        *of_ranks, experts = theirs(their_block, reference.rotary_emb, ep, rank * own, own)
        chosen = their_block.mlp.router(their_block.post_attention_layernorm[0](tokens_of(rank, model.norm.weight)))[2]
        here = block.mlp.router(block.post_attention_layernorm[0](tokens_of(rank, model.norm.weight)).flatten(0, 1))[1]
        assert torch.equal(chosen, here) and (chosen >= EXPERTS).any()
        for schedule in SCHEDULES:
            block.mlp.pair.schedule = schedule
            block.mlp.tokens_per_expert.zero_()
            alone, of_experts = ours(block, model.rotary_emb, rank)
            assert int(block.mlp.tokens_per_expert.sum()) == chosen.numel()
            both = [*zip(alone, of_ranks[rank], strict=True), *zip(of_experts, experts, strict=True)]
            worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in both))
    return worst


def texts(ep: int) -> None:
    """What a model does with its layers: generation from a cache, router logits, checkpointing of layers."""
    ids = batch(0, dist.get_rank())["input_ids"]
    reference = tiny(FAMILY).eval()
    expected = reference.generate(ids, max_new_tokens=6, do_sample=False)
    logits = reference(ids, output_router_logits=True).router_logits
    engine, *_ = scmoe_ds.initialize(model=tiny(FAMILY).eval(), config=config(ep))
    assert torch.equal(engine.module.eval().generate(ids, max_new_tokens=6, do_sample=False), expected)
    found = engine.module(ids, output_router_logits=True, output_hidden_states=True)
    assert len(found.router_logits) == len(logits) == 2
    assert len(found.hidden_states) == 3
    for one, other in zip(found.router_logits, logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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


def balance(ep: int) -> tuple[Tensor, Tensor]:
    """The biases after a step in bf16, and what LongCat's rule makes of the tokens that every expert got."""
    router = {"load_balance_coeff": 0.1, "load_balance_rule": "proportional"}
    more = {"bf16": {"enabled": True}, "scmoe": {"router": router, "overlap": {"calibration_steps": 0}}}
    engine, *_ = scmoe_ds.initialize(model=tiny(FAMILY), config=config(ep, **more))
    engine.backward(engine(**batch(0, dist.get_rank())).loss)
    engine.step()
    counts_LE = torch.stack([layer.mlp.tokens_per_expert for layer in engine.module.model.layers])
    dist.all_reduce(counts_LE)
    step_LE = 0.1 * (1 / (EXPERTS + 4) - counts_LE / counts_LE.sum(1, keepdim=True))
    step_LE[:, EXPERTS:] = 0  # identity experts
    before_LE, after_LE = (
        torch.stack([layer.mlp.router.e_score_correction_bias for layer in model.model.layers])
        for model in (tiny(FAMILY), engine.module)
    )
    return after_LE, before_LE + step_LE


def train_alone(ranks: int, steps: int) -> list[tuple[float, float]]:
    """The same in one process, by transformers and torch."""
    model = tiny(FAMILY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    found = []
    for step in range(steps):
        losses = [model(**batch(step, rank)).loss / ranks for rank in range(ranks)]
        sum(losses).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        found.append((sum(float(each.detach()) for each in losses), float(norm)))
    return found


def on_two_ranks(steps: int) -> dict[str, Any]:
    differ = {str(dtype): blocks(2, dtype) for dtype in (torch.float32, torch.float64)}
    texts(2)
    losses = {f"ZeRO-{stage}": train(2, stage, steps) for stage in (1, 2, 3)}
    torch.testing.assert_close(*balance(2), rtol=0, atol=1e-7)
    return {**differ, **losses, "checkpointing": train(2, 1, steps, checkpointing=True)}


def test_two_ranks_compute_and_learn_what_one_process_does() -> None:
    steps = 4
    expected = train_alone(2, steps)
    for found in run_distributed(on_two_ranks, 2, steps):
        assert found.pop("torch.float32") < 1e-5 and found.pop("torch.float64") < 1e-6
        for name, losses in found.items():
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=name)


def refused(ep: int) -> list[str]:
    found = []
    biased = tiny(FAMILY)
    for layer in biased.model.layers:
        layer.mlp.router.classifier.bias = nn.Parameter(torch.zeros(EXPERTS + 4))
    weigh_first = config(ep, expert_parallel={"enabled": True, "autoep_size": ep, "score_apply": "pre"})
    for model, settings in [
        (biased, config(ep)),
        (tiny(FAMILY), weigh_first),
        (tiny(FAMILY), config(ep, scmoe={"architecture": "scmoe", "position": "pos1"})),
        (tiny(FAMILY), config(ep, scmoe={"overlap": {"expert_slot": 5}})),
    ]:
        with pytest.raises(ScMoEConfigError) as error:
            scmoe_ds.initialize(model=model, config=settings)
        found.append(str(error.value))
    plain = {key: value for key, value in config(ep).items() if key != "scmoe"}
    engine, *_ = deepspeed.initialize(model=tiny(FAMILY), config=plain)
    with pytest.raises(ScMoEConfigError) as error:
        engine(**batch(0, 0))
    return [*found, str(error.value)]


def test_what_cannot_run_is_refused_in_a_sentence() -> None:
    (found,) = run_distributed(refused, 1, 1)
    assert 'set "router_bias": false' in found[0]
    assert 'expert_parallel.score_apply = "pre"' in found[1]
    assert 'scmoe.architecture = "scmoe": every layer of LongCat-Flash has a shortcut already' in found[2]
    assert "the backbone of model.layers.0.mlp has 3 operators (mlp, attention, mlp 2); use 1 … 4" in found[3]
    assert "identity experts run under a schedule only" in found[4]
