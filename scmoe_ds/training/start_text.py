"""What will be trained: facts for the record of a run, and a few lines of them at its start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.partition import whole_experts
from scmoe_ds.moe.shortcut import DGMoE
from scmoe_ds.offload.trainable import TrainableExperts
from scmoe_ds.parallel.groups import nodes_of_ranks
from scmoe_ds.parallel.tensor import data_parallel_size, tensor_parallel_size
from scmoe_ds.planner.schedule_text import layers_text
from scmoe_ds.training.log import say
from scmoe_ds.training.loop import Trainer
from scmoe_ds.training.record import FILE_NAME
from scmoe_ds.training.step_text import rounded, three_digits
from scmoe_ds.training.utilization import card_name, memory_there_gib

_GIB = 2**30
_MOMENTS = {"sgd": 0, "lion": 1, "adagrad": 1, "muon": 1}
"""Numbers per parameter that an optimizer keeps, by words in its name; Adam and its kind: two."""


@dataclass(frozen=True)
class TrainingData:
    """What is read.

    Attributes:
        shown: as the flags name it.
        parts: of each data set its weight (they need not add up to 1), and its tokens or images for training.
    """

    shown: str
    parts: Sequence[tuple[float, int]]


def announce(trainer: Trainer, loaded: LoadedConfig, data: TrainingData) -> None:
    """Says what will be trained, and notes it in the run's record. Collective."""
    facts = start_facts(trainer, loaded, data)
    say("\n".join(start_lines(facts)))
    trainer.log.start(facts | {"summary": start_rows(facts)})


def start_facts(trainer: Trainer, loaded: LoadedConfig, data: TrainingData) -> dict[str, Any]:
    """The facts, JSON values under names for programs. Collective."""
    settings, whole, config = trainer.settings, loaded.whole, loaded.section
    model, tp, replicas = trainer.engine.module, tensor_parallel_size(), data_parallel_size()
    experts = [whole_experts(layer) for layer in model.moe_layers()]
    divided = tp if config.expert_tensor_parallelism else 1
    edp = dist.get_world_size() // (config.expert_parallel_size * divided)
    total, active, own, own_experts = parameters_of(model, tp)
    shape = {key: value for key, value in vars(model.settings).items() if not callable(value)}
    samples = settings.rank_batch_size * replicas
    units = samples * settings.seq_length
    return {
        "iteration": trainer.iteration,
        "train_iters": settings.train_iters,
        "model": "GPT" if isinstance(model, GPT) else "SwinV2-MoE",
        "architecture": config.architecture,
        "position": config.position if config.has_shortcut else None,
        "merge": config.merge if config.architecture == "scmoe" else None,
        "join": config.join,
        "converted_layers": _converted(config, len(experts)),
        "shape": shape,
        "experts": experts,
        "adapt": None if config.adapt is None else config.adapt.model_dump(mode="json"),
        "top_k": config.top_k,
        "parameters": total,
        "active_parameters": active,
        "rank_parameters": own,
        "precision": trainer.description["layout"]["precision"],
        "zero_stage": trainer.description["layout"]["zero_optimization.stage"],
        "optimizer": str(whole.get("optimizer", {}).get("type", "AdamW")),
        "ranks": dist.get_world_size(),
        "nodes": len(set(nodes_of_ranks())),
        "card": card_name(),
        "peak_tflops": trainer.log.peak_tflops,
        "expert_parallel": config.expert_parallel_size,
        "expert_data_parallel": edp,
        "tensor_parallel": tp,
        "data_parallel": replicas,
        "micro_batch_size": settings.micro_batch_size,
        "accumulation_steps": settings.accumulation_steps,
        "samples_per_step": samples,
        "units_per_step": units,
        "seq_length": settings.seq_length,
        "data": data.shown,
        **_epochs(data, units, settings.train_iters),
        "state_gib": state_bytes(own - own_experts, own_experts, whole, replicas, edp) / _GIB,
        "memory_there_gib": memory_there_gib(),
        **_places(settings.save, settings.save_interval, whole),
    }


def _converted(config: ScMoEConfig, layers: int) -> list[int] | None:
    """Numbers of the MoE layers that are ScMoE; None: all are, or none is to be."""
    found = [layer for layer in range(layers) if config.of_layer(layer).has_shortcut]
    return None if len(found) in (0, layers) and config.adapt is None else found


def parameters_of(model: nn.Module, tensor_parallel: int) -> tuple[int, int, int, int]:
    """Parameters of the whole model, active for a token, on this rank, and this rank's of routed experts.

    Active are all but the routed experts that a token is not sent to. Offloaded experts are not on this rank.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    routed = {id(each): layer for layer in layers for each in layer.deepspeed_moe.experts.parameters()}
    total = active = own = own_experts = 0.0
    for parameter in model.parameters():
        whole = parameter.numel() * (tensor_parallel if getattr(parameter, "tensor_model_parallel", False) else 1)
        own += parameter.numel()
        layer = routed.get(id(parameter))
        if layer is None:
            total, active = total + whole, active + whole
            continue
        own_experts += parameter.numel()
        if isinstance(moved := layer.deepspeed_moe.experts, TrainableExperts):  # each parameter stands for a group
            group = next(number for number, each in moved.stand_ins.items() if each is parameter)
            place = moved.states.shape.groups[group]
            whole = (place.stop - place.start) * moved.num_local_experts
        chosen = min(layer.deepspeed_moe.gate.k * (2 if isinstance(layer, DGMoE) else 1), whole_experts(layer))
        total += whole * layer.ep_size
        active += whole * layer.ep_size * chosen / whole_experts(layer)
    return round(total), round(active), round(own), round(own_experts)


def state_bytes(dense: int, experts: int, whole: Mapping[str, Any], replicas: int, expert_replicas: int) -> float:
    """About the memory of weights, gradients and optimizer states on a rank; activations come on top.

    Args:
        dense, experts: parameters on this rank.
        whole: the DeepSpeed JSON.
        replicas, expert_replicas: ranks among which ZeRO divides the states of dense parameters, and of experts.
    """
    half = any(whole.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    zero = whole.get("zero_optimization", {})
    stage, optimizer = zero.get("stage", 0), str(whole.get("optimizer", {}).get("type", "AdamW")).lower()
    moments = next((number for name, number in _MOMENTS.items() if name in optimizer), 2)
    copies = 1 if half or stage else 0  # ZeRO keeps fp32 weights of its own, whatever the model's are
    states = 4 * (moments + copies)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none" and card_name() != "CPU":
        states = 0
    weights = gradients = 2 if half else 4

    def of(number: int, ranks: int) -> float:
        divided = gradients / ranks if stage >= 2 else gradients
        return number * (weights + divided + (states / ranks if stage else states))

    return of(dense, replicas) + of(experts, expert_replicas)


def _epochs(data: TrainingData, units_per_step: int, train_iters: int) -> dict[str, Any]:
    """Of a blend, the epochs of the data set that is repeated most often."""
    weights, sizes = [weight for weight, _ in data.parts], [size for _, size in data.parts]
    shares = [weight / max(sum(weights), 1e-9) for weight in weights]
    epochs = [share * units_per_step * train_iters / size for share, size in zip(shares, sizes, strict=True) if size]
    return {
        "data_units": sum(sizes),
        "data_sets": len(sizes),
        "steps_per_epoch": sum(sizes) / units_per_step,
        "epochs": max(epochs, default=None),
    }


def _places(save: str | None, interval: int | None, whole: Mapping[str, Any]) -> dict[str, Any]:
    boards = {}
    for name in ("tensorboard", "csv_monitor"):
        section = whole.get(name, {})
        path = os.path.join(section.get("output_path") or "", section.get("job_name") or "DeepSpeedJobName")
        boards[name] = path if section.get("enabled") else None
    record = str(Path(save) / FILE_NAME) if save else None
    return {"save": save, "save_interval": interval, "record": record, **boards}


def start_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts for people: a heading, then a line per subject."""
    heading = f"training {facts['architecture']} from iteration {facts['iteration']} to {facts['train_iters']}"
    return [heading, *(f"  {name:<11}{text}" for name, text in start_rows(facts).items())]


def start_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts for people, by subject."""
    unit = "images" if facts["seq_length"] == 1 else "tokens"
    return {
        "model": _model_text(facts),
        "parameters": f"{rounded(facts['parameters'])} in all, {rounded(facts['active_parameters'])} active per "
        f"token, {rounded(facts['rank_parameters'])} on a rank",
        "precision": f"{facts['precision']}, ZeRO stage {facts['zero_stage']}, {facts['optimizer']}{_peak_text(facts)}",
        "ranks": f"{facts['ranks']} × {facts['card']} on {facts['nodes']} node{'s' * (facts['nodes'] > 1)}: expert "
        f"parallel {facts['expert_parallel']} × expert data parallel {facts['expert_data_parallel']}; tensor parallel "
        f"{facts['tensor_parallel']} × data parallel {facts['data_parallel']}",
        "batch": _batch_text(facts, unit),
        "data": _data_text(facts, unit),
        "memory": _memory_text(facts),
        "output": _output_text(facts),
    }


def _model_text(facts: Mapping[str, Any]) -> str:
    shape, experts = facts["shape"], facts["experts"]
    words = [facts[name] for name in ("model", "architecture", "position", "merge")]
    kind = " ".join(filter(None, [*words, "late join" if facts["join"] == "late" else None]))
    numbers = str(experts[0]) if len(set(experts)) == 1 else ", ".join(map(str, experts))
    if facts["model"] == "GPT":
        size = f"{shape['num_layers']} blocks of {shape['hidden_size']}, vocabulary {shape['vocab_size']}"
    else:
        size = f"{'-'.join(map(str, shape['depths']))} blocks from {shape['embed_dim']}, {shape['image_size']} pixels"
    plural = "s" if len(experts) > 1 else ""
    adapted = "" if facts["converted_layers"] is None else f"; converted: {layers_text(facts['converted_layers'])}"
    return f"{kind}: {size}; {len(experts)} MoE layer{plural} of {numbers} experts, top-{facts['top_k']}{adapted}"


def _peak_text(facts: Mapping[str, Any]) -> str:
    if facts["card"] == "CPU":
        return ""
    if facts["peak_tflops"] is None:
        return "; the card's peak is not known: no MFU"
    return f"; MFU is the share of {facts['peak_tflops']:g} TFLOP/s"


def _memory_text(facts: Mapping[str, Any]) -> str:
    where = "machine" if facts["card"] == "CPU" else "card"
    return (
        f"about {_size_text(facts['state_gib'])} on a rank for weights, gradients and optimizer states, plus "
        f"activations; the {where} has {_size_text(facts['memory_there_gib'])}"
    )


def _size_text(gib: float) -> str:
    return f"{three_digits(gib)} GiB" if gib >= 1 else f"{three_digits(1024 * gib)} MiB"


def _batch_text(facts: Mapping[str, Any], unit: str) -> str:
    samples = facts["samples_per_step"]
    amount = f"{samples} images"
    if unit == "tokens":
        amount = f"{samples} sequences, {rounded(facts['units_per_step'])} tokens"
    return (
        f"{amount} a step: {facts['micro_batch_size']} × {facts['accumulation_steps']} accumulated × "
        f"{facts['data_parallel']} data-parallel ranks"
    )


def _data_text(facts: Mapping[str, Any], unit: str) -> str:
    sets = f" in {facts['data_sets']} data sets" if facts["data_sets"] > 1 else ""
    text = f"{facts['data']}: {rounded(facts['data_units'])} {unit}{sets}, {rounded(facts['steps_per_epoch'])} steps"
    if facts["epochs"] is None:
        return text
    most = " of the most repeated one" if sets else ""
    seen = facts["epochs"]
    seen_text = f"{rounded(seen)} epochs" if seen > 1 else f"{100 * seen:.3g} % of an epoch"
    return f"{text} an epoch; the run sees {seen_text}{most}"


def _output_text(facts: Mapping[str, Any]) -> str:
    every = f" every {facts['save_interval']} steps" if facts["save_interval"] else " at the end"
    texts = (
        [f"checkpoints{every} and {FILE_NAME} in {facts['save']}"] if facts["save"] else ["no --save: no checkpoint"]
    )
    names = {"tensorboard": "TensorBoard", "csv_monitor": "CSV"}
    texts += [f"{name} in {facts[key]}" for key, name in names.items() if facts[key]]
    return "; ".join(texts)
