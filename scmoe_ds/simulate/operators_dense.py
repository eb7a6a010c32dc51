"""The dense operators of a Transformer on one rank: attention, MLP, shared expert, embedding, head and loss."""

from __future__ import annotations

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.operators import (
    Cost,
    activation,
    all_reduce,
    elementwise,
    norm,
    product,
    residual,
)
from scmoe_ds.simulate.work import Kernel, Reduced

_FP32 = 4
_BACKWARD = 2.5
"""Products of an attention's backward pass over those of its forward pass: five instead of two."""


def attention(ground: Ground) -> Cost:
    """x + Attn(norm(x)), its heads divided among the tensor-parallel ranks."""
    stage, rows, width, tp = ground.stage, ground.rows, ground.width, ground.tp
    outputs = stage.heads * ground.values / tp
    return (
        norm(rows, stage.hidden, width, ground.rms)
        + all_reduce(ground.row_bytes, tp, forward=False)
        + product(rows, stage.hidden, _projected(ground), width, stage.bias)
        + _rotary(ground)
        + _core(ground)
        + product(rows, outputs, stage.hidden, width, stage.bias, keeps_input=False)
        + all_reduce(ground.row_bytes, tp, forward=True)
        + residual(rows, stage.hidden, width, ground.dropout)
    )


def _projected(ground: Ground) -> float:
    """Columns of the product that makes queries, keys and values; of a chain of products, as an MLA has, as much."""
    stage = ground.stage
    if stage.attention_parameters:
        return (stage.attention_parameters / stage.hidden - stage.heads * ground.values) / ground.tp
    return (stage.heads + 2 * stage.kv_heads) * stage.head_dim / ground.tp


def _rotary(ground: Ground) -> Cost:
    """Queries and keys turned into new tensors, in fp32 up to the result."""
    if ground.model.positions:
        return Cost()
    elements = ground.rows * (ground.stage.heads + ground.stage.kv_heads) * ground.stage.head_dim / ground.tp
    return elementwise(elements, ground.width, 1, 1, back=2, kept=elements * ground.width)


def _core(ground: Ground) -> Cost:
    """Flash attention: nothing of the size of the scores is written."""
    stage, rows, width, tp = ground.stage, ground.rows, ground.width, ground.tp
    heads, half = stage.heads / tp, 0.5 if stage.causal else 1.0
    flops = 2.0 * rows * stage.span * (stage.head_dim + ground.values) * heads * half
    keys = (stage.kv_heads / tp) * (stage.head_dim + ground.values)
    inputs, outputs = width * rows * (heads * stage.head_dim + keys), width * rows * heads * ground.values
    shape = (stage.span, stage.head_dim, round(rows / stage.span * heads))
    forward = Kernel("attention", flops, inputs + outputs, shape)
    # The gradients of queries, keys and values become one tensor.
    joined = Kernel("pointwise", bytes=2 * inputs)
    backward = Kernel("attention", _BACKWARD * flops, 2 * (inputs + outputs), shape)
    return Cost((forward,), (backward, joined), inputs + outputs + _FP32 * rows * heads)


def feed_forward(ground: Ground, hidden: float, divided: bool = True) -> Cost:
    """output(activate(input(x))) of the width `hidden` inside, which tensor-parallel ranks divide."""
    stage, rows, width = ground.stage, ground.rows, ground.width
    tp = ground.tp if divided else 1
    inner = hidden / tp
    # torch's own SwiGLU keeps the SiLU of one half beside both halves.
    silu = Cost(kept=rows * inner * width if stage.gated else 0.0)
    return (
        all_reduce(ground.row_bytes, tp, forward=False)
        + product(rows, stage.hidden, inner * (2 if stage.gated else 1), width, stage.bias)
        + activation(rows, inner, width, stage.gated)
        + silu
        + product(rows, inner, stage.hidden, width, stage.bias)
        + all_reduce(ground.row_bytes, tp, forward=True)
    )


def mlp(ground: Ground) -> Cost:
    """x + MLP(norm(x))."""
    stage = ground.stage
    return (
        norm(ground.rows, stage.hidden, ground.width, ground.rms)
        + feed_forward(ground, stage.mlp_hidden)
        + residual(ground.rows, stage.hidden, ground.width, ground.dropout)
    )


def shared_gate(ground: Ground) -> Cost:
    """The sigmoid that weights a model's own shared expert."""
    if not ground.experts.shared_gate:
        return Cost()
    rows, hidden, width = ground.rows, ground.stage.hidden, ground.width
    return product(rows, hidden, 1, width, keeps_input=False) + elementwise(
        rows * hidden, width, 1, 1, back=4, kept=rows * hidden * width
    )


def embedding(ground: Ground) -> Cost:
    """Tokens' rows of the table, plus those of their positions, with dropout."""
    rows, hidden, width, tp = ground.rows, ground.stage.hidden, ground.width, ground.tp
    size = ground.row_bytes
    of_table = ground.model.vocabulary * hidden * width / tp
    table = Cost((Kernel("rows", bytes=2 * size),), (Kernel("rows", bytes=3 * size + of_table, launches=2),), rows * 8)
    summed = all_reduce(size, tp, forward=True)
    positions = elementwise(rows * hidden, width, 2, 1, back=2) if ground.model.positions else Cost()
    dropped = (
        elementwise(rows * hidden, width, 1, 1 + 1 / width, back=2 + 1 / width, kept=rows * hidden)
        if ground.dropout
        else Cost()
    )
    return table + summed + positions + dropped


def head_and_loss(ground: Ground) -> Cost:
    """The final norm, logits of this rank's range of the vocabulary, and cross entropy in fp32."""
    rows, hidden, width, tp = ground.rows, ground.stage.hidden, ground.width, ground.tp
    columns = ground.model.vocabulary / tp
    logits = rows * columns
    upcast = Cost(
        (Kernel("pointwise", bytes=logits * (width + _FP32)),), (Kernel("pointwise", bytes=logits * (width + _FP32)),)
    )
    softmax = Cost(
        (Kernel("reduction", bytes=2 * logits * _FP32),),
        (Kernel("pointwise", bytes=logits * _FP32), Kernel("reduction", bytes=3 * logits * _FP32)),
        logits * _FP32,
    )
    # The largest logit, the sum of exponentials and the label's logit of each token come from all ranks.
    agreed = Cost(tuple(Reduced("all-reduce", "tp", rows * _FP32) for _ in range(3))) if tp > 1 else Cost()
    return (
        norm(rows, hidden, width, ground.rms)
        + all_reduce(ground.row_bytes, tp, forward=False)
        + product(rows, hidden, columns, width)
        + (upcast if width < _FP32 else Cost())
        + softmax
        + agreed
    )
