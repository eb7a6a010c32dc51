"""Schedules: before which backbone operator the routed experts are computed. Plain data, no torch.

The place K of the expert computation is what the paper's adaptive strategy leaves to choose (section 3, eq. 11):
what stands before it hides the dispatch, what stands after it hides the combine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When a pair computes its routed experts.

    Attributes:
        expert_slot: the experts run before backbone operator number `expert_slot` (from 1); one past the last
            operator means after all of them.
        num_chunks: pieces that the routed tokens are cut into.
        overlap: False runs the same operators in the same order with blocking communication.
    """

    expert_slot: int
    num_chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.expert_slot < 1 or self.num_chunks != 1:
            raise ValueError(f"{self}: expert_slot counts from 1 and num_chunks is 1")


def slot_that_halves(costs: Sequence[float]) -> int:
    """The slot that splits the backbone's cost most evenly between dispatch and combine.

    A stand-in for eq. 11 while no times are known: dispatch and combine carry the same bytes, so each should
    get the same window. The earlier slot wins a tie, because the gradient's dispatch then has the longer window.

    Args:
        costs: cost of each backbone operator in forward order (FLOPs, or any other common unit).

    Returns:
        1 … len(costs) + 1.
    """
    total = sum(costs)
    imbalance = [abs(total - 2 * sum(costs[:slot])) for slot in range(len(costs) + 1)]
    return imbalance.index(min(imbalance)) + 1
