"""What the run's log says of communication: the schedules, and how much was hidden.

The hidden share is measured in the last micro-batch before a log line.
"""

from __future__ import annotations

from typing import Any

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.process import device
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.plan_text import schedule_text, span_text
from scmoe_ds.planner.schedule_text import labels_of
from scmoe_ds.planner.simulation import predicted_spans
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.trace.spans import HiddenShare, hidden_share


class CommunicationSample:
    """Watches the all-to-alls of single micro-batches: a thread or a stream notes when each is complete.

    Nothing is watched while the schedules are still being chosen, and nothing is there to watch in DeepSpeed's own
    layers or when one rank holds all experts. Gradients' all-reduces are no part of it.

    Args:
        engine: of `scmoe_ds.initialize`.

    Attributes:
        exists: whether the model's pairs exchange tokens at all.
    """

    def __init__(self, engine: Any) -> None:
        self.overlap = engine.overlap
        self.exists = any(pair.layer.transport.size > 1 for pair in self.overlap.pairs)
        self._begun = False
        self._recorder: Recorder | None = None
        self._measured: HiddenShare | None = None

    def begin(self) -> None:
        """Watches the micro-batch that follows. A comparison with and without overlap watches it anyway."""
        self._begun = self.exists and not self.overlap.calibrating
        if self._begun and self.overlap.comparison is None:
            self._recorder = Recorder(device(), regions=False)
            self.overlap.record(self._recorder)

    def end(self) -> None:
        """The micro-batch is over. On a GPU the host waits for it."""
        if not self._begun:
            return
        recorder, self._begun = self._recorder, False
        if recorder is not None:
            self._recorder = None
            self.overlap.record(None)
        elif self.overlap.comparison is not None:
            recorder = self.overlap.comparison.overlapped
        if recorder is not None:
            self._measured = hidden_share(recorder.spans())

    def take(self) -> HiddenShare | None:
        """What was measured on this rank since the last call; None: nothing, on any rank."""
        measured, self._measured = self._measured, None
        return measured


def schedule_entries(overlap: Calibrator) -> list[dict[str, Any]]:
    """For each distinct schedule the "layers" that have it, its "text", "operators", "slot" of every chunk, number of
    "chunks" and "overlap", and the comparison with and without overlap as "measured" (None: not over). With measured
    times also what they predict: "hidden" share, "exposed_ms", "total_ms" and from where to where that is ("span"), and
    the "timeline", a list of `PredictedSpan`s."""
    entries = []
    scheduled = [(each, pair.late_window) for each, pair in zip(overlap.schedules, overlap.pairs, strict=True)]
    for schedule, late in dict.fromkeys(scheduled):
        layers = [layer for layer, each in enumerate(scheduled) if each == (schedule, late)]
        entry: dict[str, Any] = {
            "layers": layers,
            "text": schedule_text(schedule),
            "operators": labels_of(overlap.pairs[layers[0]]),
            "slot": list(schedule.slots),
            "chunks": schedule.num_chunks,
            "overlap": schedule.overlap,
            "measured": None if overlap.measured is None else overlap.measured.model_dump(),
        }
        for kind in overlap.kinds:
            if layers[0] in kind.layers and "train" in kind.plans and schedule == kind.plans["train"].schedule:
                predicted = kind.plans["train"].predicted
                entry |= {
                    "hidden": predicted.hidden_share,
                    "exposed_ms": predicted.exposed_ms,
                    "total_ms": predicted.total_ms,
                    "span": kind.times and span_text(kind.times),
                    "timeline": _timeline(kind.times, kind.plans["train"].schedule),
                }
        entries.append(entry)
    return entries


def _timeline(times: OperatorTimes | None, schedule: Schedule) -> list[dict[str, Any]]:
    spans = [] if times is None else predicted_spans(times, schedule, "train")
    return [
        {"phase": phase, "lane": lane, "name": name, "start_ms": round(start_ms, 3), "end_ms": round(end_ms, 3)}
        for phase, lane, name, start_ms, end_ms in spans
    ]
