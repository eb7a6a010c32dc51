"""The loss of self-distillation against formulas in fp64, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.config.adapt_section import DistillConfig
from scmoe_ds.models import divergence as module
from scmoe_ds.models.distillation import Targets, relative_error
from scmoe_ds.models.divergence import BestTokens, WholeDistribution, best_tokens, divergence

B, S, V = 2, 5, 17


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(B, S, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float, kept: Tensor | None = None) -> Tensor:
    """[B, S]; kept: [B, S, V] bool, the tokens that are known one by one, the others as one bucket."""
    p, q = (teacher.double() / temperature).softmax(-1), (student / temperature).softmax(-1)
    if kept is None or kept.all():
        return (p * (p / q).log()).sum(-1)
    rest_p, rest_q = (p * ~kept).sum(-1), (q * ~kept).sum(-1)
    return (p * (p / q).log() * kept).sum(-1) + rest_p * (rest_p / rest_q).log()


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 3 * V)  # ten rows are four chunks


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("best", [None, 4, V])
def test_divergence_and_its_gradient(dtype: torch.dtype, near: float, temperature: float, best: int | None) -> None:
    student, teacher = logits(1, dtype).requires_grad_(), logits(2, dtype)
    of_token = torch.rand(B, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    known = WholeDistribution(teacher) if best is None else best_tokens(teacher, best, temperature)
    found = divergence(student, known, temperature)
    (found * of_token).sum().backward()

    exact = student.detach().double().requires_grad_()
    kept = None if best is None else torch.zeros(B, S, V).scatter(-1, known.ids, 1.0).bool()
    expected = kl_by_hand(exact, teacher, temperature, kept)
    (expected * of_token).sum().backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=near)
    rounding = 2**-8 if dtype == torch.bfloat16 else near  # the gradient has the logits' dtype
    assert student.grad is not None and exact.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=rounding, atol=max(near, rounding * 1e-3))


def test_of_equal_models_nothing_is_left() -> None:
    same = logits(4)
    for known in (WholeDistribution(same), best_tokens(same, 3)):
        student = same.clone().requires_grad_()
        found = divergence(student, known)
        found.sum().backward()
        assert student.grad is not None
        assert found.abs().max() < 1e-14 and student.grad.abs().max() < 1e-14


def test_best_tokens_know_the_rest() -> None:
    found = best_tokens(logits(5), 4, 2.0)
    p = (logits(5) / 2.0).softmax(-1)
    torch.testing.assert_close(found.log_p_of_ids.exp(), p.sort(-1, descending=True).values[..., :4])
    torch.testing.assert_close(found.log_rest.exp(), 1 - found.log_p_of_ids.exp().sum(-1))


def test_a_teacher_in_half_precision_is_a_distribution_again() -> None:
    exact = best_tokens(logits(6), 4)
    rounded = BestTokens(exact.ids.int(), exact.log_p_of_ids.half(), exact.log_rest.half())
    found = divergence(logits(7), rounded)
    torch.testing.assert_close(found, divergence(logits(7), exact), rtol=3e-3, atol=3e-3)
    assert (found >= 0).all()


def test_a_shared_vocabulary_is_whole(tmp_path: Path) -> None:
    """One rank that holds all of it takes the path of several; tests/distributed has two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = logits(8).requires_grad_()
        for known in (WholeDistribution(logits(9)), best_tokens(logits(9), 4)):
            alone, shared = divergence(student, known), divergence(student, known, group=dist.group.WORLD)
            torch.testing.assert_close(shared, alone, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(best_tokens(logits(9), 4, 1.0, dist.group.WORLD).log_rest, known.log_rest)
    finally:
        dist.destroy_process_group()


def test_relative_error_by_hand() -> None:
    generator = torch.Generator().manual_seed(10)
    student, teacher = (
        [torch.randn(B, S, 3, dtype=torch.float64, generator=generator) for _ in range(2)] for _ in range(2)
    )
    mask = torch.ones(B, S)
    mask[0, 3:] = 0
    kept = mask.bool()
    by_hand = [((s - t)[kept] ** 2).sum() / (t[kept] ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(relative_error(student, teacher, mask), sum(by_hand) / 2)  # type: ignore[operator]


def test_weights_of_the_parts() -> None:
    weights = DistillConfig(alpha=0.5, beta=0.25, gamma=2.0, temperature=3.0)
    student, mask = logits(11).requires_grad_(), torch.ones(B, S)
    mask[1, 2:] = 0
    streams, of_teacher = [torch.full((B, S, 3), 1.5)], [torch.ones(B, S, 3)]
    targets = Targets(weights, WholeDistribution(logits(12)), of_teacher, lambda: streams)
    lm = student.square().mean()
    parts = targets.loss(student, lambda: lm, mask)
    kl = kl_by_hand(student, logits(12), 3.0)[mask.bool()].mean()
    torch.testing.assert_close(parts.total, 0.5 * 9 * kl + 0.25 * lm + 2.0 * 0.25)
    torch.testing.assert_close(parts.kl, kl)
    assert float(parts.match or 0) == 0.25  # (1.5 - 1)² / 1²


def test_without_weight_the_text_teaches_nothing() -> None:
    student = logits(13).requires_grad_()
    parts = Targets(DistillConfig(beta=0.0), WholeDistribution(logits(14))).loss(student, lambda: student.sum(), None)
    assert not parts.lm.requires_grad  # nothing is kept for a backward pass that never comes
    torch.testing.assert_close(parts.lm, student.sum())
