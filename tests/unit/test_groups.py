"""Expert-parallel groups in words."""

from __future__ import annotations

import pytest

from scmoe_ds.parallel.groups import describe_groups


@pytest.mark.parametrize(
    ("ep_size", "nodes", "text"),
    [
        (1, "a", "expert-parallel groups of ranks 0: all stay inside their node (1 node(s))"),
        (2, "aabb", "expert-parallel groups of ranks 0–1, 2–3: all stay inside their node (2 node(s))"),
        (4, "aabb", "expert-parallel groups of ranks 0–3 (over 2 nodes): 1 of 1 send tokens between nodes (2 node(s))"),
        (2, "abbb", "expert-parallel groups of ranks 0–1 (over 2 nodes), 2–3: 1 of 2 send tokens between nodes (2 node(s))"),
        (2, "a" * 20, "expert-parallel groups of ranks 0–1, 2–3, 4–5, 6–7, 8–9, 10–11, 12–13, 14–15, … (10 in all): all "
         "stay inside their node (1 node(s))"),
    ],
)  # fmt: skip
def test_who_shares_experts_and_who_crosses_nodes(ep_size: int, nodes: str, text: str) -> None:
    assert describe_groups(ep_size, nodes) == text
