"""The pairs of a model, whoever wrote it: what their times depend on, and what the log says of their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from scmoe_ds.config import ScMoEConfig
from scmoe_ds.models.blocks import ScheduledRun
from scmoe_ds.overlap.adaptive import AdaptiveOverlap
from scmoe_ds.overlap.executor import backbone_names
from scmoe_ds.overlap.plan_text import layers_text
from scmoe_ds.replace.convert import HookedScMoE
from scmoe_ds.replace.hooked import HookedPair

ModelPair = Union[ScheduledRun, HookedPair]


def pairs_of(model: nn.Module) -> list[ModelPair]:
    """This package's own runs of blocks and replaced layers, in the order of the model's modules."""
    pairs: list[ModelPair] = []
    for module in model.modules():
        if isinstance(module, ScheduledRun):
            pairs.append(module)
        elif isinstance(module, HookedScMoE) and module.pair is not None:
            pairs.append(module.pair)
    return pairs


def describe_pair(
    pair: ModelPair, config: ScMoEConfig, micro_batch_size: int, sequence: int | None, nodes: int
) -> dict[str, Any]:
    """All that a pair's times depend on; times are used again only where all of it agrees."""
    layer = pair.layer
    parameter = next(layer.parameters())
    return {
        **pair.facts(),
        "hidden_size": layer.deepspeed_moe.gate.wg.in_features,
        "num_experts": layer.num_experts,
        "top_k": layer.deepspeed_moe.gate.k,
        "capacity_factor": config.capacity_factor if config.drop_tokens else None,
        "dispatch": layer.dispatch,
        "wire_dtype": layer.wire_dtype,
        "all_to_all": config.all_to_all,  # the setting: which one "auto" takes can change from start to start
        "expert_parallel_size": layer.ep_size,
        "ranks_that_exchange": layer.transport.size,
        "tensor_parallel_size": bwc_tensor_model_parallel_world_size(groups.mpu),
        "expert_tensor_parallelism": config.expert_tensor_parallelism,
        "processes": dist.get_world_size(),
        "nodes": nodes,
        "micro_batch_size": micro_batch_size,
        "seq_length": sequence,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type,
    }


def describe_schedules(pairs: Sequence[ModelPair], config: ScMoEConfig, overlap: AdaptiveOverlap) -> list[str]:
    """One line per distinct schedule: the backbone, the slot, and where the slot comes from.

    The operators of a replaced layer show in the first forward pass: of it, the line says where its shortcut is taken.
    """
    if overlap.calibrating:
        origin = f"until {overlap.timed_micro_batches} micro-batches after the first have been timed, without overlap"
    elif overlap.times is not None:
        origin = f"from the times in {config.overlap.calibration_file}"
    elif config.overlap.expert_slot == "auto":
        origin = "auto: splits the backbone's FLOPs in half; nothing is timed"
    else:
        origin = "set by scmoe.overlap.expert_slot"
    lines: dict[str, list[int]] = {}
    replaced = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, HookedPair):
            replaced.append(f"MoE layer {index}: {pair.name} reads the {pair.place.side} of {pair.place.module_name}")
            continue
        names = backbone_names(pair)
        for chunk, slot in reversed(list(enumerate(pair.schedule.slots, start=1))):
            names.insert(slot - 1, f"[experts {chunk}]" if pair.schedule.num_chunks > 1 else "[routed experts]")
        mode = "overlapped" if pair.schedule.overlap else "without overlap"
        lines.setdefault(f"dispatch ⇢ {' → '.join(names)} ⇢ combine ({mode}; {origin})", []).append(index)
    return replaced + [f"schedule of MoE layer {layers_text(layers)}: {text}" for text, layers in lines.items()]
