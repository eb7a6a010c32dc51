"""What recorded spans say: the hidden share of communication and migration, and how to line them up.

Each rank's clock starts with its recording. So this file compares durations across ranks, never moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from scmoe_ds.trace.recorder import Phase, Span

Spans = Sequence[Span]
Hidden = Literal["communication", "migration"]
"""What computation can hide, by its lane."""
LANES = ("compute", "communication", "migration")
"""The lanes of a picture, the last only where experts migrate; waits belong to compute."""


@dataclass(frozen=True)
class HiddenShare:
    """How long all-to-alls were under way (communication_ms), and how long computation waited for them (exposed_ms).

    Or the same of experts that migrate.
    """

    communication_ms: float
    exposed_ms: float

    @property
    def share(self) -> float:
        """The part of the communication that ran beside computation, from 0 to 1; 1 without communication."""
        if self.communication_ms == 0:
            return 1.0
        return min(1.0, max(0.0, 1.0 - self.exposed_ms / self.communication_ms))


def hidden_share(spans: Spans, phase: Phase | None = None, of: Hidden = "communication") -> HiddenShare:
    """The hidden share of one rank, over all layers of the spans.

    Chunks in flight at the same time count once: the communication is as long as the union of its spans.

    Args:
        phase: None: both.
        of: the lane in question.
    """
    of_phase = [span for span in spans if phase in (None, span.phase)]
    waits = (span for span in of_phase if span.lane == "wait" and (span.kind == "migration") == (of == "migration"))
    return HiddenShare(_union_ms(span for span in of_phase if span.lane == of), exposed_ms=_union_ms(waits))


def hidden_share_of_ranks(
    spans_of_ranks: Sequence[Spans], phase: Phase | None = None, of: Hidden = "communication"
) -> HiddenShare:
    """Both times summed over all ranks. `share` is then the mean share, weighted by communication."""
    of_ranks = [hidden_share(spans, phase, of) for spans in spans_of_ranks]
    return HiddenShare(sum(one.communication_ms for one in of_ranks), sum(one.exposed_ms for one in of_ranks))


def _union_ms(spans: Iterable[Span]) -> float:
    length_ms, reached_ms = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start_ms):
        length_ms += max(0.0, span.end_ms - max(span.start_ms, reached_ms))
        reached_ms = max(reached_ms, span.end_ms)
    return length_ms


def gather_spans(spans: Spans, group: dist.ProcessGroup | None = None) -> list[list[Span]] | None:
    """Every rank's spans on the group's rank 0, in the order of ranks; None on the others.

    Collective: every rank of the group calls it. Without a process group it is a world of one.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [list(spans)]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(spans), group=group)  # gather_object is not there on every backend
    return gathered if dist.get_rank(group) == 0 else None


def lanes_of(spans: Spans) -> list[str]:
    """The lanes of a picture of these spans."""
    return [lane for lane in LANES if lane != "migration" or any(span.lane == lane for span in spans)]


def rows_of_lane(spans: Iterable[Span], lane: str) -> list[list[Span]]:
    """The spans of a lane, in as few rows as hold them without overlap. Waits belong to the compute lane."""
    of_lane = [span for span in spans if ("compute" if span.lane == "wait" else span.lane) == lane]
    rows: list[list[Span]] = []
    for span in sorted(of_lane, key=lambda span: (nanoseconds(span.start_ms), nanoseconds(span.end_ms))):
        free = next((row for row in rows if nanoseconds(row[-1].end_ms) <= nanoseconds(span.start_ms)), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def nanoseconds(time_ms: float) -> int:
    """Whole nanoseconds: in floating point one span could seem to start before the last one's end."""
    return round(time_ms * 1e6)


def check_spans(spans_of_ranks: Sequence[Spans]) -> None:
    """Raises ValueError if there are none, or one ends before it starts."""
    if not any(spans_of_ranks):
        raise ValueError("no spans: nothing was recorded on any rank")
    for rank, spans in enumerate(spans_of_ranks):
        if wrong := [span for span in spans if not 0 <= span.start_ms <= span.end_ms < math.inf]:
            raise ValueError(f"rank {rank}: 0 ≤ start_ms ≤ end_ms < inf does not hold for {wrong[0]}")
