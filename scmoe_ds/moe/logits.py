"""The gate's matrix product, in fp32 whatever surrounds the layer.

Shape suffixes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fp32_logits(tokens_TD: Tensor, weight_ED: Tensor, used_T: Tensor | None = None) -> Tensor:
    """[T, E] fp32.

    Args:
        tokens_TD, weight_ED: any floating dtype.
        used_T: bool; the others' logits are zeros, whatever they hold. None: all.
    """
    with torch.autocast(tokens_TD.device.type, enabled=False):
        if used_T is None and tokens_TD.dtype == torch.float32:
            return F.linear(tokens_TD, weight_ED.float())
        return _Logits.apply(tokens_TD, weight_ED, used_T)


class _Logits(torch.autograd.Function):
    """Keeps the tokens as they are. torch keeps the copy in fp32, twice as large as bf16 tokens."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, weight_ED: Tensor, used_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens_TD, weight_ED, used_T)
        return F.linear(_fp32(tokens_TD, used_T), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_TE,), (tokens_TD, weight_ED, used_T) = grads, ctx.saved_tensors
        grad_TD = grad_ED = None
        with torch.autocast(grad_TE.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_TD = (grad_TE @ weight_ED.float()).to(tokens_TD.dtype)
            if ctx.needs_input_grad[1]:
                grad_ED = (grad_TE.t() @ _fp32(tokens_TD, used_T)).to(weight_ED.dtype)
        return grad_TD, grad_ED, None


def _fp32(tokens_TD: Tensor, used_T: Tensor | None) -> Tensor:
    tokens_TD = tokens_TD.float()
    return tokens_TD if used_T is None else tokens_TD.masked_fill(~used_T.unsqueeze(1), 0.0)
