"""Operators of SwinV2's blocks on one rank, as transformers computes them: scores are written, norms end the branches.

Shape suffixes: T tokens, D hidden, W tokens of a window, N heads.
"""

from __future__ import annotations

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.operators import Cost, elementwise, norm, product, residual
from scmoe_ds.simulate.operators_dense import feed_forward
from scmoe_ds.simulate.work import Kernel

_BIAS_NETWORK = 512


def window_attention(ground: Ground, shifted: bool) -> Cost:
    """x + norm(attention in windows (x)): cosine attention with a position bias that a small network makes."""
    stage, rows, width = ground.stage, ground.rows, ground.width
    hidden, elements = stage.hidden, ground.rows * stage.hidden
    copied = elementwise(elements, width, 1, 1, back=2)  # into windows and out of them, and shifts
    cost = _times(copied, 2 if shifted else 1) + Cost(kept=elements * width)
    for number, bias in enumerate((True, False, True)):
        cost += product(rows, hidden, hidden, width, bias, keeps_input=False)
        # Queries and keys are divided by their lengths, and all three are copied for the batched products.
        cost += elementwise(
            elements, width, 2, 2, back=6, kept=elements * width * (2 if number < 2 else 1), kind="reduction"
        )
    return cost + _scores(ground, shifted) + _behind(ground, shifted)


def _scores(ground: Ground, shifted: bool) -> Cost:
    """Scores, their scale, bias and mask, softmax, and the mixing of values."""
    stage, rows, width = ground.stage, ground.rows, ground.width
    scores = rows * stage.span * stage.heads
    flops, size = 2.0 * rows * stage.span * stage.hidden, width * (2 * rows * stage.hidden + scores)
    shape = (stage.span, stage.head_dim, stage.span)
    matrix = Cost(
        (Kernel("product", flops, size, shape),),
        (Kernel("product", flops, size, shape), Kernel("product", flops, size, shape)),
    )
    scaled = elementwise(scores, width, 1, 1, back=5, kept=scores * width)
    biased = elementwise(scores, width, 1, 1, back=2, kind="reduction")
    masks = _times(elementwise(scores, width, 1, 1, back=0), 2 if shifted else 0)
    softmax = elementwise(scores, width, 1, 1, back=3, kept=scores * width, kind="reduction")
    return matrix + scaled + _position_bias(ground) + biased + masks + softmax + matrix


def _position_bias(ground: Ground) -> Cost:
    """The network for relative positions, and its table gathered by pairs of tokens. Once per batch: small kernels."""
    stage = ground.stage
    side = round(stage.span**0.5)
    places, pairs = (2 * side - 1) ** 2, stage.span**2 * stage.heads
    network = product(places, 2, _BIAS_NETWORK, ground.width) + product(
        places, _BIAS_NETWORK, stage.heads, ground.width
    )
    size = pairs * ground.width
    gathered = Cost(
        (Kernel("rows", bytes=4 * size, launches=6),), (Kernel("rows", bytes=6 * size, launches=6),), 2 * size
    )
    return network + gathered


def _behind(ground: Ground, shifted: bool) -> Cost:
    stage, rows, width = ground.stage, ground.rows, ground.width
    elements = rows * stage.hidden
    copied = elementwise(elements, width, 1, 1, back=2)
    return (
        copied
        + product(rows, stage.hidden, stage.hidden, width, bias=True)
        + _times(copied, 2 if shifted else 1)
        + norm(rows, stage.hidden, width, rms=False)
        + residual(rows, stage.hidden, width, ground.dropout)
    )


def window_mlp(ground: Ground) -> Cost:
    """x + norm(MLP(x))."""
    stage, rows, width = ground.stage, ground.rows, ground.width
    ends = norm(rows, stage.hidden, width, rms=False) + residual(rows, stage.hidden, width, ground.dropout)
    return feed_forward(ground, stage.mlp_hidden) + ends


def patch_merging(before: Ground, ground: Ground) -> Cost:
    """Four tokens become one of twice the width, and a norm follows."""
    rows, width = ground.rows, ground.width
    four = 4 * before.stage.hidden
    joined = elementwise(rows * four, width, 1, 1, back=2)
    return joined + product(rows, four, ground.stage.hidden, width) + norm(rows, ground.stage.hidden, width, rms=False)


def patch_embedding(ground: Ground) -> Cost:
    """A convolution whose patches do not overlap, and a norm."""
    rows, hidden, width = ground.rows, ground.stage.hidden, ground.width
    return product(rows, ground.model.patch, hidden, width, bias=True) + norm(rows, hidden, width, rms=False)


def image_head(ground: Ground) -> Cost:
    """The final norm, the mean of an image's tokens, classes and loss."""
    stage, width, images = ground.stage, ground.width, float(ground.layout.micro_batch)
    pooled = elementwise(ground.rows * stage.hidden, width, 1, 0, back=1, kind="reduction")
    head = product(images, stage.hidden, ground.model.vocabulary, width, bias=True)
    loss = elementwise(images * ground.model.vocabulary, 4, 2, 2, back=6, kept=images * ground.model.vocabulary * 4)
    return norm(ground.rows, stage.hidden, width, rms=False) + pooled + head + loss


def _times(cost: Cost, count: int) -> Cost:
    result = Cost()
    for _ in range(count):
        result += cost
    return result
