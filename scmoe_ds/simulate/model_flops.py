"""Floating-point operations that a model needs, for its MFU: those of scmoe_ds/models/flops.py.

Counted are products, the causal half of attention once, top-k experts per token. A backward pass takes twice as many
as the forward pass. Nothing that is computed again counts, no padding, and no tokens that are dropped or added.
"""

from __future__ import annotations

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.parameters import method_of


def forward_flops(model: Model, method: Method) -> float:
    """Of a sample: a sequence or an image."""
    grounds = [Ground(model, stage, method_of(model, at, method), Layout(1)) for at, stage in enumerate(model.stages)]
    total = 0.0
    for number, ground in enumerate(grounds):
        stage = ground.stage
        dense = stage.layers - len(stage.moe_layers)
        per_token = stage.layers * _attention(ground) + dense * _mlp(ground, stage.mlp_hidden)
        if stage.moe_layers:
            per_token += len(stage.moe_layers) * _moe(ground)
        total += stage.tokens * per_token
        if number and model.images:
            before = grounds[number - 1].stage
            total += stage.tokens * 2.0 * 4 * before.hidden * stage.hidden
    first, last = grounds[0].stage, grounds[-1].stage
    if model.images:
        return total + first.tokens * 2.0 * model.patch * first.hidden + 2.0 * last.hidden * model.vocabulary
    return total + first.tokens * 2.0 * last.hidden * model.vocabulary


def step_flops(model: Model, method: Method, layout: Layout) -> float:
    """Of a micro-batch on one rank, forward and, in training, backward."""
    passes = 3 if layout.training else 1
    return passes * forward_flops(model, method) * layout.micro_batch / layout.tensor_parallel


def _attention(ground: Ground) -> float:
    stage, half = ground.stage, 0.5 if ground.stage.causal else 1.0
    scores = 2.0 * stage.span * stage.heads * (stage.head_dim + ground.values) * half
    if stage.attention_parameters and not ground.model.images:
        return 2.0 * stage.attention_parameters + scores
    return 4.0 * stage.hidden * (stage.heads + stage.kv_heads) * stage.head_dim + scores


def _mlp(ground: Ground, inner: float) -> float:
    return 2.0 * ground.stage.hidden * inner * (3 if ground.stage.gated else 2)


def _moe(ground: Ground) -> float:
    hidden = ground.stage.hidden
    routed = ground.routed * _mlp(ground, ground.experts.hidden)
    weights = ground.coefficients + (1 if ground.experts.shared_gate else 0)
    return 2.0 * hidden * (ground.experts.num_experts + weights) + routed + _mlp(ground, ground.shared_hidden)
