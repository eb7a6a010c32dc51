"""AutoEP's layers under a schedule: the layer of DeepSpeed, on the same input, is the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import FAMILIES, SEQUENCE, tiny
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.autoep import ScheduledAutoEP

COMPUTED = [family for family in FAMILIES if family != "longcat_flash"]
"""AutoEP's own forward pass knows no identity experts; see test_longcat.py."""
SCHEDULES = [Schedule(1), Schedule(1, 2), Schedule(2, overlap=False)]


def config(ep: int, stage: int = 1, **autoep: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "expert_parallel": {"enabled": True, "autoep_size": ep, **autoep},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "scmoe": {"overlap": {"calibration_steps": 0}},
    }


def passes(layer: AutoEPMoELayer, forward: Any, tokens: Tensor) -> list[Tensor]:
    """Output, router logits if there are any, and the gradients of the input and of all parameters."""
    tokens = tokens.clone().requires_grad_()
    output = forward(tokens)
    outputs = [each for each in output if each is not None] if isinstance(output, tuple) else [output]
    weights = [torch.linspace(-1, 1, each.numel()).view_as(each) for each in outputs]
    loss = sum((each * weight).sum() for each, weight in zip(outputs, weights, strict=True))
    read = [tokens, *(each for each in layer.parameters() if each.requires_grad)]
    return [*outputs, *torch.autograd.grad(loss, read)]


def differences(families: list[str], ep: int, autoep: dict[str, Any]) -> dict[str, float]:
    """The largest difference to AutoEP's own forward pass, by family."""
    found = {}
    for family in families:
        engine, *_ = scmoe_ds.initialize(model=tiny(family), config=config(ep, **autoep))
        layers = [each for each in engine.module.modules() if isinstance(each, ScheduledAutoEP)]
        assert len(layers) == 2
        rank = dist.get_rank()
        # Ranks with different numbers of tokens, one of them without any.
        for layer, sequence in zip(layers, (SEQUENCE + 3 * rank, SEQUENCE * rank), strict=True):
            tokens = torch.randn(2, sequence, layer.hidden_size, generator=torch.Generator().manual_seed(rank))
            theirs = passes(layer, lambda given, layer=layer: AutoEPMoELayer.forward(layer, given), tokens)
            before = layer.tokens_per_expert.clone()
            for schedule in SCHEDULES:
                layer.pair.schedule = Schedule(1, schedule.num_chunks, schedule.overlap)
                if layer.shared_experts is not None:
                    layer.pair.schedule = schedule
                ours = passes(layer, layer, tokens)
                assert [each.shape for each in ours] == [each.shape for each in theirs]
                worst = max(
                    (float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True) if a.numel()), default=0
                )
                found[family] = max(found.get(family, 0.0), worst)
            counted = (layer.tokens_per_expert - before).sum()
            assert counted == len(SCHEDULES) * tokens.shape[0] * sequence * layer.top_k
    return found


SETTINGS = {"as they are": {}, "pre": {"score_apply": "pre"}, "loop": {"use_grouped_mm": False}}


def in_all_settings(families: list[str]) -> dict[str, dict[str, float]]:
    few = ["qwen2_moe", "deepseek_v3"]
    return {name: differences(few if autoep else families, 2, autoep) for name, autoep in SETTINGS.items()}


def test_output_and_gradients_are_autoeps() -> None:
    families = [family for family in FAMILIES if family != "longcat_flash"]  # see test_longcat.py
    for found in run_distributed(in_all_settings, 2, families):
        assert found["as they are"].keys() == set(families)
        for name, of_setting in found.items():
            assert max(of_setting.values()) < 1e-5, (name, of_setting)
