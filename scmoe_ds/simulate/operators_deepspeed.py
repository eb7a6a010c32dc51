"""The stages of DeepSpeed's own MoE layers: its Residual MoE and top-k MoE, and AutoEP's layer for Hugging Face models.

As of deepspeed/moe/sharded_moe.py and deepspeed/module_inject/auto_ep_layer.py of DeepSpeed 0.19.8.

Shape suffixes: T tokens, E experts, C capacity, K routed experts per token, R rows.
"""

from __future__ import annotations

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.operators import Cost, activation, grouped_product
from scmoe_ds.simulate.operators_moe import each_expert, joined, logits, merge
from scmoe_ds.simulate.work import Kernel, Part, Reduced

_FP32, _INT64 = 4, 8
_MASKS = 40
"""Launches of TopKGate on [T, E] masks in int64: one-hot, sums, random numbers, topk, scatter, cumulative sums."""
_ALIGNMENT = 8


def padded_gate(ground: Ground) -> Cost:
    """TopKGate. It keeps the tokens in fp32."""
    rows, experts = ground.rows, ground.experts.num_experts
    in_fp32 = rows * ground.stage.hidden * _FP32 if ground.width < _FP32 else 0.0
    table = rows * experts
    masks = Kernel("reduction", bytes=2 * table * _INT64 * _MASKS, launches=_MASKS)
    gradient = Kernel("reduction", bytes=3 * table * _FP32 * 12, launches=12)
    kept = table * (4 * _FP32 + 2 * _INT64) + rows * ground.routed * 2 * _INT64
    return logits(rows, ground.stage.hidden, experts, ground.width, in_fp32) + Cost((masks,), (gradient,), kept)


def padded_encode(ground: Ground) -> Cost:
    """A copy of all tokens with a row of zeros behind them, from which buffers of the capacity are gathered."""
    size, buffers = ground.row_bytes, _buffers(ground)
    slots = Kernel("rows", bytes=ground.capacity * ground.experts.num_experts * _INT64 * 2, launches=8)
    forward = slots, Kernel("pointwise", bytes=2 * size), Kernel("rows", bytes=size + buffers)
    # Gradients are scattered into zeros with atomic additions.
    backward = (
        Kernel("pointwise", bytes=size),
        Kernel("rows", bytes=2 * buffers + size),
        Kernel("pointwise", bytes=2 * size),
    )
    kept = ground.capacity * ground.experts.num_experts * _INT64
    return Cost(forward, (*_gathered(ground, buffers), *backward), kept)


def padded_experts(ground: Ground, received: float) -> Cost:
    """Expert after expert, and their results joined."""
    return each_expert(ground, received)


def padded_decode(ground: Ground) -> Cost:
    """Buffers with a row of zeros behind them, rows gathered from it and weighted in fp32."""
    buffers, chosen = _buffers(ground), ground.routed * ground.row_bytes
    wide = ground.routed * ground.rows * ground.stage.hidden * _FP32
    forward = (
        *_gathered(ground, buffers),
        Kernel("pointwise", bytes=2 * buffers),
        Kernel("rows", bytes=2 * chosen),
        Kernel("pointwise", bytes=chosen + wide),
        Kernel("reduction", bytes=wide + ground.row_bytes, launches=2),
    )
    backward = (
        Kernel("pointwise", bytes=ground.row_bytes + wide, launches=2),
        Kernel("reduction", bytes=2 * wide + chosen, launches=3),
        Kernel("pointwise", bytes=buffers),
        Kernel("rows", bytes=3 * chosen),
        Kernel("pointwise", bytes=2 * buffers),
    )
    kept = chosen + ground.rows * ground.routed * (_FP32 + _INT64)
    return Cost(forward, backward, kept) + merge(ground) + joined(ground)


def _buffers(ground: Ground) -> float:
    """Bytes of all experts' buffers on one rank, before tensor-parallel ranks take their slices."""
    return ground.capacity * ground.experts.num_experts * ground.stage.hidden * ground.width


def _gathered(ground: Ground, size: float) -> tuple[Part, ...]:
    """Behind the combine, and the dispatch's gradient, tensor-parallel ranks gather their slices."""
    return (Reduced("all-gather", "tp", size),) if ground.tp > 1 else ()


def sorted_gate(ground: Ground) -> Cost:
    """AutoEP's router: logits, softmax, top-k, and the number of tokens of each expert."""
    rows, table = ground.rows, ground.rows * ground.experts.num_experts * _FP32
    small = Kernel("reduction", bytes=2 * table * 8, launches=12)
    kept = 2 * table + rows * ground.routed * (_FP32 + 2 * _INT64)
    gradient = Kernel("reduction", bytes=3 * table * 4, launches=8)
    return logits(rows, ground.stage.hidden, ground.experts.num_experts, ground.width, 0.0) + Cost(
        (small,), (gradient,), kept
    )


def sorted_encode(ground: Ground) -> Cost:
    """Choices sorted by expert, and rows gathered in this order. Backward they are added up by index."""
    choices = ground.rows * ground.routed
    moved = choices * ground.stage.hidden * ground.width
    sort = Kernel("rows", bytes=choices * _INT64 * 16, launches=10)
    backward = Kernel("rows", bytes=choices * _INT64 * 16, launches=6), Kernel("rows", bytes=3 * moved)
    return Cost((sort, Kernel("rows", bytes=2 * moved)), backward, choices * _INT64)


def sorted_experts(ground: Ground, received: float) -> Cost:
    """Rows grouped and aligned by expert, three grouped products, and the way back."""
    stage, width, local = ground.stage, ground.width, ground.local_experts
    rows, inner = received + local * _ALIGNMENT / 2, float(ground.experts.hidden)
    moved = 2 * rows * stage.hidden * width
    way = Cost((Kernel("rows", bytes=moved, launches=3),), (Kernel("rows", bytes=moved),))
    if not stage.gated:
        return way + each_expert(ground, received) + way
    halves = [
        grouped_product(rows, stage.hidden, inner, local, width, keeps_input=first, stacked=False)
        for first in (True, False)
    ]
    back = grouped_product(rows, inner, stage.hidden, local, width, stacked=False)
    return way + halves[0] + halves[1] + activation(rows, inner, width, gated=True) + back + way


def sorted_decode(ground: Ground) -> Cost:
    """Rows scattered back into zeros, weighted in fp32 and summed."""
    choices = ground.rows * ground.routed
    size, wide = choices * ground.stage.hidden * ground.width, choices * ground.stage.hidden * _FP32
    forward = (
        Kernel("pointwise", bytes=size),
        Kernel("rows", bytes=2 * size),
        Kernel("pointwise", bytes=size + wide),
        Kernel("reduction", bytes=wide + ground.row_bytes, launches=2),
    )
    backward = (
        Kernel("pointwise", bytes=ground.row_bytes + wide, launches=2),
        Kernel("reduction", bytes=wide + 2 * size, launches=3),
        Kernel("rows", bytes=2 * size),
    )
    return Cost(forward, backward, size + choices * (_FP32 + _INT64)) + joined(ground)
