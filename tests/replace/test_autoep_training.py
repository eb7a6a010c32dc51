"""Training of Hugging Face MoE models through AutoEP under a schedule, against AutoEP alone: two ranks, one spawn.

benchmarks/quality/autoep_parity.py compares all families in all layouts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import scmoe_ds
from benchmarks.quality.autoep_parity import compared, config, mistakes, worst_of_ranks
from lab.distributed import run_distributed
from lab.moe_families import batch, tiny
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.attach import attach, prepare_autoep
from scmoe_ds.errors import ScMoEConfigError

SECTION = {"overlap": {"calibration_steps": 0, "num_chunks": 2}}


def engine_for(model: nn.Module, stage: int = 1, ours: bool = True, optimizer: Any = None, **settings: Any) -> Any:
    whole = config(2, stage) | settings | ({"scmoe": SECTION} if ours else {})
    if optimizer is not None:
        del whole["optimizer"]
    prepare_autoep(model, whole)
    initialize = scmoe_ds.initialize if ours else deepspeed.initialize
    return initialize(model=model, config=whole, optimizer=optimizer)[0]


def losses(engine: Any, steps: int = 3, first: int = 0) -> list[float]:
    found = []
    for step in range(first, first + steps):
        loss = engine(**batch(step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def checkpointed(reentrant: bool) -> nn.Module:
    model = tiny("qwen2_moe")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def routed(engine: Any) -> float:
    """Choices that the layers' statistics have counted, of all layers."""
    return float(sum(each.tokens_per_expert.sum() for each in engine.module.modules() if hasattr(each, "pair")))


def attention_alone() -> nn.Module:
    """All else is frozen, routers and experts too."""
    model = tiny("deepseek_v3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    return model


def trained_alone() -> list[float]:
    """By DeepSpeed, in the stage in which it knows frozen experts."""
    model = attention_alone()
    trained = (each for each in model.parameters() if each.requires_grad)
    return losses(deepspeed.initialize(model=model, model_parameters=trained, config=config(2, 3))[0])


def refusals(engine: Any) -> list[str]:
    whole, found = config(2, 1) | {"scmoe": SECTION}, []
    section = ScMoEConfig.from_deepspeed(whole)
    for again in (
        lambda: attach(engine, whole, section),
        lambda: scmoe_ds.initialize(model=engine.module, config=whole),
    ):
        try:
            again()
        except ScMoEConfigError as error:
            found.append(str(error))
    return found


def everything(directory: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    rank, found = dist.get_rank(), {}
    found["parity"] = compared(["qwen2_moe", "glm4_moe"], 2, [3], 8) + compared(["mixtral", "deepseek_v3"], 2, [2], 8)

    plain = losses(engine_for(tiny("qwen2_moe"), ours=False))
    for reentrant in (False, True):
        engine = engine_for(checkpointed(reentrant))
        found[f"checkpointing {reentrant}"] = losses_differ(plain, engine)
        found[f"counted {reentrant}"] = routed(engine)

    made = functools.partial(torch.optim.AdamW, lr=1e-3)
    model = tiny("qwen2_moe")
    found["client optimizer"] = losses_differ(plain, engine_for(model, optimizer=made(model.parameters())))
    found["client function"] = losses_differ(plain, engine_for(tiny("qwen2_moe"), optimizer=made))

    with_logits = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    theirs = losses(engine_for(tiny("mixtral", **with_logits), ours=False))
    found["balancing loss"] = losses_differ(theirs, engine_for(tiny("mixtral", **with_logits)))
    found["without it"] = losses_differ(theirs, engine_for(tiny("mixtral")))

    theirs = trained_alone()
    found["attention alone"] = losses_differ(theirs, engine_for(attention_alone()))
    found["all of it"] = losses_differ(theirs, engine_for(tiny("deepseek_v3")))

    theirs, ours = (engine_for(tiny("deepseek_v3"), ours=each) for each in (False, True))
    found["again"] = refusals(ours)
    losses(theirs), losses(ours)
    ours.save_checkpoint(directory, tag="1")
    before = losses(ours, first=3)
    theirs.load_checkpoint(directory, tag="1")
    found["AutoEP resumes"] = losses_differ(before, theirs, first=3)
    for each in (theirs, ours):
        each.eval()
    with torch.no_grad():  # ranks with different numbers of tokens
        tokens = batch(9, rank, size=1 + rank, sequence=5 + 3 * rank)["input_ids"]
        found["evaluation"] = float((theirs(tokens).logits - ours(tokens).logits).abs().max())
        made_up = [
            each.module.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=2) for each in (theirs, ours)
        ]
        found["generated alike"] = torch.equal(*made_up)
    return found


def losses_differ(expected: list[float], engine: Any, first: int = 0) -> float:
    return max(abs(a - b) for a, b in zip(expected, losses(engine, first=first), strict=True))


def test_trains_as_under_autoep_alone(tmp_path: Path) -> None:
    found = run_distributed(everything, 2, str(tmp_path))
    assert mistakes(worst_of_ranks([each.pop("parity") for each in found])) == []
    for each in found:
        assert each.pop("without it") > 0.1
        assert each.pop("all of it") > 1e-3
        attached, made = each.pop("again")
        assert attached == "attach: the engine's layers run under schedules already; attach once"
        assert "DeepseekV3ForCausalLM are AutoEP layers already, of an engine that was made of it; use that" in made
        assert each.pop("generated alike")
        for name in ("counted False", "counted True"):  # once, although the pass was repeated
            assert each.pop(name) == 3 * 2 * 2 * 16 * 3
        assert max(each.values()) < 1e-5, each
