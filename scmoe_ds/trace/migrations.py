"""What a recorder is told of experts that migrate to the device: what each reader moves when, and who waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from scmoe_ds.trace.recorder import Key, Lane, Migration, Recorder


class MigrationWatch:
    """Observes one expert's way to the device, from now on.

    Args:
        recorder: gets the spans.
        layer: MoE layer (pair), from 0.
        expert: of this rank, from 0.
        tier: where it comes from.
    """

    def __init__(self, recorder: Recorder, layer: int, expert: int, tier: Literal["host", "disk"]) -> None:
        self._recorder, self._layer, self._expert, self._tier = recorder, layer, expert, tier
        self._queued_ms = recorder.milliseconds(time.perf_counter())

    @contextmanager
    def moves(self, kind: Literal["read", "copy"], reader: int, nbytes: int) -> Iterator[None]:
        """Around a part of the way. A file is read by the host and timed by its clock, a copy on the current stream."""
        stamp = time.perf_counter if kind == "read" else self._recorder.stamp
        start = stamp()
        yield
        migration = Migration(self._expert, nbytes, self._tier, reader, self._queued_ms)
        self._recorder.add(self._key(kind, "migration"), start, stamp(), migration)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Around a wait of the current stream for the expert."""
        start = self._recorder.stamp()
        yield
        self._recorder.add(self._key("migration", "wait"), start, self._recorder.stamp())

    def _key(self, kind: str, lane: Lane) -> Key:
        return self._layer, f"expert {self._expert}", kind, lane, "forward", 0


def noted(
    watch: MigrationWatch | None, kind: Literal["read", "copy"], reader: int, nbytes: int
) -> AbstractContextManager[None]:
    """`moves` of a watch, if there is one."""
    return nullcontext() if watch is None else watch.moves(kind, reader, nbytes)
