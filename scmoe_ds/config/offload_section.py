"""`scmoe.offload_experts`: routed experts and their optimizer states out of the device's memory, in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from pydantic import Field

from scmoe_ds.config.deepspeed_json import at, is_on, offloads
from scmoe_ds.config.expert_parallel import uses_autoep
from scmoe_ds.config.overlap_section import Section


class OffloadConfig(Section):
    """`scmoe.offload_experts`: where routed experts and their optimizer states stay. Names as in DeepSpeed's
    offload_param and offload_optimizer."""

    device: Literal["cpu", "nvme"] = Field("cpu", description="cpu: the host's memory, pinned; nvme: a file.")
    nvme_path: Union[str, None] = Field(None, description="Directory for the file, on a fast disk of each machine.")
    buffer_count: int = Field(
        4, ge=2, strict=True, description="Experts whose weights are on the device at once, of all layers together."
    )


def rules_of_offload(section: Any) -> Iterator[tuple[str, bool, str]]:
    """What `ScMoEConfig` requires beside it: a field, whether its value breaks the rule, the rule with the remedy."""
    offload = section.offload_experts
    if offload is None:
        return
    beside = "beside scmoe.offload_experts"
    nameless = offload.device == "nvme" and not offload.nvme_path
    yield "offload_experts.nvme_path", nameless, "name a directory for the file of experts"
    unused = offload.device == "cpu" and offload.nvme_path is not None
    yield "offload_experts.nvme_path", unused, 'has no effect with device "cpu"; remove it, or set device to "nvme"'
    own = "DeepSpeed's own layers keep their experts; name an architecture of this package"
    yield "architecture", not section.is_scheduled, own
    yield (
        "expert_tensor_parallelism",
        bool(section.expert_tensor_parallelism),
        f"divided experts cannot move; remove it {beside}",
    )
    parts = section.expert_partition > 1
    yield (
        "expert_partition",
        parts,
        f"parts of experts cannot move; convert the checkpoint first, or remove it {beside}",
    )
    yield "dispatch", section.dispatch != "exact", f"padded buffers give every expert rows; set exact {beside}"
    yield "pairs_per_moe", section.pairs_per_moe > 1, f"an expert has one gradient for each pass; set 1 {beside}"
    yield "adapt", section.adapt is not None, f"an adapted model's layers hold their experts; remove it {beside}"
    yield "replace", section.replace, f"replaced layers hold their experts; remove it {beside}"
    chunks = section.overlap.num_chunks
    yield "overlap.num_chunks", chunks not in ("auto", 1), f"an expert has one gradient for each pass; set 1 {beside}"


def refusals_of_offload(whole: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """What the rest of a DeepSpeed JSON must not be beside it; the same three."""
    if at(whole, "scmoe.offload_experts") is None:
        return
    beside = "beside scmoe.offload_experts"
    remedy = f"must be 1 or 2 {beside}, whose experts make ZeRO's steps"
    yield "zero_optimization.stage", at(whole, "zero_optimization.stage") not in (1, 2), remedy
    for name in ("offload_optimizer", "offload_param"):
        both = "DeepSpeed moves the dense parameters' states only, and in another way; remove it"
        yield f"zero_optimization.{name}", offloads(whole, name), f"{both} {beside}"
    summed = f"DeepSpeed adds fp16 gradients up in fp32, those of experts stay in their dtype; use bf16 {beside}"
    yield "fp16.enabled", is_on(whole, "fp16.enabled"), summed
    in_bf16 = is_on(whole, "bf16.enabled") or is_on(whole, "bfloat16.enabled")
    sums = at(whole, "data_types.grad_accum_dtype")
    other = in_bf16 and sums not in (None, "bf16", "bfloat16")
    yield "data_types.grad_accum_dtype", other, f"gradients of experts are added up in bf16; remove it {beside}"
    yield "torch_autocast.enabled", is_on(whole, "torch_autocast.enabled"), f"use bf16 {beside}"
    yield "communication_data_type", at(whole, "communication_data_type") is not None, f"remove it {beside}"
    kind = at(whole, "optimizer.type")
    torchs = kind is None or (str(kind).lower() in ("adam", "adamw") and is_on(whole, "optimizer.params.torch_adam"))
    adam = f'must be Adam or AdamW with "torch_adam": true {beside}'
    yield "optimizer.type", not torchs, adam
    yield (
        "expert_parallel",
        uses_autoep(whole),
        f"AutoEP holds its experts in one tensor; remove the section or {beside[7:]}",
    )


def rules_of_world(section: Any, tensor_parallel_size: int) -> Iterator[tuple[str, bool, str]]:
    """What the tensor-parallel ranks must be beside it; the same three."""
    divided = section.offload_experts is not None and tensor_parallel_size > 1
    rule = f"experts cannot move beside {tensor_parallel_size} tensor-parallel ranks; set 1, or remove it"
    yield "offload_experts", divided, rule


def in_one_chunk(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section as it is meant: beside offloaded experts an "auto" number of chunks is 1."""
    overlap = section.get("overlap", {})
    if section.get("offload_experts") is None or not isinstance(overlap, Mapping):
        return section
    if overlap.get("num_chunks", "auto") != "auto":
        return section
    return {**section, "overlap": {**overlap, "num_chunks": 1}}
