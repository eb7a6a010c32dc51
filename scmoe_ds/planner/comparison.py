"""With overlap or without: micro-batches of both kinds take turns, and the faster kind is kept.

A plan rests on times that were taken without overlap. What transfers cost the computation beside them, processor time
or multiprocessors, shows only in a whole micro-batch. Its time is the one between its first and its last exchange,
forward and backward. Data, optimizer, validation and checkpoints are no part of it.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from scmoe_ds.planner.rounds import Spread, over_ranks
from scmoe_ds.planner.speed_text import compared_as_measured, measured_change
from scmoe_ds.trace.recorder import Recorder

_TURNS = (True, False, False, True, False, True, True, False)
"""With overlap, or without. Where gradients are accumulated over two or four micro-batches, both kinds have as many
first and as many last ones."""


class Measured(BaseModel):
    """Whether overlap is kept, and why.

    Attributes:
        overlap: False: a micro-batch is faster without.
        speedup: time without overlap over time with it.
        text: the comparison in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap: bool
    speedup: float = Field(gt=0, allow_inf_nan=False)
    text: str = Field(max_length=200)


class Comparison:
    """Whose turn it is, and what was measured.

    Args:
        device: where the pairs compute.
    """

    def __init__(self, device: torch.device) -> None:
        warm_up = (True, False) * (2 if device.type == "cuda" else 1)  # not timed: allocations, connections
        self.device, self._left = device, [*warm_up, *_TURNS]
        self._recorders: list[tuple[bool, Recorder]] = []

    @property
    def is_over(self) -> bool:
        """Whether every micro-batch has begun, so that `result` is due before the next one."""
        return not self._left

    @property
    def overlapped(self) -> Recorder | None:
        """What the last micro-batch reported to; None if it ran without overlap."""
        overlap, recorder = self._recorders[-1] if self._recorders else (False, None)
        return recorder if overlap else None

    def begin(self) -> tuple[bool, Recorder]:
        """Whether the next micro-batch overlaps, and what its pairs report to."""
        overlap, recorder = self._left.pop(0), Recorder(self.device, regions=False)
        self._recorders.append((overlap, recorder))
        return overlap, recorder

    def result(self) -> Measured:
        """The same on every rank; a micro-batch has the time of the slowest rank. Collective.

        Overlap goes only where it lost in every round: the times are few, and other users' work is in them.
        """
        timed = self._recorders[-len(_TURNS) :]
        milliseconds = over_ranks([_duration_ms(recorder) for _, recorder in timed])
        by_kind: dict[bool, list[float]] = {True: [], False: []}
        for (overlap, _), each in zip(timed, milliseconds, strict=True):
            by_kind[overlap].append(each)
        if not all(milliseconds):  # nothing was exchanged
            return Measured(overlap=True, speedup=1.0, text="nothing was exchanged")
        speedup = Spread.of_ratios(by_kind[False], by_kind[True])
        overlap = measured_change(speedup) != "loss"
        text = f"a micro-batch {compared_as_measured(speedup, 'one without overlap')}"
        return Measured(overlap=overlap, speedup=speedup.median, text=text)


def _duration_ms(recorder: Recorder) -> float:
    spans = recorder.spans()
    return max(span.end_ms for span in spans) - min(span.start_ms for span in spans) if spans else 0.0
