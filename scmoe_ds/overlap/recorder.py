"""What happened when in a pair, forward and backward: the one measuring device of calibration and timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward"]
Lane = Literal["compute", "communication", "wait"]


@dataclass(frozen=True)
class Span:
    """One measured interval on one rank.

    Attributes:
        layer: MoE layer (pair), from 0.
        name: "gate", "encode", "experts", "decode"; a backbone operator; "dispatch" or "combine".
        lane: "compute"; "communication" from the launch of an all-to-all to its completion; "wait" is the time that
            the compute lane stood still for an all-to-all of that name.
        phase: forward or backward.
        chunk: from 0; 0 for what is not cut into chunks.
        start_ms, end_ms: since the start of the recording.
    """

    layer: int
    name: str
    lane: Lane
    phase: Phase
    chunk: int
    start_ms: float
    end_ms: float

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.start_ms
