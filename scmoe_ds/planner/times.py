"""How long each part of a pair takes: what calibration measures, what the planner reads, and what is kept as JSON.

All times are milliseconds of one micro-batch, of the slowest rank.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scmoe_ds.config.limits import MOST_CHUNKS

MOST_MS = 1e9
"""Of one operator, eleven days: no such time was ever measured, and sums of them stay finite."""
MOST_OPERATORS = 1024

Milliseconds = Annotated[float, Field(ge=0, le=MOST_MS, allow_inf_nan=False, strict=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PassTimes(_Frozen):
    """One operator, forward and backward."""

    forward_ms: Milliseconds
    backward_ms: Milliseconds = 0.0


class OperatorTime(PassTimes):
    """An operator of the backbone: "attention", "mlp", "shared" and the like."""

    name: Annotated[str, Field(max_length=100)]


class ChunkTimes(_Frozen):
    """One chunk of several: its all-to-alls without anything beside them, and its expert computation.

    The backward time of the dispatch is that of its gradient, which travels the other way after the experts'
    backward; that of the combine likewise.
    """

    dispatch: PassTimes
    experts: PassTimes
    combine: PassTimes


class OperatorTimes(_Frozen):
    """All parts of a pair from the shortcut to the join.

    Attributes:
        gate: the shortcut's norm and the gate.
        encode: permutation into the order of sending, and the exchange of row counts, which nothing hides.
        decode: permutation back, weighting and merge; for DGMoE its second MoE.
        backbone: the operators between shortcut and join, in forward order; may be empty.
        chunks: for every number of chunks that was measured, the times of one of them. 1 is always there.
    """

    gate: PassTimes
    encode: PassTimes
    decode: PassTimes
    backbone: Annotated[tuple[OperatorTime, ...], Field(max_length=MOST_OPERATORS)]
    chunks: dict[Annotated[int, Field(ge=1, le=MOST_CHUNKS)], ChunkTimes]

    @model_validator(mode="after")
    def _unchunked_is_there(self) -> OperatorTimes:
        if 1 not in self.chunks:
            raise ValueError("chunks: the times of a single chunk (1) are missing")
        return self
