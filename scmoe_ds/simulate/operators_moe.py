"""The stages of this package's MoE layer on one rank: gate, encode, experts, decode and merge.

Rows are permuted by gathers, forward and backward. Experts keep their rows and the widest tensor, and compute the
activation again. Three and more local experts in 16 bits are one grouped product.

Shape suffixes: T tokens, D hidden, E experts, K routed experts per token, R rows sent, S rows received.
"""

from __future__ import annotations

from dataclasses import replace

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.operators import (
    Cost,
    activation,
    all_reduce,
    elementwise,
    grouped_product,
    norm,
    product,
    residual,
)
from scmoe_ds.simulate.work import Kernel, Part

_FP32, _INT64 = 4, 8
_FUSED_GATE, _PLAIN_GATE = 6, 42
"""Launches on [T, E] and [T]: of the top-1 kernels, and of torch's operators for more choices."""
_FEWEST_GROUPED = 3


def gate(ground: Ground, normalises: bool) -> Cost:
    """The shortcut's norm, logits in fp32, and the choice.

    Args:
        normalises: the routed experts read a norm that nothing else reads. What it reads, the backbone keeps.
    """
    stage, rows, width = ground.stage, ground.rows, ground.width
    experts, hidden = ground.experts.num_experts, stage.hidden
    cost = norm(rows, hidden, width, ground.rms, keeps_input=False) if normalises else Cost()
    # Only a norm that is the gate's own makes rows that nothing else keeps.
    cost += logits(rows, hidden, experts, width, width * rows * hidden if normalises else 0.0)
    launches = _FUSED_GATE if ground.routed == 1 else _PLAIN_GATE
    table = rows * experts * _FP32
    kept = 3 * table + rows * ground.routed * (4 * _INT64 + 2 * _FP32)
    small: tuple[Part, ...] = (Kernel("reduction", bytes=2 * table * launches / 3, launches=launches),)
    gradient = (Kernel("reduction", bytes=3 * table, launches=1 if ground.routed == 1 else 14),)
    return cost + Cost(small, gradient, kept)


def logits(rows: float, hidden: int, experts: int, width: int, kept: float) -> Cost:
    """A product in fp32 of rows that are cast for it, forward and for the weight's gradient."""
    cast = (Kernel("pointwise", bytes=rows * hidden * (width + _FP32)),) if width < _FP32 else ()
    matrix = product(rows, hidden, experts, _FP32, keeps_input=False)
    return Cost(cast + matrix.forward, cast + matrix.backward + cast, kept)


def encode(ground: Ground) -> Cost:
    """Rows in the order of sending."""
    hidden, width, sent = ground.stage.hidden, ground.width, ground.copies
    moved = sent * hidden * width
    indices = Kernel("rows", bytes=ground.rows * ground.choices * _INT64 * 6, launches=4)
    kept = ground.rows * ground.choices * 2 * _INT64
    if ground.method.dispatch == "padded":
        real = 2 * ground.rows * ground.choices / ground.slices * hidden * width
        filled = Kernel("pointwise", bytes=moved)
        return Cost((indices, filled, Kernel("rows", bytes=real, launches=ground.choices)), _gathered(ground), kept)
    return Cost((indices, Kernel("rows", bytes=2 * moved)), _gathered(ground), kept)


def _gathered(ground: Ground) -> tuple[Part, ...]:
    """A token's gradient from its rows, summed in fp32 where these are several."""
    choices, size = ground.choices, ground.row_bytes
    gathers = Kernel("rows", bytes=2 * size * choices, launches=choices)
    if choices == 1:
        return (gathers,)
    wide = ground.rows * ground.stage.hidden * _FP32
    return gathers, Kernel("pointwise", bytes=(2 * wide + size) * choices, launches=choices)


def experts(ground: Ground, received: float) -> Cost:
    """The local experts on `received` rows, from their arrival to their leaving."""
    hidden, width, local = ground.stage.hidden, ground.width, ground.local_experts
    padded, ep = ground.method.dispatch == "padded", ground.layout.expert_parallel
    cost = Cost()
    if ground.one_row_per_rank:
        cost += _expanded(ground, received)
    elif ep > 1 and local > 1 and not padded:
        cost += elementwise(received * hidden, width, 1, 1, back=2, kind="rows")
    if padded or ground.model.images:  # transformers' modules, one after the other
        cost += each_expert(ground, received)
    elif local >= _FEWEST_GROUPED and width < _FP32:
        cost += _at_once(ground, received)
    else:
        cost += each_expert(ground, received, recomputed=True)
    if not ground.one_row_per_rank and ep > 1 and local > 1:
        cost += elementwise(received * hidden, width, 1, 1, back=2, kind="rows")
    return cost


def each_expert(ground: Ground, received: float, recomputed: bool = False) -> Cost:
    """Two products per local expert, and the activation: once for all of them where it is computed again."""
    stage, width, local = ground.stage, ground.width, ground.local_experts
    inner = ground.inner
    wide = inner * (2 if stage.gated else 1)
    first = _times(product(received / local, stage.hidden, wide, width, stage.bias), local)
    second = _times(product(received / local, inner, stage.hidden, width, stage.bias, not recomputed), local)
    act = activation(received, inner, width, stage.gated)
    if recomputed:
        act = Cost(act.forward, act.forward + act.backward, act.kept)
    else:
        silu = Cost(kept=received * inner * width if stage.gated else 0.0)
        joined = elementwise(received * stage.hidden, width, 1, 1, back=2) if local > 1 else Cost()
        act, second = act + silu, second + joined
    around = received * stage.hidden * width
    return (
        all_reduce(around, ground.expert_tp, forward=False)
        + first
        + act
        + second
        + all_reduce(around, ground.expert_tp, forward=True)
    )


def _at_once(ground: Ground, received: float) -> Cost:
    stage, width, local = ground.stage, ground.width, ground.local_experts
    inner = ground.inner
    wide = inner * (2 if stage.gated else 1)
    act, stacked = activation(received, inner, width, stage.gated), not ground.model.autoep
    # AutoEP's parts are slices of whole experts. Those of the second product do not follow each other.
    copied = stacked or ground.method.parts > 1
    return (
        grouped_product(received, stage.hidden, wide, local, width, stage.bias, stacked=stacked)
        + Cost(act.forward, act.forward + act.backward, act.kept)
        + grouped_product(received, inner, stage.hidden, local, width, stage.bias, keeps_input=False, stacked=copied)
    )


def _times(cost: Cost, count: float) -> Cost:
    """As many like kernels, each of them a launch."""

    def several(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(
            replace(
                each, flops=each.flops * count, bytes=each.bytes * count, launches=max(round(each.launches * count), 1)
            )
            for each in parts
            if isinstance(each, Kernel)
        )

    return Cost(several(cost.forward), several(cost.backward), cost.kept * count)


def _expanded(ground: Ground, received: float) -> Cost:
    """Rows that arrive once for all of a rank's experts: a copy for each choice, and the results' weighted sum."""
    hidden, width = ground.stage.hidden, ground.width
    size, arrived = received * hidden * width, ground.copies * hidden * width
    order = Kernel("rows", bytes=received * _INT64 * 10, launches=12)
    expand = Kernel("rows", bytes=arrived + size)
    summed = Kernel("rows", bytes=3 * size + arrived, launches=2)
    back = Kernel("rows", bytes=arrived + 4 * size, launches=4)
    return Cost((order, expand, summed), (back, summed), size + received * (_FP32 + 3 * _INT64))


def decode(ground: Ground) -> Cost:
    """The weighted sum of a token's rows, and what joins the residual stream: merge, norm, dropout, addition."""
    return _restored(ground) + merge(ground) + joined(ground)


def _restored(ground: Ground) -> Cost:
    rows, hidden, width, choices = ground.rows, ground.stage.hidden, ground.width, ground.choices
    chosen = choices * ground.row_bytes
    if ground.one_row_per_rank:
        total = Kernel("rows", bytes=ground.copies * hidden * width + ground.row_bytes, launches=choices)
        return Cost((total,), (Kernel("rows", bytes=2 * ground.copies * hidden * width),))
    forward = (Kernel("rows", bytes=2 * chosen), Kernel("pointwise", bytes=chosen + ground.row_bytes, launches=choices))
    of_weights = Kernel("reduction", bytes=2 * chosen, launches=2)
    back = Kernel("pointwise", bytes=ground.row_bytes + chosen), Kernel("rows", bytes=2 * chosen)
    return Cost(forward, (of_weights, *back), chosen + rows * choices * (_FP32 + 2 * _INT64))


def merge(ground: Ground) -> Cost:
    """Shared and routed outputs, weighted by the coefficient network and added."""
    if not ground.shared_hidden:
        return Cost()
    rows, hidden, width, outputs = ground.rows, ground.stage.hidden, ground.width, ground.coefficients
    added = elementwise(rows * hidden, width, 2, 1, back=0)
    if not outputs:
        return added
    weighted = elementwise(rows * hidden, width, 1, 1, back=4, kept=rows * hidden * width)
    network = product(rows, hidden, outputs, width, bias=True, keeps_input=False)
    squashed = elementwise(rows * outputs, width, 1, 1, back=3, kept=2 * rows * outputs * width)
    cost = network + squashed
    for _ in range(outputs):
        cost += weighted
    return cost + added


def joined(ground: Ground) -> Cost:
    """The residual stream with the MoE's output."""
    rows, hidden, width = ground.rows, ground.stage.hidden, ground.width
    behind = norm(rows, hidden, width, ground.rms) if ground.method.post_norm or ground.model.images else Cost()
    return behind + residual(rows, hidden, width, ground.dropout)
