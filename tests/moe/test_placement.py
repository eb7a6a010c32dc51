"""Who holds which expert, against the groups that DeepSpeed makes."""

from __future__ import annotations

import pytest

from scmoe_ds.moe.placement import Placement
from scmoe_ds.parallel.groups import Layout


@pytest.mark.parametrize(("ranks", "tp", "ep", "divided"), [(4, 1, 2, False), (4, 2, 2, False), (8, 2, 2, True)])
def test_each_group_holds_every_expert_once(ranks: int, tp: int, ep: int, divided: bool) -> None:
    placement = Placement(ep, 3, tp if divided else 1)
    for group in Layout(ranks, tp, ep, divided).expert_parallel:
        assert [placement.expert_parallel_rank(rank) for rank in group] == list(range(ep))
        assert [placement.first_expert(rank) for rank in group] == [3 * place for place in range(ep)]


def test_the_first_ranks_of_an_expert_hold_its_pieces() -> None:
    placement = Placement(2, 3, 2)
    assert [list(placement.first_ranks_of(expert)) for expert in (0, 2, 3, 5)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert list(Placement(4, 1).first_ranks_of(2)) == [2]
