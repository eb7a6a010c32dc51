"""Self-distillation on two ranks that share experts: the teacher is the source at every step, and a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import SEQUENCE, VOCABULARY, tiny
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.distill import Distillation
from scmoe_ds.engine.teacher import as_source
from scmoe_ds.models.divergence import WholeDistribution, best_tokens, divergence
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings

SETTINGS = GPTSettings(4, 32, 4, 96, 16)
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}


def whole(stage: int, distill: dict[str, float], precision: str | None = None, **section: Any) -> dict[str, Any]:
    ds = {"train_micro_batch_size_per_gpu": 2, "optimizer": ADAM, "zero_optimization": {"stage": stage}}
    adapt = {"distill": distill, **section.pop("adapt", {})}
    ds["scmoe"] = {"overlap": {"calibration_steps": 0}, "adapt": adapt, **section}
    return {**ds, precision: {"enabled": True}} if precision else ds


def gpt_engine(config: dict[str, Any]) -> Any:
    section = ScMoEConfig.from_deepspeed(config)
    model = GPT(SETTINGS, section)
    initialize_parameters(model, 3, 0.2, 4)
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    engine.distill = Distillation(engine, model.conversion, section)
    return engine


def tokens_of(step: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randint(vocabulary, (2, 16), generator=generator)


def gpt_step(engine: Any, step: int) -> float:
    torch.manual_seed(step)
    tokens = tokens_of(step % 2, 96)
    output = engine(tokens, labels=tokens.roll(-1, 1), targets=engine.distill.teach(tokens))
    engine.backward(output.loss)
    engine.step()
    return float(output.loss.detach())


def values(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def teach_gpt(stage: int, precision: str | None, join: str, directory: str) -> None:
    base = {"base": {"architecture": "pipelined_topk", "top_k": 2}}
    section = {"num_experts": 4, "expert_parallel_size": 2, "join": join, "adapt": base}
    config = whole(stage, {"alpha": 1.0, "gamma": 0.5}, precision, **section)
    engine, fixed = gpt_engine(config), tokens_of(99, 96)
    with as_source(engine, engine.module.conversion):
        exact = engine.module.local_logits(fixed)
    storages, losses = [parameter.data_ptr() for parameter in engine.module.parameters()], []
    for step in range(6):
        losses.append(gpt_step(engine, step))
        taught = engine.distill.teacher.run(lambda: engine.module.local_logits(fixed))
        assert torch.equal(taught, exact), (stage, step)
        assert [parameter.data_ptr() for parameter in engine.module.parameters()] == storages
        if step == 2:
            engine.save_checkpoint(directory, tag=f"{stage}")
    assert losses[4] < losses[0]
    expected = values(engine)
    resumed = gpt_engine(config)  # whose teacher is made before the student is loaded
    resumed.load_checkpoint(directory, tag=f"{stage}")
    for step in range(3, 6):
        assert gpt_step(resumed, step) == losses[step]
    assert all(map(torch.equal, values(resumed), expected))


def teach_autoep(stage: int, distill: dict[str, float], **section: Any) -> None:
    """Somebody's loop, which knows nothing of it."""
    config = {**whole(stage, distill, architecture="scmoe", **section), "gradient_accumulation_steps": 2}
    config["expert_parallel"] = {"enabled": True, "autoep_size": 2, "use_grouped_mm": False}
    config["scmoe"]["overlap"] = {"calibration_steps": 1}  # the teacher's passes are not among those that are timed
    engine, *_ = scmoe_ds.initialize(model=tiny("qwen3_moe", num_hidden_layers=3), config=config)
    model, fixed = engine.module, tokens_of(99, VOCABULARY)

    def as_teacher() -> Tensor:
        return engine.distill.teacher.run(lambda: model.forward(input_ids=fixed, use_cache=False).logits)

    def counts() -> list[Tensor]:
        return [each.clone() for name, each in model.named_buffers() if name.endswith("tokens_per_expert")]

    exact, first = as_teacher(), counts()
    model.train()
    for step in range(6):
        tokens = tokens_of(step // 2 * 2, VOCABULARY)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        assert torch.equal(as_teacher(), exact), (stage, step)
    rows = [int(now.sum() - before.sum()) for now, before in zip(counts(), first, strict=True)]
    assert rows == [6 * 2 * SEQUENCE * model.config.num_experts_per_tok] * 3  # the student's passes alone
    assert not engine.overlap.calibrating
    parts = engine.distill.parts
    assert parts is not None and (parts.kl is None) == ("alpha" not in distill)


def share_a_vocabulary() -> None:
    """Each rank has half of it, as tensor-parallel ranks do."""
    generator, rank = torch.Generator().manual_seed(7), dist.get_rank()
    student, teacher = (torch.randn(2, 5, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    own = slice(6 * rank, 6 * rank + 6)
    whole_known = (WholeDistribution(teacher), best_tokens(teacher, 4, 2.0))
    part_known = (WholeDistribution(teacher[..., own]), best_tokens(teacher[..., own], 4, 2.0, dist.group.WORLD))
    for alone, shared in zip(whole_known, part_known, strict=True):
        one, part = student.clone().requires_grad_(), student[..., own].clone().requires_grad_()
        expected, found = divergence(one, alone, 2.0), divergence(part, shared, 2.0, dist.group.WORLD)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        expected.sum().backward()
        found.sum().backward()
        assert one.grad is not None
        torch.testing.assert_close(part.grad, one.grad[..., own], rtol=1e-12, atol=1e-12)


def everything(directory: str) -> None:
    share_a_vocabulary()
    teach_gpt(1, None, "end", directory)
    teach_gpt(2, "bf16", "late", directory)
    teach_autoep(1, {"alpha": 1.0})
    teach_autoep(
        2, {"alpha": 0.5, "beta": 0.5, "gamma": 1.0}, join="late", merge="cg1", adapt={"shared_expert": "mean"}
    )


def test_the_teacher_is_the_source_at_every_step(tmp_path: Path) -> None:
    run_distributed(everything, 2, str(tmp_path))
