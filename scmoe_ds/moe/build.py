"""The MoE layers that a "scmoe" section describes, for models that are written, upcycled or replaced."""

from __future__ import annotations

from typing import Any

from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.config.messages import fail
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.moe.converted import ConvertedMoE
from scmoe_ds.moe.decisions.partition import divide_experts
from scmoe_ds.moe.deepspeed_gate import admit_any_tokens
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.router import equip
from scmoe_ds.moe.shortcut import DGMoE, ScMoE


def build_moe(
    config: ScMoEConfig,
    hidden_size: int,
    expert: nn.Module,
    num_experts: int,
    *,
    architecture: str | None = None,
    top_k: int | None = None,
    unequal: bool = False,
) -> MoE:
    """Builds one layer; DeepSpeed's own classes for "topk" and "shared_expert".

    Args:
        config: all settings but the sizes.
        hidden_size: last dimension of the layer's input.
        expert: is copied once per local expert; a shared expert is this very module.
        num_experts: of all ranks together, before `config.expert_partition` divides them; `expert` is of one part.
        architecture, top_k: used instead of the section's.
        unequal: for DeepSpeed's own classes: expert-parallel ranks may have different numbers of tokens.

    Raises:
        ValueError: see `StagedMoE`; a ScMoEConfigError for parts of experts of DeepSpeed's classes.
    """
    architecture = architecture or config.architecture
    arguments: dict[str, Any] = dict(
        hidden_size=hidden_size,
        expert=expert,
        num_experts=num_experts * config.expert_partition,
        ep_size=config.expert_parallel_size,
        k=top_k or config.top_k,
        capacity_factor=config.capacity_factor,
        eval_capacity_factor=config.eval_capacity_factor,
        min_capacity=config.min_capacity,
        noisy_gate_policy=config.noisy_gate_policy,
        drop_tokens=config.drop_tokens,
        use_rts=config.use_rts,
        enable_expert_tensor_parallelism=config.expert_tensor_parallelism,
        top2_2nd_expert_sampling=config.top2_2nd_expert_sampling,
    )
    if architecture in ("topk", "shared_expert"):
        _require_whole(config)
        moe = MoE(use_residual=architecture == "shared_expert", **arguments)
        return admit_any_tokens(moe, config.gate_softmax, unequal, config.router)
    of_layer = ("dispatch", "gate_softmax", "wire_dtype", "router")
    arguments.update({field: getattr(config, field) for field in of_layer})
    if config.expert_partition == 1:
        return _staged(config, architecture, arguments)
    layer = _staged(config, architecture, arguments | {"router": None})
    divide_experts(layer, config.expert_partition)
    if config.router != RouterConfig():
        equip(layer.deepspeed_moe.gate, config.router)  # of as many experts as it chooses from now
    return layer


def _require_whole(config: ScMoEConfig) -> None:
    """Of a section for this package's layers where these begin as DeepSpeed's, and are replaced later."""
    if config.expert_partition > 1 or config.expert_tensor_parallelism == "partition":
        field = "expert_partition" if config.expert_partition > 1 else "expert_tensor_parallelism"
        rule = "a SwinV2-MoE, and what moe_from_dense makes, has whole experts; remove the field"
        raise fail(f"scmoe.{field}", getattr(config, field), rule)


def _staged(config: ScMoEConfig, architecture: str, arguments: dict[str, Any]) -> StagedMoE:
    """One of this package's layers."""
    if architecture == "dgmoe":
        return DGMoE(**arguments)
    if architecture == "pipelined_topk":
        return StagedMoE(**arguments)
    if config.adapt is not None and config.adapt.base is not None:
        return ConvertedMoE(merge=config.merge, base=config.adapt.base, **arguments)
    return ScMoE(merge=config.merge, **arguments)
