"""One row per token and rank: which rows travel, what is said of them, and what the receiver makes of that."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from scmoe_ds.moe.choices import Choices
from scmoe_ds.moe.expand import RowsOfChoices
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.order import ByExpert
from scmoe_ds.moe.per_rank import PerRankLayout, row_numbers
from scmoe_ds.moe.received import ReceivedCopies
from scmoe_ds.moe.slices import TokenSlices
from tests.moe.test_decode import NoScatter

T, E = 41, 16


def uniform_routing(tokens: int, experts: int, k: int, kept: float = 1.0) -> Routing:
    """Every k experts are equally likely. The weight of choice k * T + t is its number."""
    expert_KT = torch.rand(tokens, experts).topk(k, dim=1).indices.t().contiguous()
    kept_KT = None if kept == 1 else torch.rand(k, tokens) < kept
    key_KT = expert_KT if kept_KT is None else torch.where(kept_KT, expert_KT, experts)
    rows_E = torch.bincount(key_KT.flatten(), minlength=experts + 1)[:experts]
    choices = Choices(expert_KT, kept_KT, ByExpert.of(key_KT), rows_E, rows_E)
    weight_KT = torch.arange(k * tokens, dtype=torch.float32).view(k, tokens).requires_grad_()
    return Routing(choices, weight_KT, tokens, torch.zeros(()))


@pytest.mark.parametrize(
    ("ranks", "k", "chunks", "kept"),
    [(2, 2, 1, 1.0), (2, 8, 3, 0.6), (4, 3, 1, 0.7), (4, 4, 2, 0.0), (8, 2, 3, 0.5), (16, 8, 1, 1.0), (16, 5, 2, 0.4)],
)
def test_rows_and_what_is_said_of_them(ranks: int, k: int, chunks: int, kept: float) -> None:
    torch.manual_seed(0)
    routing = uniform_routing(T, E, k, kept)
    layout = PerRankLayout.of(routing, TokenSlices(0, 1, ranks), chunks)
    tokens_TD = (torch.arange(T) + 0.0).unsqueeze(1).requires_grad_()
    rows_RD, described_C2 = layout.encode(tokens_TD), layout.describe(routing.weight_KT)
    chosen = [(t, k, int(e)) for k, of_T in enumerate(routing.expert_KT) for t, e in enumerate(of_T) if e >= 0]
    first_row = first_choice = 0
    for chunk, rank in itertools.product(range(chunks), range(ranks)):
        mine = [each for each in chosen if each[0] * chunks // T == chunk and each[2] * ranks // E == rank]
        counts = layout.rows_NPVX[chunk, rank, 0].tolist()
        experts = range(rank * E // ranks, (rank + 1) * E // ranks)
        assert counts == [sum(e == expert for _, _, e in mine) for expert in experts] + [len({t for t, _, _ in mine})]
        rows = rows_RD[first_row : first_row + counts[-1], 0].tolist()
        assert sorted(rows) == sorted({t for t, _, _ in mine}), "a token comes once"
        described = described_C2[first_choice : first_choice + len(mine)]
        said = zip(described[:, 1].tolist(), row_numbers(described).tolist(), strict=True)
        expected = sorted(mine, key=lambda each: each[2])
        for expert, group in itertools.groupby(zip(expected, said, strict=True), lambda pair: pair[0][2]):
            found = {(rows[number], weight) for _, (weight, number) in group}
            assert found == {(t, k * T + t) for t, k, e in mine if e == expert}
        first_row, first_choice = first_row + counts[-1], first_choice + len(mine)
    assert (first_row, first_choice) == (len(rows_RD), len(described_C2))
    grad_KT, grad_TD = torch.autograd.grad(
        (described_C2[:, 1] ** 2).sum() / 2 + (rows_RD**2).sum() / 2, (routing.weight_KT, tokens_TD)
    )
    assert torch.equal(grad_KT, torch.where(routing.expert_KT >= 0, routing.weight_KT.detach(), 0.0))
    copies_T = [len({e * ranks // E for each, _, e in chosen if each == t}) for t in range(T)]
    assert grad_TD.flatten().tolist() == [t * copies for t, copies in enumerate(copies_T)]
    assert layout.decode(rows_RD, None).flatten().tolist() == [t * copies for t, copies in enumerate(copies_T)]


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.25), (4, 0.45), (8, 0.68)])
def test_share_of_the_rows_of_choices(ranks: int, share: float) -> None:
    """Of 8 choices among 64 experts."""
    torch.manual_seed(0)
    layout = PerRankLayout.of(uniform_routing(2000, 64, 8), TokenSlices(0, 1, ranks))
    assert len(layout.copies.choice_of_row_R) / (8 * 2000) == pytest.approx(share, abs=0.02)


def loops(rows: Tensor, weights: Tensor, row_S: Tensor, total: bool) -> Tensor:
    parts = [weights[s] * (rows[s] if total else rows[r]) for s, r in enumerate(row_S.tolist())]
    if not total:
        return torch.stack(parts)
    sums = [sum((parts[s] for s, r in enumerate(row_S.tolist()) if r == row), torch.zeros(8)) for row in range(30)]
    return torch.stack(cast(Any, sums))


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_and_sums_equal_loops(
    dtype: torch.dtype, weighted: bool, total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scmoe_ds.moe.expand._BLOCK", 8 * 7)
    torch.manual_seed(0)
    row_S = torch.cat([torch.arange(30), torch.randint(30, (70,))])[torch.randperm(100)]
    choices, rows = RowsOfChoices.of(row_S, 30), torch.randn(100 if total else 30, 8).to(dtype).requires_grad_()
    weights = torch.rand(100).requires_grad_()
    function = choices.total if total else choices.expand
    result = function(rows, weights if weighted else None)
    read, direction = (rows, weights) if weighted else (rows,), torch.randn(result.shape).to(dtype)
    with NoScatter():
        grads = torch.autograd.grad(result, read, direction)
    wide = [each.detach().double().requires_grad_() for each in read]
    expected = loops(wide[0], wide[1] if weighted else torch.ones(100), row_S, total)
    once = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps  # one rounding to the dtype of the rows
    torch.testing.assert_close(result.double(), expected, rtol=once, atol=1e-6 if once > 1e-9 else 1e-12)
    for found, of, each in zip(grads, read, torch.autograd.grad(expected, wide, direction.double()), strict=True):
        rounded = max(once if of is rows else 1e-5, once if dtype == torch.float64 and of is rows else 0)
        torch.testing.assert_close(found.double(), each, rtol=rounded, atol=1e-5 if rounded > 1e-9 else 1e-12)


def test_weights_without_gradient_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scmoe_ds.moe.expand._dot", lambda *_: pytest.fail("nobody needs it"))
    choices = RowsOfChoices.of(torch.tensor([0, 1, 1]), 2)
    rows = torch.randn(2, 3, requires_grad=True)
    choices.total(choices.expand(rows, torch.rand(3)), torch.rand(3)).sum().backward()
    assert rows.grad is not None


def test_a_rank_that_receives_nothing_takes_part_in_the_backward_pass() -> None:
    received = ReceivedCopies.of(torch.zeros(2, 4, dtype=torch.int64))
    described, rows = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 5, requires_grad=True)
    choices, weight_C = received.choices_of(described)
    for result in (choices.total(choices.expand(rows), weight_C), choices.total(choices.expand(rows, weight_C))):
        grads = torch.autograd.grad(result.sum(), (described, rows))
        assert [each.shape for each in grads] == [described.shape, rows.shape]
