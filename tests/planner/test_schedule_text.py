"""Names of many layers in one."""

from __future__ import annotations

import pytest

from scmoe_ds.planner.schedule_text import names_text


@pytest.mark.parametrize(
    "names, text",
    [
        (["moe"], "moe"),
        (["blocks.1.mlp", "blocks.1.mlp"], "blocks.1.mlp"),
        (["blocks.1.mlp", "blocks.3.mlp"], "blocks.{1,3}.mlp"),
        ([f"h.{number}.mlp" for number in range(1, 24, 2)], "h.{1,3,…,23}.mlp"),
        (["encoder.1.mlp", "decoder.3.mlp"], "encoder.1.mlp, decoder.3.mlp"),
        (["a", "b.c", "d", "e", "f"], "a, b.c, …, f"),
        (["moe_a", "moe_b"], "moe_a, moe_b"),
    ],
)
def test_names(names: list[str], text: str) -> None:
    assert names_text(names) == text
