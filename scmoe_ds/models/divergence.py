"""KL(teacher ‖ student) of every token, from logits of any precision, over a vocabulary that ranks may share.

    KL = Σ_v p_v (log p_v - log q_v)      p = softmax(teacher / τ), q = softmax(student / τ)

A few rows at a time are in fp32, forward and backward. What is kept for the backward pass are the logits themselves,
which exist anyway, and two numbers per token. The gradient is (q - p) / τ for the student, none for the teacher.

A teacher on disk is known by its N best tokens and by the mass of the rest. Within the rest it counts as the student's
own distribution: the sum over v becomes one over N tokens and one bucket.

Shape suffixes: B batch, S sequence, V this rank's range of the vocabulary, T tokens, R rows, N best tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.comm.gather import gather_last_dimension
from scmoe_ds.models.parallel_layers import Group, gather_vocabulary

_ELEMENTS_AT_ONCE = 1 << 18
"""Of logits in fp32: 1 MiB, and eight temporaries of that size, which stay in a processor's cache."""
_MOST_CHUNKS = 64
"""Of many tokens; more of them would be launches of small kernels, and save next to nothing beside the logits."""


class WholeDistribution(NamedTuple):
    """A teacher in memory. logits: [B, S, V], this rank's range of the vocabulary; padding included."""

    logits: Tensor

    def log_sum(self, rows: slice, student_RV: Tensor, temperature: float, first: int) -> Tensor:
        """[R] of this rank's range; the ranks' joint one is `log_p`'s."""
        return _scaled(self.logits[rows], temperature).logsumexp(-1)

    def log_p(self, rows: slice, log_q_RV: Tensor, log_sum_R: Tensor, temperature: float, first: int) -> Tensor:
        """[R, V]."""
        return _scaled(self.logits[rows], temperature) - log_sum_R.unsqueeze(-1)


class BestTokens(NamedTuple):
    """A teacher on disk; every rank holds all of it.

    Attributes:
        ids: [B, S, N] integers, of the whole vocabulary.
        log_p_of_ids: [B, S, N] log-probabilities at the temperature.
        log_rest: [B, S] log-probability of all other tokens together.
    """

    ids: Tensor
    log_p_of_ids: Tensor
    log_rest: Tensor

    def log_sum(self, rows: slice, student_RV: Tensor, temperature: float, first: int) -> Tensor:
        """[R] of the student, over the rest."""
        return self._with(student_RV, rows, first, torch.full_like(self.log_p_of_ids[rows], -torch.inf)).logsumexp(-1)

    def log_p(self, rows: slice, log_q_RV: Tensor, log_sum_R: Tensor, temperature: float, first: int) -> Tensor:
        """[R, V]; `log_sum_R` is the student's log-probability of the rest."""
        kept = torch.cat([self.log_p_of_ids[rows], self.log_rest[rows, None]], -1).to(log_q_RV.dtype).log_softmax(-1)
        rest_RV = log_q_RV + (kept[:, -1] - log_sum_R).unsqueeze(-1)
        return self._with(rest_RV, rows, first, kept[:, :-1])

    def _with(self, values_RV: Tensor, rows: slice, first: int, of_ids_RN: Tensor) -> Tensor:
        """The values, with others for the best tokens that are in this rank's range."""
        V = values_RV.shape[-1]
        own_RN = self.ids[rows].long() - first
        place_RN = torch.where((own_RN >= 0) & (own_RN < V), own_RN, V)  # the others go to a column too many
        return F.pad(values_RV, (0, 1)).scatter(-1, place_RN, of_ids_RN.to(values_RV.dtype))[:, :V]


Distribution = Union[WholeDistribution, BestTokens]


def divergence(student: Tensor, teacher: Distribution, temperature: float = 1.0, group: Group = None) -> Tensor:
    """KL(teacher ‖ student) of each token in nats, [B, S] fp32 (fp64 for logits in fp64).

    Args:
        student: [B, S, V] logits of this rank's range.
        teacher: of the same tokens; it gets no gradient.
        temperature: τ, by which both are divided.
        group: the ranks that share the vocabulary, which get the same result. Collective over them.
    """
    flat = type(teacher)(*(each.detach().flatten(0, 1) for each in teacher))
    return _Divergence.apply(student.flatten(0, 1), type(teacher), temperature, group, *flat).view(student.shape[:2])


def best_tokens(logits: Tensor, count: int, temperature: float = 1.0, group: Group = None) -> BestTokens:
    """The `count` most probable tokens of each place, and the mass of the rest.

    Args:
        logits: [B, S, V] of this rank's range.
        group: the ranks that share the vocabulary; each gets the same result. Collective over them.
    """
    parts = []
    for rows in logits.flatten(0, 1).split(_rows_at_once(logits)):
        scaled = _scaled(gather_vocabulary(rows, group), temperature)
        log_p_RV = scaled.log_softmax(-1)
        log_p, ids = log_p_RV.topk(min(count, log_p_RV.shape[-1]), -1)
        parts.append((ids, log_p, log_p_RV.scatter(-1, ids, -torch.inf).logsumexp(-1)))
    return BestTokens(*(torch.cat(each).unflatten(0, logits.shape[:2]) for each in zip(*parts, strict=True)))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        kind: type[Any],
        temperature: float,
        group: Group,
        *of_teacher: Tensor,
    ) -> Tensor:
        teacher, first = kind(*of_teacher), _first_of(student_TV, group)
        sums = [
            torch.stack([z_RV.logsumexp(-1), teacher.log_sum(rows, z_RV, temperature, first)])
            for rows, z_RV in _chunks(student_TV, temperature)
        ]
        sums_2T = torch.cat(sums, 1)
        if group is not None:
            sums_2T = gather_last_dimension(sums_2T.unsqueeze(-1), group).logsumexp(-1)
        if kind is BestTokens:
            sums_2T[1] -= sums_2T[0]
        divergences = []
        for rows, z_RV in _chunks(student_TV, temperature):
            log_q_RV, log_p_RV = _logarithms(z_RV, teacher, rows, sums_2T, temperature, first)
            p_RV = log_p_RV.exp()
            divergences.append(torch.where(p_RV > 0, p_RV * (log_p_RV - log_q_RV), 0).sum(-1))
        divergence_T = torch.cat(divergences)
        if group is not None:
            divergence_T = gather_last_dimension(divergence_T.unsqueeze(-1), group).sum(-1)
        ctx.save_for_backward(student_TV, sums_2T, *of_teacher)
        ctx.kind, ctx.temperature, ctx.first = kind, temperature, first
        return divergence_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        student_TV, sums_2T, *of_teacher = ctx.saved_tensors
        teacher, grad_TV = ctx.kind(*of_teacher), torch.empty_like(student_TV)
        for rows, z_RV in _chunks(student_TV, ctx.temperature):
            log_q_RV, log_p_RV = _logarithms(z_RV, teacher, rows, sums_2T, ctx.temperature, ctx.first)
            factor_R = grads[0][rows].to(z_RV.dtype) / ctx.temperature
            grad_TV[rows] = (log_q_RV.exp() - log_p_RV.exp()) * factor_R.unsqueeze(-1)
        return (grad_TV, *[None] * (3 + len(of_teacher)))


def _logarithms(
    z_RV: Tensor, teacher: Distribution, rows: slice, sums_2T: Tensor, temperature: float, first: int
) -> tuple[Tensor, Tensor]:
    log_q_RV = z_RV - sums_2T[0, rows].unsqueeze(-1)
    return log_q_RV, teacher.log_p(rows, log_q_RV, sums_2T[1, rows], temperature, first)


def _chunks(logits_TV: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of logits at a time, divided by the temperature."""
    step = _rows_at_once(logits_TV)
    for start in range(0, len(logits_TV), step):
        rows = slice(start, start + step)
        yield rows, _scaled(logits_TV[rows], temperature)


def _rows_at_once(logits: Tensor) -> int:
    V = logits.shape[-1]
    return max(1, _ELEMENTS_AT_ONCE // V, logits.numel() // V // _MOST_CHUNKS)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _first_of(student_TV: Tensor, group: Group) -> int:
    """The first token of this rank's range: megatron-core gives every rank equally many."""
    return 0 if group is None else dist.get_rank(group) * student_TV.shape[-1]
