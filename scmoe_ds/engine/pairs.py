"""The pairs of a model, whoever wrote it: what their times depend on, and what the log says of their schedules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Union

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.decisions.partition import parts_of, whole_experts
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.schedule_text import names_text, schedule_lines
from scmoe_ds.replace.as_is import AsIsPair
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.replacement import is_replaced, nothing_to_apply_to

ModelPair = Union[StagedPair, HookedPair, AsIsPair]

_OF_GATES = (
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "drop_tokens",
    "noisy_gate_policy",
    "use_rts",
    "top2_2nd_expert_sampling",
    "router",
)
_OF_LAYERS = ("dispatch", "gate_softmax", "wire_dtype")
_OF_SHORTCUTS = {"position", "first_layer_position", "shortcut_distance", "shortcut_norm"}


def pairs_of(model: nn.Module) -> list[ModelPair]:
    """This package's own pairs and those of replaced layers, in the order of the model's modules."""
    pairs: list[ModelPair] = []
    for module in model.modules():
        if isinstance(module, StagedPair):
            pairs.append(module.running)
        elif isinstance(pair := getattr(module, "pair", None), (HookedPair, AsIsPair)):
            pairs.append(pair)
    return pairs


def applied_to(model: nn.Module, config: ScMoEConfig) -> tuple[str, ScMoEConfig]:
    """What the section describes in a model, and the section with the expert-parallel size of its layers.

    The text is empty where nothing is new: a GPT was built from the section, and of replaced layers the log has spoken.

    Raises:
        ScMoEConfigError: nothing, or layers that are not as the section says.
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    layers = [(name, layer) for name, layer in named if isinstance(layer, StagedMoE)]
    if not layers:
        layers = _plain_layers(model, config, named)
    sizes = {layer.ep_size for _, layer in layers}
    if len(sizes) > 1:
        raise ScMoEConfigError(f"the MoE layers have expert-parallel sizes {sorted(sizes)}; build them with one")
    _check_sizes(layers, config)
    _warn_of_other_settings(layers, config)
    _warn_of_idle_settings(model, config)
    config = config.model_copy(update={"expert_parallel_size": sizes.pop()})
    kinds = Counter("ScMoE" if isinstance(layer, HookedScMoE) else type(layer).__name__ for _, layer in layers)
    kinds_text = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    experts = "/".join(str(number) for number in sorted({layer.num_experts for _, layer in layers}))
    text = (
        f'the "scmoe" section applies to {kinds_text} ({names_text([name for name, _ in layers])}): {experts} experts, '
        f"top-{layers[0][1].deepspeed_moe.gate.k}, expert-parallel size {layers[0][1].ep_size}"
    )
    known = isinstance(model, GPT) or all(isinstance(layer, HookedScMoE) for _, layer in layers)
    return "" if known else text, config


def _plain_layers(model: nn.Module, config: ScMoEConfig, found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """DeepSpeed's own layers, if the section's architecture is one of DeepSpeed's baselines."""
    if not found:
        raise nothing_to_apply_to(model)
    names = f"{len(found)} × deepspeed.moe.layer.MoE, the first {found[0][0]}"
    kinds = {"shared_expert" if layer.use_residual else "topk" for _, layer in found}
    if config.is_scheduled:
        raise ScMoEConfigError(
            f'scmoe.architecture = "{config.architecture}": the model holds DeepSpeed\'s own layers '
            f'({names}); set "replace": true to make them ScMoE layers'
        )
    if kinds != {config.architecture}:
        raise ScMoEConfigError(
            f'scmoe.architecture = "{config.architecture}": the model\'s layers ({names}) are '
            f'"{" and ".join(sorted(kinds))}"; set that'
        )
    return found


def _check_sizes(layers: list[tuple[str, Any]], config: ScMoEConfig) -> None:
    for index, (name, layer) in enumerate(layers):
        own = config.of_layer(index)
        sizes: dict[str, tuple[Any, Any]] = {
            "num_experts": (own.experts_of(index), whole_experts(layer)),
            "expert_partition": (own.expert_partition, parts_of(layer)),
            "top_k": (own.top_k, layer.deepspeed_moe.gate.k),
            "expert_parallel_size": (own.expert_parallel_size, layer.ep_size),
            "merge": (own.merge, getattr(layer, "merge", own.merge)),
        }
        for field, (asked, has) in sizes.items():
            if field in config.written and asked != has:
                raise ScMoEConfigError(f"scmoe.{field} = {asked!r}: {name} has {has!r}; set that, or remove the field")


def _warn_of_other_settings(layers: list[tuple[str, Any]], config: ScMoEConfig) -> None:
    """Warns of fields that only this package's own models apply: layers that others built keep their settings."""
    differ: dict[str, str] = {}
    for name, layer in layers:
        gate = layer.deepspeed_moe.gate
        for field in sorted(config.written.keys() & {*_OF_GATES, *_OF_LAYERS}):
            asked = getattr(config, field)
            has = getattr(gate if field in _OF_GATES else layer, field, RouterConfig() if field == "router" else asked)
            if asked != has:
                differ.setdefault(field, f"scmoe.{field} = {asked!r}, {name} has {has!r}")
    if differ:
        text = f"not applied, the layers keep what they were built with: {'; '.join(differ.values())}"
        log(text, level=logging.WARNING)


def _warn_of_idle_settings(model: nn.Module, config: ScMoEConfig) -> None:
    """Warns of fields that mean nothing to the layers, as after the architecture alone was changed."""
    architecture, idle = config.architecture, set[str]()
    if not config.has_shortcut:
        idle |= _OF_SHORTCUTS
    without_shared = architecture in ("topk", "pipelined_topk", "dgmoe")
    if without_shared or (architecture == "shared_expert" and config.merge != "cg2"):  # DeepSpeed's own merge
        idle.add("merge")
    if not config.is_scheduled:
        idle |= {"dispatch", "wire_dtype"}
    if not is_replaced(model):
        idle |= {"tap", "shared_from"}
        if config.is_scheduled and not pairs_of(model):  # layers in a model that calls their stages itself
            idle |= {*_OF_SHORTCUTS, "join", "post_norm"}
    if idle := idle & config.written.keys():
        names = ", ".join(f"scmoe.{field}" for field in sorted(idle))
        log(f'no effect on these layers of architecture "{architecture}": {names}', level=logging.WARNING)


def describe_pair(
    pair: ModelPair, config: ScMoEConfig, micro_batch_size: int, sequence: int | None, nodes: int
) -> dict[str, Any]:
    """All that a pair's times depend on. Times are used again only if all of it agrees."""
    layer = pair.layer
    parameter, parts = next(layer.parameters()), parts_of(layer)
    return {
        **pair.facts(),
        "hidden_size": layer.hidden_size,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        **({"expert_partition": parts} if parts > 1 else {}),  # earlier files know whole experts alone
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


def describe_schedules(pairs: Sequence[ModelPair], model: nn.Module, overlap: Calibrator) -> list[str]:
    """The schedules that training begins with, and where they come from.

    A replaced layer's operators show in its first forward pass only, which is when they are logged.
    """
    for pair in pairs:
        if isinstance(pair, HookedPair) and pair.first_pass is not None:
            pair.first_pass.origin = overlap.origin
    own = {number: pair for number, pair in enumerate(pairs) if not isinstance(pair, HookedPair)}
    if not pairs and any(isinstance(module, StagedMoE) for module in model.modules()):
        return ["no schedule: the experts run where your model calls run_experts, or without overlap in forward"]
    if own and overlap.timing is not None:
        return [f"schedule: chosen by times, which {overlap.timing.text} measure without overlap"]
    return schedule_lines(own, overlap.origin)
