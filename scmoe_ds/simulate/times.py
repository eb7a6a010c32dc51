"""How long the parts of a step take: what `price.py` makes of work, and what `step.py` reads. Milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scmoe_ds.planner.times import OperatorTimes, PassTimes


@dataclass(frozen=True)
class PairTimes:
    """A pair on ranks that differ by their load only.

    Attributes:
        count: like pairs in a row.
        before: all operators before the tap together.
        by_class: for every class of ranks, in the order of `StepTimes.shares`. Dispatch and combine are those of the
            busiest link and the same for all; the experts differ.
        reduce_ms: of the pair's gradients over their groups, dense and experts' together; on a lane of their own beside
            the backward pass. With ZeRO-2 and 3 in every micro-batch, otherwise in the last of a step.
        gather_ms: of its parameters with ZeRO-3, before its forward pass and again before its backward pass.
        overlapped: whether the method runs communication beside computation.
        repeated: whether the backward pass first runs the forward pass again, its communication included, as with
            recomputation of whole pairs. The times here are without it.
    """

    count: int
    before: PassTimes
    by_class: tuple[OperatorTimes, ...]
    reduce_ms: float
    gather_ms: float
    overlapped: bool
    repeated: bool = False


@dataclass(frozen=True)
class StepTimes:
    """All parts of a step.

    Attributes:
        pairs: in forward order.
        shares: of all ranks that each class has; they sum to 1. A class for the busiest ranks is enough.
        first, last: embedding; head and loss.
        outside_reduce_ms, outside_gather_ms: as in `PairTimes`, of the parameters outside of pairs.
        optimizer_ms: the update of this rank's parameters.
        update_gather_ms: all-gather of updated parameters with ZeRO-1 and 2.
        slowed_by: factor on computation while a transfer runs beside it, ≥ 1.
        shared_link: whether all-to-alls and reductions go over the same link. False: expert parallelism stays inside
            the nodes, and the network bounds the others.
        in_flight: micro-batches on their way at once, as in `Method`.
        parts: milliseconds of a micro-batch by what bounds them ("compute", "memory", "launch", "link", "NIC"); for
            the sentence on what limits a step.
    """

    pairs: tuple[PairTimes, ...]
    shares: tuple[float, ...]
    first: PassTimes
    last: PassTimes
    outside_reduce_ms: float
    outside_gather_ms: float
    optimizer_ms: float
    update_gather_ms: float
    slowed_by: float = 1.0
    shared_link: bool = True
    in_flight: int = 1
    parts: Mapping[str, float] = field(default_factory=dict)
