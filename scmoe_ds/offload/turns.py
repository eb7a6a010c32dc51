"""Tasks of experts on workers, those of an expert one after another, and buffers for what they hand over."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

from scmoe_ds.offload.pages import page_tensor
from scmoe_ds.offload.readers import Arrival
from scmoe_ds.offload.room import Room
from scmoe_ds.offload.shape import ExpertShape
from scmoe_ds.offload.store import ExpertKey
from scmoe_ds.offload.workers import Arriving, Workers

WORKERS = 2


class Turns:
    """What the tasks of experts need; on a GPU each goes on behind the one before it, without the host.

    Args:
        keys: of all experts.
        shape: of every expert.
        dtype: of what is handed over.
        device: that computes.
        buffers: that may be on their way at once.
    """

    def __init__(
        self, keys: Sequence[ExpertKey], shape: ExpertShape, dtype: torch.dtype, device: torch.device, buffers: int
    ) -> None:
        self.keys, self.shape, self.dtype, self.device = list(keys), shape, dtype, device
        self._record = {key: number for number, key in enumerate(keys)}
        self._locks = {key: threading.Lock() for key in keys}
        self._ended: dict[ExpertKey, torch.cuda.Event] = {}
        self._buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(buffers):
            self._buffers.put((page_tensor(shape.elements, dtype, device), None))
        self._workers = Workers([Room(shape, dtype, device) for _ in range(WORKERS)], device)

    def gradient_buffer(self) -> Tensor:
        """A buffer for one expert's gradient or weights, on the current stream. Waits until one is free."""
        buffer, copied = self._buffers.get()
        self._behind(copied)
        return buffer

    def _so_far(self) -> torch.cuda.Event | None:
        """The end of what the current stream has been given; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _behind(self, event: torch.cuda.Event | None) -> None:
        """What the current stream is given from now on comes after an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _after_this(self) -> Arrival:
        """What the current stream has been given, for who writes where it reads."""
        arrival = Arriving(Future())
        arrival.future.set_result(self._so_far())
        return arrival

    @contextmanager
    def _turn(self, key: ExpertKey, room: Room) -> Iterator[int]:
        """One task after another of the same expert; gives the number of its record."""
        with self._locks[key]:
            self._behind(self._ended.get(key))
            try:
                yield self._record[key]
            finally:
                room.settle()
                if (ended := self._so_far()) is not None:
                    self._ended[key] = ended
