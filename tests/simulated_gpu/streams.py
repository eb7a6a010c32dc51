"""`torch.cuda.Stream` and `torch.cuda.Event` that only keep vector clocks: which kernels each knows to be over."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.simulated_gpu.gpu import active

CUDA = torch.device("cuda", 0)
_ids, _of_thread = itertools.count(1), threading.local()


class Stream:
    """A stream. Some outlive a simulation (a function's cache may hold one): what it knows is the active device's."""

    def __init__(
        self, device: Any = None, priority: int = 0, name: str | None = None, number: int | None = None
    ) -> None:
        self.stream_id = self.cuda_stream = next(_ids) if number is None else number
        self.device, self.priority, self.name = CUDA, priority, name or f"stream {self.stream_id}"

    @property
    def known(self) -> int:
        """Its number, which the active device knows by now."""
        gpu = active()
        gpu.names.setdefault(self.stream_id, self.name)
        gpu.clocks._ensure_stream_exists(self.stream_id)
        return self.stream_id

    def wait_event(self, event: Event) -> None:
        active().clocks.stream_wait_for_event(self.known, event.number)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        active().host_wait("stream.synchronize", self.known)

    def query(self) -> bool:
        """True: as if all had been over by chance, so that the host knows it from now on."""
        active().clocks.all_streams_wait_for_stream(self.known)
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return self.stream_id


class Event:
    """An event."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.number = next(_ids)

    def record(self, stream: Stream | None = None) -> None:
        active().clocks.record_state(self.number, (stream or current_stream()).known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        active().host_wait("event.synchronize")
        active().clocks.all_streams_wait_for_event(self.number)

    def query(self) -> bool:
        """As `Stream.query`."""
        active().clocks.all_streams_wait_for_event(self.number)
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


MAIN = Stream(name="the main stream", number=0)


def current_stream(device: Any = None) -> Stream:
    return getattr(_of_thread, "stream", MAIN)


def set_stream(stream: Stream | None) -> None:
    _of_thread.stream = stream or current_stream()


@contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """`torch.cuda.stream`."""
    before = current_stream()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:
    """`torch.cuda.synchronize`."""
    active().host_wait("torch.cuda.synchronize")
    active().clocks.sync_all_streams()
