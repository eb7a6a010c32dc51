"""Makes a `ScMoE` of a `deepspeed.moe.layer.MoE`. It holds the same parameters under the same names."""

from __future__ import annotations

import copy
from typing import Literal, Union

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.compat import parameters_of
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.experts import reset_parameters
from scmoe_ds.moe.placement import Placement
from scmoe_ds.replace.layer import HookedScMoE

SharedFrom = Union[int, Literal["fresh", "mean"]]


def convert(name: str, moe: MoE, config: ScMoEConfig) -> HookedScMoE:
    """The layer that takes the place of a MoE before an engine is made.

    Both layers hold the same gate and experts; for a Residual MoE also the same shared expert and coefficient. A plain
    MoE gets a shared expert.

    Args:
        name: path of the MoE in the model, for errors.
        config: its fields about merge, dispatch and wire format are used. The sizes are those of the MoE.

    Raises:
        ScMoEConfigError: a layer or a setting that cannot be replaced.
    """
    if type(moe) is not MoE:
        raise ScMoEConfigError(f"{name} is a {type(moe).__name__}, not DeepSpeed's own MoE: it cannot be replaced")
    if moe.deepspeed_moe.ep_group is not None:
        raise ScMoEConfigError(f"{name} has its process groups already: replace layers before deepspeed.initialize")
    if moe.deepspeed_moe.use_tutel:
        raise ScMoEConfigError(f"{name} is built with use_tutel=True; build it without, ScMoE brings its own dispatch")
    merge = config.written.get("merge", "cg2") if moe.use_residual else config.merge  # cg2: DeepSpeed's own
    layer = HookedScMoE.adopt(
        moe,
        merge=merge,
        shared=None if moe.use_residual else shared_expert(moe, config.shared_from),
        dispatch=config.dispatch,
        gate_softmax=config.gate_softmax,
        wire_dtype=config.wire_dtype,
        router=config.router,
    )
    layer.shortcut_norm = None
    _place_like(layer, moe)
    return layer


def routed_experts_per_token(moe: MoE, config: ScMoEConfig) -> int:
    """k of the layer that takes the place of `moe`; by default 1 for a plain MoE, which gets a shared expert.

    Raises:
        ScMoEConfigError: more than it has experts.
    """
    if "top_k" in config.written:
        if config.top_k > moe.num_experts:
            raise ScMoEConfigError(f"scmoe.top_k = {config.top_k}: exceeds the {moe.num_experts} experts of a layer")
        return config.top_k
    return int(moe.deepspeed_moe.gate.k) if moe.use_residual else 1


def shared_expert(moe: MoE, source: SharedFrom) -> nn.Module:
    """A shared expert for a plain MoE, of the form of its routed experts. Collective if several ranks hold the experts.

    Args:
        moe: the layer.
        source: "fresh": initialised anew; "mean": of all experts; a number: a copy of that expert.

    Raises:
        ScMoEConfigError: the number of an expert that does not exist.
    """
    members = list(moe.deepspeed_moe.experts.deepspeed_experts)
    new = copy.deepcopy(members[0])
    for parameter in new.parameters():
        for mark in ("allreduce", "group_name"):  # DeepSpeed's marks of a routed expert
            parameter.__dict__.pop(mark, None)
    if source == "fresh":
        new.apply(reset_parameters)
        return new
    if isinstance(source, int) and not 0 <= source < moe.num_experts:
        raise ScMoEConfigError(f"scmoe.shared_from = {source}: the layer has experts 0 … {moe.num_experts - 1}")
    for name, parameter in new.named_parameters():
        held = [member.get_parameter(name).detach() for member in members]
        with torch.no_grad():
            parameter.copy_(_mean(held, moe) if source == "mean" else _one(held, int(source), moe))
    return new


def _mean(held: list[Tensor], moe: MoE) -> Tensor:
    mean = torch.stack(held).mean(0)
    if moe.ep_size == 1:
        return mean
    # All ranks hold the same number of experts, and all experts are on the same number of ranks.
    divided_by = Placement.of(moe).expert_tensor_parallel_size
    return _sum_of_ranks(mean, divided_by) * (divided_by / dist.get_world_size())


def _one(held: list[Tensor], expert: int, moe: MoE) -> Tensor:
    found = held[expert % moe.num_local_experts].clone()
    if moe.ep_size == 1:
        return found
    owners = Placement.of(moe).first_ranks_of(expert)
    return _sum_of_ranks(found if dist.get_rank() in owners else torch.zeros_like(found), len(owners))


def _sum_of_ranks(value: Tensor, divided_by: int) -> Tensor:
    """Sum of the values of all ranks that hold the same piece of their experts."""
    piece = dist.get_rank() % divided_by
    sums = value.new_zeros(divided_by, *value.shape)
    sums[piece] = value
    dist.all_reduce(sums)
    return sums[piece]


def _place_like(layer: nn.Module, moe: MoE) -> None:
    """Moves new parts to the device of the old ones, in their precision."""
    old = next(moe.deepspeed_moe.experts.parameters())
    kept = {id(parameter) for parameter in moe.parameters()}
    for module in layer.modules():
        if any(part is not None and id(part) not in kept for part in parameters_of(module).values()):
            module.to(device=old.device, dtype=old.dtype)
