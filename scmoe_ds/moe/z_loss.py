"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): keeps a router's logits small, so that they stay exact.

    L_z = mean over tokens of (log Σ_e exp(logit_e))²

The loss has no place in what a layer returns. Its gradient joins that of the logits in the backward pass, as in
Megatron-core. Loss scaling and accumulation multiply the gradient of the model's loss: `follow` catches that factor
where the backward pass begins, and every layer's z-loss gets the same one.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ZLoss:
    """The z-loss of one router.

    Args:
        coefficient: its weight against the model's loss.

    Attributes:
        factor: gradient of the model's loss, a scalar; None before the first backward pass.
        value: L_z of the last pass, a scalar; None before the first.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self.factor: Tensor | None = None
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ZLoss:
        return ZLoss(self.coefficient)

    def attach(self, logits_TE: Tensor, used_T: Tensor | None = None) -> Tensor:
        """The same logits, whose gradient gets that of the z-loss.

        Args:
            used_T: bool, the tokens that count; None: all.
        """
        return _Attach.apply(logits_TE, used_T, self) if logits_TE.requires_grad else logits_TE


def follow(loss: Tensor, of: Iterable[ZLoss]) -> Tensor:
    """The model's loss, the same value: its backward pass tells the z-losses by how much it counts."""
    return _Follow.apply(loss, tuple(of))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, used_T: Tensor | None, z_loss: ZLoss) -> Tensor:
        log_sum_T = logits_TE.float().logsumexp(1)
        if used_T is not None:
            log_sum_T = log_sum_T * used_T
        tokens = max(len(logits_TE), 1) if used_T is None else used_T.sum().clamp(min=1)
        z_loss.value = log_sum_T.square().sum() / tokens
        ctx.save_for_backward(logits_TE, log_sum_T)
        ctx.tokens, ctx.z_loss = tokens, z_loss
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TE,), (logits_TE, log_sum_T), z_loss = grads, ctx.saved_tensors, ctx.z_loss
        if z_loss.factor is None:
            raise RuntimeError(
                "router z-loss: the gradient of the model's loss is not known; train through scmoe_ds.initialize with "
                "a model that returns its loss, or set router.z_loss_coefficient to 0"
            )
        weight_T = log_sum_T * (2 * z_loss.coefficient * z_loss.factor.float() / ctx.tokens)
        own_TE = weight_T.unsqueeze(1) * (logits_TE.float().softmax(1))
        return grad_TE + own_TE.to(grad_TE.dtype), None, None


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, of: tuple[ZLoss, ...]) -> Tensor:
        ctx.of = of
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        for z_loss in ctx.of:
            z_loss.factor = grads[0].detach()
        return grads[0], None
