"""Methods and layouts that a model cannot run with: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from scmoe_ds.errors import ModelError
from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model, Stage


def require(model: Model, method: Method, layout: Layout) -> None:
    """
    Raises:
        ModelError: the first reason of `refusal`.
    """
    if reason := refusal(model, method, layout):
        raise ModelError(reason)


def refusal(model: Model, method: Method, layout: Layout) -> str | None:
    """Why a model cannot run so; None: it can."""
    return next((reason for broken, reason in _rules(model, method, layout) if broken), None)


def _rules(model: Model, method: Method, layout: Layout) -> Iterator[tuple[bool, str]]:
    world, ep, tp = layout.world, layout.expert_parallel, layout.tensor_parallel
    full = layout.recompute in ("full", True)
    yield not model.moe_layers, f"model = {model.name}: has no MoE layer, and nothing to plan"
    yield world % tp > 0, f"tensor_parallel = {tp}: must divide the world size {world}"
    yield world % ep > 0, f"expert_parallel_size = {ep}: must divide the world size {world}"
    yield (
        # Parts may be spread over the tensor-parallel ranks, too (S-ETP).
        layout.data_parallel % ep > 0 and (layout.expert_tensor_parallel or (world // tp < ep and method.parts == 1)),
        f"expert_parallel_size = {ep}: must divide the {world // tp} data-parallel ranks",
    )
    whole = not layout.expert_tensor_parallel
    yield (
        whole and ep % tp > 0 and tp % ep > 0,
        f"expert_parallel_size = {ep}: it or tensor_parallel {tp} must divide the other",
    )
    yield model.images and tp > 1, f"tensor_parallel = {tp}: a Swin's layers are not divided; use 1"
    yield (
        model.vocabulary % tp > 0 and not model.images,
        f"tensor_parallel = {tp}: must divide the vocabulary {model.vocabulary}",
    )
    for number, stage in enumerate(model.stages):
        yield from _rules_of_stage(model, stage, f"stages.{number}", method, layout)
    late = method.join == "late"
    yield late and model.images, 'join = "late": the norms of a Swin end its branches; use block'
    yield late and full, 'join = "late": recompute full repeats one pair at a time; use selective'
    own = method.layer == "scmoe_ds" and not model.images
    yield (
        method.parts > 1 and not own,
        f"expert_partition = {method.parts}: DeepSpeed's own layers, and those of a Swin, have whole experts; use 1",
    )
    twice = method.parts > 1 and layout.expert_tensor_parallel
    yield (
        twice,
        f"expert_partition = {method.parts}: parts are not divided again; set expert_tensor_parallelism to false",
    )
    together = (
        method.parts > 1
        and model.autoep
        and any(each.experts is not None and each.experts.num_experts % ep for each in model.stages)
    )
    yield (
        together,
        f"expert_parallel_size = {ep}: AutoEP keeps the parts of an expert on one rank; use a divisor of its experts",
    )
    yield method.layer == "autoep" and tp > 1, f"tensor_parallel = {tp}: AutoEP's layers are not divided here; use 1"


def _rules_of_stage(
    model: Model, stage: Stage, path: str, method: Method, layout: Layout
) -> Iterator[tuple[bool, str]]:
    ep, tp = layout.expert_parallel, layout.tensor_parallel
    yield stage.heads % tp > 0, f"tensor_parallel = {tp}: must divide {path}.heads = {stage.heads}"
    yield stage.kv_heads % tp > 0, f"tensor_parallel = {tp}: must divide {path}.kv_heads = {stage.kv_heads}"
    yield stage.mlp_hidden % tp > 0, f"tensor_parallel = {tp}: must divide {path}.mlp_hidden = {stage.mlp_hidden}"
    if stage.experts is None:
        return
    experts, routed = stage.experts.num_experts, Ground(model, stage, method, layout).routed
    parts = method.parts
    times = "" if parts == 1 else f" times expert_partition = {parts}"
    uneven = experts * parts % ep > 0
    yield uneven, f"expert_parallel_size = {ep}: must divide {path}.experts.num_experts = {experts}{times}"
    yield (
        stage.experts.hidden % parts > 0,
        f"expert_partition = {parts}: must divide the {stage.experts.hidden} neurons of an expert",
    )
    yield routed > experts, f"top_k = {routed}: cannot exceed the number of experts ({experts})"
    divided = layout.expert_tensor_parallel and stage.experts.hidden % tp > 0
    yield divided, f"tensor_parallel = {tp}: must divide {path}.experts.hidden = {stage.experts.hidden}"
    if method.architecture == "scmoe" and method.position in ("pos2", "pos3"):
        dense = _fewest_dense(stage)
        yield (
            dense < method.shortcut_distance,
            f"position = {method.position}: the block before an MoE must have a plain MLP to overlap; use pos1",
        )


def _fewest_dense(stage: Stage) -> int:
    """Blocks without an MoE before each that has one."""
    places = sorted(stage.moe_layers)
    return min((place - before - 1 for before, place in zip([-1, *places], places, strict=False)), default=0)
