"""Routed experts out of the device's memory, brought there as they are needed (paper appendix A.3).

The gate of a ScMoE reads the preceding layer: which experts a token needs is known, not guessed, as early as the
shortcut is taken, and their parameters migrate while the backbone computes. The expert computation waits for exactly
those that it needs.

    "offload"        asks for an expert when its computation is due: the migration blocks
    "offload-async"  asks for all of them as soon as the gate has chosen
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from scmoe_ds.checkpoint.extents import EXPORT_AGAIN, extents_of
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.attachment import OFFLOADED, check
from scmoe_ds.inference.model import DTYPES, TrainedModel
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.experts import MovingExperts
from scmoe_ds.moe.placement import global_names, layer_of
from scmoe_ds.offload.slots import expert_slots, slot_dtype
from scmoe_ds.offload.sources import DiskExperts, ExpertSource, HostExperts
from scmoe_ds.offload.store import ExpertKey, ExpertStore
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.parallel.output import log

MODES = ("resident", "offload", "offload-async")


@dataclass(frozen=True)
class Offloading:
    """How routed experts are kept out of the device's memory.

    Attributes:
        mode: "offload" or "offload-async".
        cache: what the device keeps of all layers together: a number of experts, or a size such as "2GB"; None: twice
            the experts of a token.
        tier: "host" is pinned memory beside a GPU; "disk" the files of an export; None: host for a GPU, else disk.
    """

    mode: str
    cache: str | None = None
    tier: Literal["host", "disk"] | None = None


class OffloadedExperts(MovingExperts):
    """Takes the place of a layer's experts; see scmoe_ds.moe.experts.MovingExperts.

    Args:
        store: of all layers.
        layer: MoE layer of this model, from 0.
        num_local_experts: of this rank.
        early: ask for experts as soon as they are known.
    """

    def __init__(self, store: ExpertStore, layer: int, num_local_experts: int, early: bool) -> None:
        super().__init__()
        self.store, self.layer, self.num_local_experts, self.early = store, layer, num_local_experts, early

    def announce(self, rows_per_expert: Sequence[int]) -> None:
        """Which experts the next `run` needs."""
        if self.early:
            self.store.fetch(self.needed(rows_per_expert))

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """[S, D] → [S, D]: each needed expert on its own rows."""
        parts = rows_SD.split(list(rows_per_expert))
        outputs = list(parts)  # those of experts without rows are empty
        for key in self.needed(rows_per_expert):
            if not self.early:
                self.store.fetch([key])
            module = self.store.take(key)
            outputs[key.expert] = module(parts[key.expert])
            self.store.release(key)
        return torch.cat(outputs)

    def needed(self, rows_per_expert: Sequence[int]) -> list[ExpertKey]:
        """Experts that have rows, in the order in which `run` computes them."""
        return [ExpertKey(self.layer, expert) for expert, rows in enumerate(rows_per_expert) if rows]


def offload_experts(
    model: GPT,
    trained: TrainedModel,
    mode: str,
    places: int,
    dtype: torch.dtype,
    device: torch.device,
    tier: Literal["host", "disk"] | None = None,
) -> ExpertStore:
    """Hands a model's experts, which are on the meta device, over to a store.

    Args:
        mode: "offload" or "offload-async".
        places: experts that fit on the device at once, of all layers together; at least 1, for "offload-async" 2
            where there are as many.
        tier: "host" is pinned memory beside a GPU; "disk" the files of an export; None: host for a GPU, else disk.

    Raises:
        CheckpointError: a checkpoint from which the tier cannot be read.
        ArgumentError: the system does not give enough pinned memory.
        ValueError: too few places, experts of different shapes, or divided ones.
    """
    least = min(2 if mode == "offload-async" else 1, num_experts(model))
    if places < least:
        raise ValueError(
            f"--expert-cache {places}: --experts {mode} keeps {least} experts at once; give {least} or more"
        )
    layers = {number: pair.layer for number, pair in enumerate(model.scheduled_pairs()) if pair.last.owns_moe}
    check(list(layers.values()), [OFFLOADED], f"--experts {mode}")
    named = _names(model)
    shapes = {
        tuple((part, model.get_parameter(local).shape) for part, local in _local_names(model, key).items())
        for key in named
    }
    if len(shapes) > 1:
        raise ValueError("--experts: experts of different shapes cannot share their places; use resident")
    parameters = [name for parts in named.values() for name in parts.values()]
    source: ExpertSource
    if (tier or ("host" if device.type == "cuda" else "disk")) == "host":
        source = HostExperts(trained.weights, parameters, dtype, device)
    else:
        source = DiskExperts(extents_of(trained.path, parameters), EXPORT_AGAIN, device)
    slots = expert_slots(expert_of(model), places, DTYPES[trained.dtype], dtype, device)
    store = ExpertStore(source, named.__getitem__, slots, max(layers) + 1)
    for index, layer in layers.items():
        layer.deepspeed_moe.experts = OffloadedExperts(store, index, layer.num_local_experts, mode == "offload-async")
    for pair in model.scheduled_pairs() if mode == "offload-async" else ():
        if pair.layer.transport.size == 1:  # no all-to-all needs the backbone, so that the migration gets all of it
            pair.schedule = replace(pair.schedule, expert_slot=len(backbone(pair)) + 1)
    return store


def places_on_device(
    cache: str | None, model: GPT, default: int, trained: TrainedModel, dtype: torch.dtype, device: torch.device
) -> int:
    """How many experts the device keeps, at most all that this rank has.

    Args:
        cache: of `Offloading`.
        default: number of experts without it.
        dtype: of the computation.

    Raises:
        ArgumentError: neither a number nor a size, or no room for one.
    """
    experts = num_experts(model)
    if cache is None:
        return min(default, experts)
    held = slot_dtype(expert_of(model), DTYPES[trained.dtype], dtype, device)
    places = expert_places(cache, sum(each.numel() for each in expert_of(model).parameters()) * held.itemsize)
    if places > experts:
        log(
            f"--expert-cache {cache}: has room for {places} experts, this rank has {experts}: all of them stay on the "
            "device"
        )
    return min(places, experts)


def expert_places(text: str, each_bytes: int) -> int:
    """How many experts --expert-cache has room for.

    Raises:
        ArgumentError: neither a number nor a size, or no room for one.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(i?)B", text, re.ASCII | re.IGNORECASE)
    if match:
        unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
        places = int(float(match[1]) * unit / each_bytes)
    elif re.fullmatch(r"\d{1,20}", text, re.ASCII):
        places = int(text)
    else:
        raise ArgumentError(f"--expert-cache {text[:40]}: must be a number of experts, or a size such as 500MB or 2GB")
    if places < 1:
        raise ArgumentError(f"--expert-cache {text}: has no room for one expert, which takes {each_bytes} bytes")
    return places


def num_experts(model: GPT) -> int:
    """Routed experts of all layers on this rank."""
    return sum(pair.layer.num_local_experts for pair in model.scheduled_pairs())


def expert_of(model: GPT) -> nn.Module:
    """One of the routed experts."""
    expert: nn.Module = model.scheduled_pairs()[0].layer.deepspeed_moe.experts.deepspeed_experts[0]
    return expert


def _names(model: GPT) -> dict[ExpertKey, Mapping[str, str]]:
    whole = global_names(model)
    keys = [
        ExpertKey(layer, expert)
        for layer, pair in enumerate(model.scheduled_pairs())
        if pair.last.owns_moe
        for expert in range(pair.layer.num_local_experts)
    ]
    return {key: {part: whole[local] for part, local in _local_names(model, key).items()} for key in keys}


def _local_names(model: GPT, key: ExpertKey) -> dict[str, str]:
    """Parameters of an expert, by their names within it: their names in this rank's model."""
    last = len(model.scheduled_pairs()[key.layer].blocks) - 1
    prefix = f"runs.{key.layer}.blocks.{last}.moe.deepspeed_moe.experts.deepspeed_experts.{key.expert}."
    assert layer_of(prefix + "x") is not None
    expert = model.get_submodule(prefix.removesuffix("."))
    return {part: prefix + part for part, _ in expert.named_parameters()}
