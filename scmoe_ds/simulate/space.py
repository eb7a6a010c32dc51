"""Which methods run a model, and the layouts that a method can have: what `search.py` searches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from scmoe_ds.errors import PlanError
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import MOST, Experts, Model
from scmoe_ds.simulate.refusals import refusal

Recompute = Literal[False, "selective", "full"]

_BASE = Layout(1)


@dataclass(frozen=True)
class Fixed:
    """What a user has decided; None: searched.

    Attributes:
        batch: samples of all ranks in a step.
        base: has the values that nobody searches, the precision among them.
        expert_parallel, tensor_parallel, zero_stage, micro_batch, recompute: as of `Layout`.
    """

    batch: int
    base: Layout = _BASE
    expert_parallel: int | None = None
    tensor_parallel: int | None = None
    zero_stage: int | None = None
    micro_batch: int | None = None
    recompute: Recompute | None = None


def why_not(model: Model, method: Method) -> str | None:
    """Why the method does not run the model, as the end of a sentence; None: it does."""
    added = method.architecture != "topk" and any(not each.shared_hidden for each in _experts(model))
    reasons = {
        "AutoEP distributes Hugging Face models alone": method.layer == "autoep" and not model.autoep,
        "AutoEP's layers take the place of DeepSpeed's in a Hugging Face model": method.layer == "deepspeed"
        and model.autoep,
        "a Hugging Face model runs as it is, or as a ScMoE": method.architecture == "shared_expert" and model.autoep,
        "it routes a token to one expert, and none would be left beside a shared expert": added
        and method.routed is None
        and any(each.top_k < 2 for each in _experts(model)),
        "every block has an MoE, and the shortcut would begin behind one": method.position in ("pos2", "pos3")
        and _is_dense_with_moes(model),
        "the blocks of a Swin have no late join": method.join == "late" and model.images,
    }
    return next((reason for reason, holds in reasons.items() if holds), refusal(model, method, Layout(1)))


def layouts(model: Model, method: Method, cluster: Cluster, fixed: Fixed) -> Iterator[Layout]:
    """All layouts that the method can have, whatever memory they need.

    A layout that needs less memory and cannot be faster comes behind its twin, which differs in ZeRO stage or
    recomputation alone.
    """
    world = cluster.nodes * cluster.gpus_per_node
    copies: Literal["choice", "rank"] = "rank" if (method.layer, method.dispatch) == OWN_EXACT else "choice"
    layer = replace(fixed.base, world=world, copies=copies)
    for tensor in _tensor_parallel(model, cluster, fixed):
        data = world // tensor
        if world % tensor or fixed.batch % data:
            continue
        samples = fixed.batch // data
        for expert in _expert_parallel(model, world, fixed):
            for micro in [fixed.micro_batch] if fixed.micro_batch else divisors(samples):
                if samples % micro:
                    continue
                sized = replace(
                    layer,
                    tensor_parallel=tensor,
                    expert_parallel=expert,
                    micro_batch=micro,
                    accumulation=samples // micro,
                )
                if refusal(model, method, sized) is None:
                    yield from _thrift(model, method, cluster, fixed, sized)


OWN_EXACT = ("scmoe_ds", "exact")
"""A token travels once to a rank, for all of its experts there."""


def _thrift(model: Model, method: Method, cluster: Cluster, fixed: Fixed, layout: Layout) -> Iterator[Layout]:
    """The layout with all ZeRO stages, recomputation and transports, fastest first."""
    spans_nodes = layout.expert_parallel > cluster.gpus_per_node
    # NCCL gathers rows inside a node by itself: "hierarchical" is for CPUs alone (ds_configs/README.md).
    can_gather = spans_nodes and cluster.gpu.capability == (0, 0) and method.layer == "scmoe_ds"
    for recompute in recomputes(model, method, fixed):
        for stage in zero_stages(model, fixed):
            for hierarchical in (False, True) if can_gather else (False,):
                yield replace(layout, recompute=recompute, zero_stage=stage, hierarchical=hierarchical)


def recomputes(model: Model, method: Method, fixed: Fixed) -> list[Recompute]:
    """A late join would have its combine cut between two blocks that are computed again."""
    if method.join == "late":
        allowed: list[Recompute] = [False] if model.autoep else [False, "selective"]
    elif model.images:
        allowed = [False]
    else:
        allowed = [False, "full"] if model.autoep else [False, "selective", "full"]
    return [each for each in allowed if fixed.recompute in (None, each)]


def zero_stages(model: Model, fixed: Fixed) -> list[int]:
    """What DeepSpeed runs right: bf16 and fp16 need a stage above 0, its own MoE layers one below 3."""
    allowed = [*([0] if fixed.base.precision == "fp32" else []), 1, 2, *([3] if model.autoep else [])]
    return [each for each in allowed if fixed.zero_stage in (None, each)]


def _tensor_parallel(model: Model, cluster: Cluster, fixed: Fixed) -> list[int]:
    """Within a node; AutoEP's models and Swins have none."""
    most = 1 if model.autoep or model.images else cluster.gpus_per_node
    sizes = [size for stage in model.stages for size in (stage.heads, stage.kv_heads, stage.mlp_hidden)]
    allowed = [each for each in divisors(cluster.gpus_per_node) if each <= most and not any(s % each for s in sizes)]
    return [each for each in allowed if fixed.tensor_parallel in (None, each)]


def _expert_parallel(model: Model, world: int, fixed: Fixed) -> list[int]:
    """An expert is whole on its rank: the groups go across tensor-parallel ranks."""
    counts = [each.num_experts for each in _experts(model)]
    allowed = [each for each in divisors(world) if not any(count % each for count in counts)]
    return [each for each in allowed if fixed.expert_parallel in (None, each)]


def require_possible(model: Model, cluster: Cluster, fixed: Fixed) -> None:
    """Raises a PlanError for a fixed value that no layout can have, named by its flag."""
    if fixed.batch > MOST:
        raise PlanError(f"--global-batch-size {fixed.batch} (train_batch_size): must be at most {MOST}")
    world = cluster.nodes * cluster.gpus_per_node
    free = Fixed(fixed.batch, fixed.base)
    tensor = _tensor_parallel(model, cluster, free)
    if fixed.tensor_parallel not in (None, *tensor):
        why = (
            "a Hugging Face model under AutoEP and a Swin have no tensor parallelism"
            if model.autoep or model.images
            else f"must divide the GPUs of a node, {cluster.gpus_per_node}, heads, key-value heads and the MLP's width"
        )
        raise PlanError(f"--tensor-parallel {fixed.tensor_parallel}: {why}; possible: {_listed(tensor)}")
    if fixed.zero_stage not in (None, *(stages := zero_stages(model, free))):
        raise PlanError(
            f"--zero-stage {fixed.zero_stage} (zero_optimization.stage): DeepSpeed does not train this model in "
            f"{fixed.base.precision} rightly with it; possible: {_listed(stages)}"
        )
    chosen = [fixed.tensor_parallel] if fixed.tensor_parallel else tensor
    data = [world // each for each in chosen if world % each == 0 and fixed.batch % (world // each) == 0]
    if not data:
        ranks = world // max(chosen)
        raise PlanError(
            f"--global-batch-size {fixed.batch} (train_batch_size): must be divisible by the {ranks} "
            f"data-parallel ranks of {world} GPUs; try {max(1, round(fixed.batch / ranks)) * ranks}"
        )
    experts = _expert_parallel(model, world, free)
    if fixed.expert_parallel not in (None, *experts):
        raise PlanError(
            f"--expert-parallel {fixed.expert_parallel} (expert_parallel_size): must divide the number of "
            f"experts and that of GPUs; possible: {_listed(experts)}"
        )
    if fixed.micro_batch and all(fixed.batch // ranks % fixed.micro_batch for ranks in data):
        possible = sorted({each for ranks in data for each in divisors(fixed.batch // ranks)})
        raise PlanError(
            f"--micro-batch {fixed.micro_batch} (train_micro_batch_size_per_gpu): must divide the samples of a "
            f"data-parallel rank in a step; possible for a global batch of {fixed.batch}: {_listed(possible)}"
        )


def divisors(number: int) -> list[int]:
    """All of a positive number, least first."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _experts(model: Model) -> list[Experts]:
    return [stage.experts for stage in model.stages if stage.experts is not None]


def _is_dense_with_moes(model: Model) -> bool:
    return any(number - 1 in stage.moe_layers for stage in model.stages for number in stage.moe_layers)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
