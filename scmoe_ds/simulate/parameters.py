"""How many parameters a model has, and a rank of it before ZeRO. Equal to those of the models themselves."""

from __future__ import annotations

from dataclasses import replace

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model, Stage
from scmoe_ds.simulate.work import Parameters

_BIAS_NETWORK = 512
"""Width of SwinV2's network for position biases, which reads two coordinates."""


def norm_parameters(stage: Stage) -> int:
    return stage.hidden * (2 if stage.norm == "layer" else 1)


def attention_parameters(ground: Ground) -> float:
    """Of a rank: matrices and what belongs to a head are divided, the output's bias is whole."""
    stage, tp = ground.stage, ground.tp
    if stage.attention_parameters:
        return stage.attention_parameters / tp
    D = stage.hidden
    projected = (stage.heads + 2 * stage.kv_heads) * stage.head_dim
    matrices = D * projected + stage.heads * stage.head_dim * D
    if not ground.model.images:
        return matrices / tp + (projected / tp + D if stage.bias else 0)
    # Keys have no bias; a scale for each head.
    biases = 3 * D
    return matrices + biases + stage.heads + 3 * _BIAS_NETWORK + _BIAS_NETWORK * stage.heads


def mlp_parameters(stage: Stage, inner: float, tp: int) -> float:
    """Of an MLP or an expert that `tp` ranks share."""
    wide = inner * (2 if stage.gated else 1) / tp
    return stage.hidden * (wide + inner / tp) + (wide + stage.hidden if stage.bias else 0)


def dense_block(ground: Ground) -> float:
    """Of a block without an MoE."""
    mlp = mlp_parameters(ground.stage, ground.stage.mlp_hidden, ground.tp)
    return 2 * norm_parameters(ground.stage) + attention_parameters(ground) + mlp


def moe_block(ground: Ground) -> Parameters:
    """Of a block with an MoE, with the shortcut's norm."""
    stage, experts = ground.stage, ground.experts
    dense = 2 * norm_parameters(stage) + attention_parameters(ground) + stage.hidden * experts.num_experts
    if ground.shared_hidden:
        dense += mlp_parameters(stage, ground.shared_hidden, ground.tp)
    dense += stage.hidden if experts.shared_gate else 0
    dense += (stage.hidden + 1) * ground.coefficients
    if ground.method.architecture == "scmoe" and ground.method.shortcut_norm == "own":
        dense += norm_parameters(stage)
    if ground.method.post_norm and ground.method.architecture != "topk":
        dense += norm_parameters(stage)
    return Parameters(
        dense, ground.local_experts * mlp_parameters(stage, experts.hidden / ground.method.parts, ground.expert_tp)
    )


def outside(ground: Ground, last: Ground) -> float:
    """Of what surrounds all blocks.

    Args:
        ground, last: of the first and of the last stage.
    """
    model, D, tp = ground.model, ground.stage.hidden, ground.tp
    final = norm_parameters(last.stage)
    if model.images:
        patches = model.patch * D + D + norm_parameters(ground.stage)
        return patches + final + last.stage.hidden * model.vocabulary + model.vocabulary
    tables = model.vocabulary * D / tp * (1 if model.tied else 2)
    return tables + model.positions * D + final


def merging_parameters(before: Stage, stage: Stage) -> int:
    """Between stages of a Swin: four tokens become one, and a norm follows."""
    return 4 * before.hidden * stage.hidden + norm_parameters(stage)


def count(model: Model, method: Method, layout: Layout | None = None) -> Parameters:
    """Of a rank; without a layout of the whole model, with all experts."""
    layout = layout or Layout(1)
    grounds = [
        Ground(model, stage, method_of(model, number, method), layout) for number, stage in enumerate(model.stages)
    ]
    dense, experts = outside(grounds[0], grounds[-1]), 0.0
    for before, ground in zip([None, *grounds], grounds, strict=False):
        stage = ground.stage
        dense += (stage.layers - len(stage.moe_layers)) * dense_block(ground)
        dense += merging_parameters(before.stage, stage) if before and model.images else 0
        if stage.experts is not None:
            of_block = moe_block(ground)
            dense += len(stage.moe_layers) * of_block.dense
            experts += len(stage.moe_layers) * of_block.experts
    return Parameters(dense, experts)


def method_of(model: Model, stage: int, method: Method) -> Method:
    """How the MoE layers of a stage run: the last stage of a Swin keeps DeepSpeed's top-2 beside a ScMoE."""
    if not model.images or method.architecture != "scmoe" or stage + 1 < len(model.stages):
        return method
    return replace(
        method,
        architecture="topk",
        layer="deepspeed",
        dispatch="padded",
        position=None,
        routed=2,
        overlap=False,
        most_chunks=1,
        parts=1,
    )
