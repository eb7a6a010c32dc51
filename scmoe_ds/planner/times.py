"""How long each part of a pair takes. The calibration measures it, the planner reads it, files keep it as JSON.

All times are milliseconds of one micro-batch, of the slowest rank.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from scmoe_ds.config.limits import MOST_CHUNKS

MOST_MS = 1e9
"""For one operator: eleven days. Nobody has measured such a time, and sums of such times stay finite."""
MOST_OPERATORS = 1024
SHARED = ("shared", "shared in", "shared out")
"""The shared expert, or its halves."""
KINDS = ("attention", "mlp", "norm", *SHARED)
"""Operators of this package's own models; a replaced layer has modules of any name."""

Milliseconds = Annotated[float, Field(ge=0, le=MOST_MS, allow_inf_nan=False, strict=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PassTimes(_Frozen):
    """One operator, forward and backward."""

    forward_ms: Milliseconds
    backward_ms: Milliseconds = 0.0


class OperatorTime(PassTimes):
    """An operator of the backbone. `name` is its label, such as "attention 2"; files have nothing else of it."""

    name: Annotated[str, Field(max_length=100)]

    @property
    def kind(self) -> str:
        """As of `overlap.executor.Operator`: "attention" for "attention 2"."""
        return kind_of(self.name)


def kind_of(label: str) -> str:
    """The kind of the operator that files call `label`."""
    kind, _, number = label.rpartition(" ")
    return kind if number.isdecimal() else label


def next_label(label: str) -> str:
    """An operator of the next pair, beside which a late combine goes on: "next attention"."""
    return f"next {label.replace(' before tap', '')}"


class ChunkTimes(_Frozen):
    """One chunk of several: its all-to-alls with nothing beside them, and its expert computation.

    The backward time of an all-to-all is the time of its gradient, which travels the other way.
    """

    dispatch: PassTimes
    experts: PassTimes
    combine: PassTimes


class LateWindow(NamedTuple):
    """Beside what a pair's combine goes on when the pair itself is over.

    Attributes:
        operators: labels of those operators of this pair that are like the next pair's before the late join.
        after_dispatch: whether the next pair's tap is before them, so that its dispatch is on the way, too.
    """

    operators: tuple[str, ...]
    after_dispatch: bool

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {"operators": list(self.operators), "after_dispatch": self.after_dispatch}


class LateTimes(_Frozen):
    """What the combine of a pair with a late join also goes on beside; see `LateWindow`.

    Attributes:
        operators: of the next pair, up to the join.
        after_dispatch: whether the next pair's dispatch leaves before them, behind this pair's combine.
    """

    operators: Annotated[tuple[OperatorTime, ...], Field(min_length=1, max_length=MOST_OPERATORS)]
    after_dispatch: Annotated[bool, Field(strict=True)]


class OperatorTimes(_Frozen):
    """All parts of a pair from the shortcut to the join.

    Attributes:
        gate: the shortcut's norm and the gate.
        encode: permutation into the order of sending, and the exchange of row counts. Nothing hides them.
        decode: permutation back, weighting and merge; for DGMoE its second MoE.
        backbone: the operators between shortcut and join, in forward order; may be empty.
        chunks: by number of chunks, the times of one of these chunks. 1 is always there.
        late: of a pair whose routed output joins late; None: it joins at the end of the backbone.
    """

    gate: PassTimes
    encode: PassTimes
    decode: PassTimes
    backbone: Annotated[tuple[OperatorTime, ...], Field(max_length=MOST_OPERATORS)]
    chunks: dict[Annotated[int, Field(ge=1, le=MOST_CHUNKS)], ChunkTimes]
    late: LateTimes | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, dump: Any) -> dict[str, Any]:
        """Files of pairs that join at the end stay as they were."""
        return {name: value for name, value in dump(self).items() if name != "late" or value is not None}

    @property
    def is_periodic(self) -> bool:
        """Whether two MoEs are on the way at a time: the next pair's dispatch leaves before this pair's join."""
        return self.late is not None and self.late.after_dispatch

    @model_validator(mode="after")
    def _unchunked_is_there(self) -> OperatorTimes:
        if 1 not in self.chunks:
            raise ValueError("chunks: the times of a single chunk (1) are missing")
        if self.late is not None and self.is_periodic and len(self.late.operators) > len(self.backbone):
            raise ValueError("late: operators of the next pair that the backbone does not have")
        return self
