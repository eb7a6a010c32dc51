"""What the paper does not state and its rows without a shortcut choose: settings, and which figures are fitted.

Every candidate of a family of models is fitted with every list of figures. The least loss on the fitted rows counts,
and nothing else; no row with a shortcut is simulated here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from benchmarks.predict.paper_fit import Factors, fit, loss_of
from benchmarks.predict.paper_rows import SETTINGS, Row, Setting

FAMILIES = {"images": ("swin",), "language": ("gpt2", "llama2", "gpt3", "two nodes")}
"""Settings that share what is chosen: one software."""
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "images": [{"micro_batch": images} for images in (16, 64, 128)],
    "language": [
        {"capacity": capacity, "fused_attention": fused, "micro_batch": sequences}
        for capacity, fused, sequences in itertools.product(("rows", "tokens"), (False, True), (None, 1, 2, 4))
    ],
}
_PAIRS = (("products", "memory"), ("products", "rows"), ("memory", "rows"), ("products", "launch"))
FIGURES: dict[str, list[tuple[str, ...]]] = {
    "8×A30": [("inside", *pair) for pair in _PAIRS],
    "8×A800": [("inside", *pair) for pair in _PAIRS],
    # One row is fitted: no more figures than rows.
    "16×A800": [("network",)],
}


class Predicts(Protocol):
    """Simulates the rows of a setting."""

    def value(self, row: Row, factors: Factors) -> float: ...


@dataclass(frozen=True)
class Fitted:
    """Figures of a group's cluster.

    Attributes:
        free: which were fitted.
        loss: squared errors of the fitted rows, each over what the row may be off.
    """

    free: tuple[str, ...]
    factors: Factors
    loss: float


@dataclass(frozen=True)
class Choice:
    """A candidate with the best figures of each of its groups."""

    facts: dict[str, Any]
    fits: dict[str, Fitted]

    @property
    def loss(self) -> float:
        return sum(found.loss for found in self.fits.values())


def choices(family: str, rows: Sequence[Row], simulate: Callable[[str, Setting], Predicts]) -> list[Choice]:
    """All candidates of a family, the best one first.

    Args:
        rows: of any settings; those that the fit may read are read.
        simulate: makes the simulation of a setting with these facts.
    """
    asked = [row for row in rows if row.fitted and row.setting in FAMILIES[family]]
    found = []
    for facts in CANDIDATES[family]:
        names = dict.fromkeys(row.setting for row in asked)
        simulations = {name: simulate(name, replace(SETTINGS[name], **facts)) for name in names}
        found.append(Choice(facts, dict(_fits(asked, simulations))))
    return sorted(found, key=lambda choice: choice.loss)


def _fits(asked: Sequence[Row], simulations: dict[str, Predicts]) -> Iterator[tuple[str, Fitted]]:
    def predict(factors: Factors, rows: Sequence[Row]) -> list[float]:
        return [simulations[row.setting].value(row, factors) for row in rows]

    for group in dict.fromkeys(SETTINGS[row.setting].group for row in asked):
        own = [row for row in asked if SETTINGS[row.setting].group == group]
        tried = []
        for free in FIGURES[group]:
            factors = fit(own, predict, free, Factors())
            tried.append(Fitted(free, factors, loss_of(own, predict(factors, own))))
        yield group, min(tried, key=lambda each: each.loss)
