"""Which decisions about experts go together: the page and the errors are those of one table."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.attachment import DECISIONS, EARLY, EXPERTS, ROUTING, Attachment, Decision, check_together

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


def row(decision: Decision) -> str:
    taken = [" × " if place in decision.takes else " " for place in (ROUTING, EARLY, EXPERTS)]
    needs = ["expert-parallel ranks"] * decision.ranks + ["tensor-parallel size 1"] * decision.own_tokens
    return "|".join([f"| {decision.name} ", *taken, f" {', '.join(needs)} |" if needs else " |"])


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## What goes with what")[1].split("##")[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[2:] == [row(each) for each in DECISIONS]


def test_what_was_put_into_a_place_meanwhile_is_not_replaced() -> None:
    layer = SimpleNamespace(routing_rule=None, early_rule=None)
    first = Attachment([(layer, "early_rule", "early"), (layer, "routing_rule", "first")])
    first.attach()
    with pytest.raises(ArgumentError, match="routing_rule of a SimpleNamespace was changed meanwhile"), first.paused():
        second = Attachment([(layer, "routing_rule", "second")])
    assert (layer.early_rule, layer.routing_rule) == (None, "second")
    second.detach()
    first.attach()
    assert (layer.early_rule, layer.routing_rule) == ("early", "first")


def goes_with(decision: Decision) -> set[str]:
    found = set()
    for own, other in permutations(DECISIONS, 2):
        if own is decision:
            try:
                check_together(own, other, "--flag")
                found.add(other.name)
            except ArgumentError as error:
                assert str(error).startswith(f"--flag: does not go with {other.name}, as both change the")
                assert str(error).endswith(f"of a layer; {other.without}, or {own.without}")
    return found


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("drops", {"halves of experts", "load-aware drops", "low precision", "offloaded experts"}),
        ("halves of experts", {"drops", "load-aware drops"}),
        ("low precision", {"drops", "load-aware drops"}),
        ("copies of experts", set()),
        ("offloaded experts", {"drops", "load-aware drops"}),
    ],
)
def test_decisions_that_take_different_places_go_together(name: str, others: set[str]) -> None:
    (decision,) = (each for each in DECISIONS if each.name == name)
    assert goes_with(decision) == others
