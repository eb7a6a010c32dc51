"""Expert-parallel groups in words."""

from __future__ import annotations

import pytest
from deepspeed.utils import groups

from scmoe_ds.parallel.groups import Layout, describe_groups


@pytest.mark.parametrize(
    ("ep_size", "nodes", "text"),
    [
        (1, "a", "expert-parallel groups of ranks 0: all stay inside their node (1 node(s))"),
        (2, "aabb", "expert-parallel groups of ranks 0–1, 2–3: all stay inside their node (2 node(s))"),
        (4, "aabb", "expert-parallel groups of ranks 0–3 (over 2 nodes): 1 of 1 send tokens between nodes (2 node(s))"),
        (
            2,
            "abbb",
            "expert-parallel groups of ranks 0–1 (over 2 nodes), 2–3: 1 of 2 send tokens between nodes (2 node(s))",
        ),
        (
            2,
            "a" * 20,
            "expert-parallel groups of ranks 0–1, 2–3, 4–5, 6–7, 8–9, 10–11, 12–13, 14–15, … (10 in all): all "
            "stay inside their node (1 node(s))",
        ),
    ],
)
def test_who_shares_experts_and_who_crosses_nodes(ep_size: int, nodes: str, text: str) -> None:
    assert describe_groups(Layout(len(nodes), expert_size=ep_size), nodes) == [text]


@pytest.mark.parametrize(
    ("ranks", "tp", "ep", "divided", "expert_parallel", "exchange"),
    [
        (4, 2, 2, False, [[0, 1], [2, 3]], [[0, 1], [2, 3]]),
        (4, 2, 2, True, [[0, 2], [1, 3]], [[0, 2], [1, 3]]),
        (4, 2, 1, False, [[0], [1], [2], [3]], [[0, 1], [2, 3]]),
        (4, 2, 4, False, [[0, 1, 2, 3]], [[0, 1, 2, 3]]),
        (8, 2, 2, True, [[0, 2], [1, 3], [4, 6], [5, 7]], [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups_are_those_of_deepspeed(
    ranks: int, tp: int, ep: int, divided: bool, expert_parallel: list, exchange: list
) -> None:
    layout = Layout(ranks, tp, ep, divided)
    assert [list(group) for group in layout.expert_parallel] == expert_parallel
    assert [list(group) for group in layout.exchange] == exchange
    if divided:
        theirs, _ = groups._get_expert_parallel_ranks(ranks, tp, ep)
        assert sorted(theirs) == sorted(expert_parallel)


def test_who_shares_layers_is_said_where_any_do() -> None:
    tensor, expert = describe_groups(Layout(4, 2, 2, True), "aabb")
    assert tensor == "tensor-parallel groups of ranks 0–1, 2–3: all stay inside their node (2 node(s))"
    assert expert.startswith("expert-parallel groups of ranks 0+2 (over 2 nodes), 1+3 (over 2 nodes): 2 of 2 send")
