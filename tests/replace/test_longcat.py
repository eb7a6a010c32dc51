"""LongCat-Flash under a schedule: transformers' own model, in one process on the tokens of all ranks, is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from lab.longcat_parity import FAMILY, config, differences, train, train_alone
from lab.moe_families import EXPERTS, batch, tiny
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError


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


def on_two_ranks(steps: int) -> dict[str, Any]:
    differ = {str(dtype): max(differences(2, dtype).values()) for dtype in (torch.float32, torch.float64)}
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


def test_the_example_is_a_valid_json() -> None:
    section = ScMoEConfig.from_deepspeed(Path(__file__).parents[2] / "examples/longcat_flash.json")
    assert section.architecture == "as_is" and section.router.load_balance_rule == "proportional"


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
