"""The kernels of scmoe_ds.moe.top1 in Triton. Importing this needs Triton.

Shape suffixes: T tokens, E experts, B blocks of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scmoe_ds.moe.top1 import Top1Kernels

_SPAN = tl.constexpr(2**32)
"""Between the keys of two experts, as in scmoe_ds.moe.order."""
_ELEMENTS = 2048
"""Of one block of logits: they stay in registers."""
_TOKENS = 256


@triton.jit
def _softmax(logits, at, inside):  # type: ignore[no-untyped-def]
    score = tl.load(logits + at, mask=inside, other=float("-inf"))
    power = tl.where(inside, tl.exp(score - tl.max(score, axis=1)[:, None]), 0.0)
    total = tl.sum(power, axis=1)[:, None]
    return score, power / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, random, expert, probability, key, sums, tokens, experts,
    HAS_RANDOM: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    score, share = _softmax(logits, t[:, None] * experts + e[None, :], inside)
    # With NaN among the logits any expert will do, but one that exists: it becomes an address.
    best = tl.minimum(tl.argmax(score, axis=1), experts - 1)
    chosen = tl.sum(tl.where(e[None, :] == best[:, None], share, 0.0), axis=1)
    order = best.to(tl.int64) * _SPAN
    if HAS_RANDOM:
        # The bits of floats that are not negative, read as integers, have the order of the floats.
        drawn = tl.load(random + t * experts + best, mask=t < tokens, other=0.0)
        order -= drawn.to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(expert + t, best.to(tl.int64), mask=t < tokens)
    tl.store(probability + t, chosen, mask=t < tokens)
    tl.store(key + t, order, mask=t < tokens)
    tl.store(sums + tl.program_id(0) * experts + e, tl.sum(share, axis=0), mask=e < experts)


@triton.jit
def _first_at_least(key, bound, tokens, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    low, high = tl.zeros_like(bound), tl.zeros_like(bound) + tokens
    for _ in range(STEPS):
        middle, active = (low + high) // 2, low < high
        less = active & (tl.load(key + middle, mask=active, other=0) < bound)
        low, high = tl.where(less, middle + 1, low), tl.where(active & (less == 0), middle, high)
    return low


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    key, sums, counts, rows, start, row_start, loss, tokens, experts, blocks, limit,
    STEPS: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, EXPERTS)
    bound = e.to(tl.int64) * _SPAN - _SPAN // 2
    first = _first_at_least(key, bound, tokens, STEPS)
    count = tl.where(e < experts, _first_at_least(key, bound + _SPAN, tokens, STEPS) - first, 0)
    kept = tl.minimum(count, limit)
    end = tl.cumsum(kept, axis=0)
    total = tl.zeros([EXPERTS], dtype=tl.float32)
    for block in range(0, blocks, BLOCKS):
        b = block + tl.arange(0, BLOCKS)
        inside = (b < blocks)[:, None] & (e < experts)[None, :]
        total += tl.sum(tl.load(sums + b[:, None] * experts + e[None, :], mask=inside, other=0.0), axis=0)
    balance = (total / tokens) * (count.to(tl.float32) / tokens)
    tl.store(counts + e, count, mask=e < experts)
    tl.store(rows + e, kept, mask=e < experts)
    tl.store(start + e, first, mask=e < experts)
    tl.store(row_start + e, end - kept, mask=e < experts)
    tl.store(row_start + experts, tl.sum(kept, axis=0))
    tl.store(loss, tl.sum(balance, axis=0) * experts)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    key, token, start, row_start, probability, token_of_row, row, kept, weight, tokens, experts, limit,
    TOKENS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = i < tokens
    t = tl.load(token + i, mask=inside, other=0)
    expert = (tl.load(key + i, mask=inside, other=0) + _SPAN // 2) >> 32
    first = tl.load(start + expert, mask=inside, other=0)
    first_row = tl.load(row_start + expert, mask=inside, other=0)
    location = i - first
    is_kept = location < limit
    behind = tl.load(row_start + experts) + (first - first_row) + location - limit
    place = tl.where(is_kept, first_row + location, behind)
    tl.store(token_of_row + place, t, mask=inside)
    tl.store(row + t, place, mask=inside)
    tl.store(kept + t, is_kept.to(tl.int8), mask=inside)
    tl.store(weight + t, tl.where(is_kept, tl.load(probability + t, mask=inside, other=0.0), 0.0), mask=inside)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, expert, kept, counts, grad_weight, grad_loss, grad, tokens, experts,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    at = t[:, None] * experts + e[None, :]
    _, share = _softmax(logits, at, inside)
    best = tl.load(expert + t, mask=t < tokens, other=0)
    is_kept = tl.load(kept + t, mask=t < tokens, other=0) != 0
    of_weight = tl.where(is_kept, tl.load(grad_weight + t, mask=t < tokens, other=0.0), 0.0)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.float32)
    of_loss = tl.load(grad_loss) * experts * (count / tokens) / tokens
    of_share = tl.where(e[None, :] == best[:, None], of_weight[:, None], 0.0) + of_loss[None, :]
    mean = tl.sum(of_share * share, axis=1)
    tl.store(grad + at, share * (of_share - mean[:, None]), mask=inside)


def _block(experts: int) -> tuple[int, int]:
    """Tokens and experts of a block, powers of two."""
    padded = triton.next_power_of_2(experts)
    return max(_ELEMENTS // padded, 1), padded


def choose(logits_TE: Tensor, random_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Top1Kernels`."""
    T, E = logits_TE.shape
    rows, padded = _block(E)
    blocks = triton.cdiv(T, rows)
    expert_T, key_T = logits_TE.new_empty(T, dtype=torch.int64), logits_TE.new_empty(T, dtype=torch.int64)
    probability_T, sums_BE = logits_TE.new_empty(T), logits_TE.new_empty(blocks, E)
    tensors = (logits_TE, logits_TE if random_TE is None else random_TE, expert_T, probability_T, key_T, sums_BE)
    _launch(_choose, blocks, tensors, T, E, HAS_RANDOM=random_TE is not None, ROWS=rows, EXPERTS=padded)
    return expert_T, probability_T, key_T, sums_BE


def count(key_X: Tensor, sums_BE: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Top1Kernels`."""
    (T,), (blocks, E) = key_X.shape, sums_BE.shape
    rows, padded = _block(E)
    counts_E, rows_E, start_E = (key_X.new_empty(E) for _ in range(3))
    row_start_E, l_aux = key_X.new_empty(E + 1), sums_BE.new_empty(())
    tensors = (key_X, sums_BE, counts_E, rows_E, start_E, row_start_E, l_aux)
    sizes = dict(STEPS=T.bit_length(), BLOCKS=rows, EXPERTS=padded)
    _launch(_count, 1, tensors, T, E, blocks, limit, **sizes)
    return counts_E, rows_E, start_E, row_start_E, l_aux


def place(
    key_X: Tensor, token_X: Tensor, start_E: Tensor, row_start_E: Tensor, probability_T: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Top1Kernels`."""
    (T,), (E,) = key_X.shape, start_E.shape
    token_of_row_X, row_T = torch.empty_like(token_X), torch.empty_like(token_X)
    kept_T, weight_T = token_X.new_empty(T, dtype=torch.int8), torch.empty_like(probability_T)
    tensors = (key_X, token_X, start_E, row_start_E, probability_T, token_of_row_X, row_T, kept_T, weight_T)
    _launch(_place, triton.cdiv(T, _TOKENS), tensors, T, E, limit, TOKENS=_TOKENS)
    return token_of_row_X, row_T, kept_T.view(torch.bool), weight_T


def gradient(
    logits_TE: Tensor, expert_T: Tensor, kept_T: Tensor, counts_E: Tensor, grad_weight_T: Tensor, grad_loss: Tensor
) -> Tensor:
    """See `Top1Kernels`."""
    T, E = logits_TE.shape
    rows, padded = _block(E)
    grad_TE = torch.empty_like(logits_TE)
    tensors = (logits_TE, expert_T, kept_T.view(torch.int8), counts_E, grad_weight_T, grad_loss, grad_TE)
    _launch(_gradient, triton.cdiv(T, rows), tensors, T, E, ROWS=rows, EXPERTS=padded)
    return grad_TE


def _launch(kernel: Any, programs: int, tensors: tuple[Tensor, ...], *numbers: int, **sizes: int) -> None:
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        kernel[(programs,)](*tensors, *numbers, **sizes)


TRITON = Top1Kernels(choose, count, place, gradient)
