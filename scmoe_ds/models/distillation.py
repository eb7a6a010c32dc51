"""The loss of self-distillation: the source of a converted model teaches it, micro-batch by micro-batch.

    loss = α τ² KL(teacher ‖ student) + β LM + γ match + the model's own balancing loss

    KL, LM   means over the tokens that count; LM is the cross entropy with the text itself
    match    mean over the MoE layers of Σ (s - t)² / Σ t², where s and t are the student's and the teacher's residual
             stream behind the layer's block; with a late join, behind the place at which it joins

τ² keeps the size of the gradient when τ grows (arXiv 1503.02531, section 2.1).

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scmoe_ds.config.adapt_section import DistillConfig
from scmoe_ds.models.divergence import Distribution, divergence
from scmoe_ds.models.parallel_layers import Group


class LossParts(NamedTuple):
    """Scalars in fp32.

    Attributes:
        total: what is minimised, without the balancing loss.
        lm: cross entropy with the text, in nats per token.
        kl: KL(teacher ‖ student) at the temperature, in nats per token, without weight and τ²; None: its weight is 0.
        match: without weight; None: its weight is 0.
    """

    total: Tensor
    lm: Tensor
    kl: Tensor | None = None
    match: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """What the teacher says of one micro-batch.

    Attributes:
        weights: α, β, γ and τ.
        distribution: of the next token at every place; None: α is 0.
        streams: [B, S, D] behind each MoE layer; empty: γ is 0.
        streams_of_student: the same of the student, to be called when its pass is over.
    """

    weights: DistillConfig
    distribution: Distribution | None = None
    streams: Sequence[Tensor] = ()
    streams_of_student: Callable[[], Sequence[Tensor]] = tuple

    def loss(
        self, logits: Tensor, lm: Callable[[], Tensor], loss_mask: Tensor | None, group: Group = None
    ) -> LossParts:
        """
        Args:
            logits: [B, S, V] the student's, this rank's range of the vocabulary.
            lm: computes the mean cross entropy with the text; with β = 0 it is for the log alone.
            loss_mask: [B, S], 0 where a token does not count; None: all do.
            group: the ranks that share the vocabulary.
        """
        weights, kl, match = self.weights, None, None
        with torch.set_grad_enabled(weights.beta > 0 and torch.is_grad_enabled()):
            lm_loss = lm()
        total = weights.beta * lm_loss
        if self.distribution is not None:
            kl_BS = divergence(logits, self.distribution, weights.temperature, group)
            kl = masked_mean(kl_BS, loss_mask)
            total = total + weights.alpha * weights.temperature**2 * kl
        if self.streams:
            match = relative_error(self.streams_of_student(), self.streams, loss_mask)
            total = total + weights.gamma * match
        return LossParts(total, lm_loss, kl, match)


TEXT_ALONE = Targets(DistillConfig(alpha=0.0, beta=1.0))
"""Without a teacher."""


def relative_error(streams: Sequence[Tensor], of_teacher: Sequence[Tensor], loss_mask: Tensor | None) -> Tensor:
    """Mean over the layers of Σ (s - t)² / Σ t² over the tokens that count; a scalar in fp32 (fp64 of fp64).

    Args:
        streams, of_teacher: [B, S, D] of each layer; the teacher's get no gradient.
    """
    errors = []
    for student_BSD, teacher_BSD in zip(streams, of_teacher, strict=True):
        dtype = torch.promote_types(student_BSD.dtype, torch.float32)
        target_BSD = teacher_BSD.detach().to(dtype)
        distance_BS = (student_BSD.to(dtype) - target_BSD).square().sum(-1)
        size_BS = target_BSD.square().sum(-1)
        tiny = torch.finfo(dtype).tiny
        errors.append(masked_mean(distance_BS, loss_mask) / masked_mean(size_BS, loss_mask).clamp(min=tiny))
    return torch.stack(errors).mean()


def masked_mean(losses_BS: Tensor, loss_mask_BS: Tensor | None) -> Tensor:
    """Mean over the tokens whose mask is not zero; 0 if there is none."""
    if loss_mask_BS is None:
        return losses_BS.mean()
    mask_BS = loss_mask_BS.float()
    return (losses_BS * mask_BS).sum() / mask_BS.sum().clamp(min=1)
