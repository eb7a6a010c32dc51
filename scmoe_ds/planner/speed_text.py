"""How two speeds are compared in words: a gain, a loss, or neither. A loss is never called a small gain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from scmoe_ds.planner.rounds import Spread

NOTICEABLE = 1.01
"""A speed-up by less, or a loss of less, is "no difference", measured or predicted."""

Change = Literal["gain", "loss", "none"]


def change(speedup: float) -> Change:
    """What a ratio of speeds is.

    Args:
        speedup: time of the other over time of ours; above 1, ours is faster.
    """
    return "gain" if speedup >= NOTICEABLE else "loss" if speedup <= 1 / NOTICEABLE else "none"


def measured_change(speedup: Spread) -> Change:
    """The same for a measured ratio: "none" also if 1 lies within its spread."""
    return "none" if speedup.p10 <= 1 <= speedup.p90 else change(speedup.median)


def compared(speedup: float, other: str) -> str:
    """The predicate of a sentence about a predicted ratio: "is 1.31 × as fast as X", "takes 16 % longer than X"."""
    return _predicate(change(speedup), speedup, other)


def compared_as_measured(speedup: Spread, other: str) -> str:
    """The same for a measured ratio."""
    return _predicate(measured_change(speedup), speedup.median, other, "shows no measurable difference to")


def _predicate(found: Change, speedup: float, other: str, neither: str = "takes as long as") -> str:
    if found == "gain":
        return f"is {speedup:.2f} × as fast as {other}"
    if found == "loss":
        return f"takes {100 * (1 / speedup - 1):.0f} % longer than {other}"
    return f"{neither} {other}"
