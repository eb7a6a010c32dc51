"""Experts of two linear layers, one product per expert and projection, and everything else once for all of them.

Their products write into one tensor. So the activation is one kernel, nothing is joined, and no weight is copied.

Shape suffixes: S rows received, D hidden, F feed-forward, I/O in/out of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Parameters = Sequence[Any]
"""Weight and bias (or None) of one projection, expert after expert."""


def linear_experts(
    activate: Callable[[Tensor], Tensor],
    inputs: Sequence[nn.Linear],
    outputs: Sequence[nn.Linear],
    rows_SD: Tensor,
    rows_per_expert: Sequence[int],
) -> Tensor:
    """output(activate(input(x))) of each expert on its own rows; for the backward pass no activated rows are kept.

    Args:
        activate: [S, F or 2F] → [S, F], element by element.
        inputs, outputs: of each expert, in the dtype of the rows.
        rows_SD: rows in expert order.
        rows_per_expert: rows of each; may be zero.
    """
    parameters = [each for layer in (*inputs, *outputs) for each in (layer.weight, layer.bias)]
    return _LinearExperts.apply(activate, list(rows_per_expert), rows_SD, *parameters)


class _LinearExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activate: Callable[[Tensor], Tensor], counts: list[int], rows_SD: Tensor, *parameters: Any
    ) -> Tensor:
        first, second = _halves(parameters)
        inner_SF = _project(rows_SD, counts, first)
        ctx.activate, ctx.counts = activate, counts
        ctx.save_for_backward(rows_SD, inner_SF, *parameters)
        return _project(activate(inner_SF), counts, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_SD, inner_SF, *parameters = ctx.saved_tensors
        (first, second), (_, _, for_rows, *needed) = _halves(parameters), ctx.needs_input_grad
        with torch.enable_grad():
            inner_SF = inner_SF.detach().requires_grad_()
            activated_SF = ctx.activate(inner_SF)
        grad_SF, of_second = _gradients(grads[0], activated_SF.detach(), ctx.counts, second, _halves(needed)[1])
        (grad_SF,) = torch.autograd.grad(activated_SF, inner_SF, grad_SF)
        grad_SD, of_first = _gradients(grad_SF, rows_SD, ctx.counts, first, _halves(needed)[0], for_rows)
        return None, None, grad_SD, *of_first, *of_second


def _halves(both: Parameters) -> tuple[Parameters, Parameters]:
    return both[: len(both) // 2], both[len(both) // 2 :]


def _project(rows_SI: Tensor, counts: list[int], parameters: Parameters) -> Tensor:
    weights, biases = parameters[::2], parameters[1::2]
    output_SO = rows_SI.new_empty(rows_SI.shape[0], weights[0].shape[0])
    for rows, output, weight, bias in zip(rows_SI.split(counts), output_SO.split(counts), weights, biases, strict=True):
        product(rows, weight, bias, output)
    return output_SO


def product(rows_SI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_SO: Tensor | None = None) -> Tensor:
    """[S, O] of one expert's projection, for who has gradients of his own."""
    if bias_O is None:
        return torch.mm(rows_SI, weight_OI.t(), out=out_SO)
    return torch.addmm(bias_O, rows_SI, weight_OI.t(), out=out_SO)


def _gradients(
    grad_SO: Tensor,
    rows_SI: Tensor,
    counts: list[int],
    parameters: Parameters,
    needed: Sequence[bool],
    rows: bool = True,
) -> tuple[Any, list[Tensor | None]]:
    """Of the rows, unless nobody needs it, and of the parameters. A bias's is one sum, which torch adds up in fp32."""
    grad_SI = torch.empty_like(rows_SI) if rows else None
    grads: list[Tensor | None] = []
    parts = zip(grad_SO.split(counts), rows_SI.split(counts), strict=True)
    for expert, (grad, part) in enumerate(parts):
        for_weight, for_bias = needed[2 * expert : 2 * expert + 2]
        grads += [grad.t() @ part if for_weight else None, grad.sum(0) if for_bias else None]
    if grad_SI is not None:
        for grad, part, weight in zip(grad_SO.split(counts), grad_SI.split(counts), parameters[::2], strict=True):
            torch.mm(grad, weight, out=part)
    return grad_SI, grads
