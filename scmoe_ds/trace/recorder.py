"""What happened when in a pair, forward and backward: the one measuring device of calibration and timeline.

A region of computation is enclosed by two marks, `open` on the tensors that enter it and `close` on those that leave.
Marks are identities whose backward takes the time too: the gradient passes `close` first and `open` last. A pair
without a recorder has `SILENT`, whose marks return their tensors untouched.

Times come from a monotonic clock on a CPU, from events of the current stream on a GPU; nothing is synchronised until
the spans are asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Phase = Literal["forward", "backward"]
Lane = Literal["compute", "communication", "wait"]
Wait = Callable[[], object]
Stamp = Any  # seconds on a CPU, an event on a GPU


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


class Watch(Protocol):
    """Observes the launches of one all-to-all, forward and backward."""

    def launch(self, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        """Calls `launch` and returns what waits for the exchange."""


class PairRecorder(Protocol):
    """What a pair reports to."""

    def open(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        """Marks the start of a region; returns the tensors that it is to work on, and not to change in place."""

    def close(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        """Marks the end of a region; returns its results."""

    def watch(self, name: str, chunk: int) -> Watch | None:
        """An observer for an all-to-all, or None."""


class _Silent:
    """The recorder of pairs that nobody measures."""

    def open(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        return tensors

    close = open

    def watch(self, name: str, chunk: int) -> None:
        return None

    def __reduce__(self) -> str:
        return "SILENT"  # a copy of a model has this very one


SILENT = _Silent()


@dataclass(frozen=True)
class Renamed:
    """Puts a word before all names: for what a pair does twice."""

    recorder: PairRecorder
    word: str

    def open(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        return self.recorder.open(f"{self.word} {name}", *tensors, chunk=chunk)

    def close(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        return self.recorder.close(f"{self.word} {name}", *tensors, chunk=chunk)

    def watch(self, name: str, chunk: int) -> Watch | None:
        return self.recorder.watch(f"{self.word} {name}", chunk)


class Recorder:
    """Collects the spans of any number of pairs, from now on.

    Args:
        device: where the pairs compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stamps: list[tuple[tuple[int, str, Lane, Phase, int], Stamp, Stamp]] = []
        self._open: dict[tuple[int, str, Phase, int], Stamp] = {}
        self._watching = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._origin = self.stamp()

    def pair(self, layer: int) -> PairRecorder:
        """The recorder to hand to the pair of MoE layer number `layer`."""
        return _LayerRecorder(self, layer)

    def spans(self) -> list[Span]:
        """All complete spans so far, by their start. Waits for the device; regions whose backward did not come (no
        gradient was wanted there) have a forward span only."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans = [Span(*key, self._milliseconds(start), self._milliseconds(end)) for key, start, end in self._stamps]
        return sorted(spans, key=lambda span: (span.start_ms, span.end_ms))

    def stamp(self) -> Stamp:
        """Now, on the current stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, stamp: Stamp) -> float:
        if self.device.type != "cuda":
            return 1e3 * (stamp - self._origin)
        return float(self._origin.elapsed_time(stamp))

    def start(self, layer: int, name: str, phase: Phase, chunk: int) -> None:
        """A computation begins."""
        self._open[layer, name, phase, chunk] = self.stamp()

    def end(self, layer: int, name: str, phase: Phase, chunk: int) -> None:
        """A computation is over."""
        start = self._open.pop((layer, name, phase, chunk), None)
        if start is not None:
            self.add((layer, name, "compute", phase, chunk), start, self.stamp())

    def add(self, key: tuple[int, str, Lane, Phase, int], start: Stamp, end: Stamp) -> None:
        """Notes a span."""
        self._stamps.append((key, start, end))

    def completion(self, wait: Wait, note: Callable[[Stamp], None]) -> Wait:
        """Has `note` called with the moment at which an exchange is complete; returns what waits for it.

        On a CPU a thread waits in the place of the caller, who waits for the thread. On a GPU a stream of its own
        waits beside the caller's.
        """
        if self._watching is not None:
            with torch.cuda.stream(self._watching):
                wait()
                note(self.stamp())
            return wait
        failures: list[BaseException] = []

        def watch() -> None:
            try:
                wait()
            except BaseException as error:
                failures.append(error)
            note(time.perf_counter())

        thread = threading.Thread(target=watch, name="watches an all-to-all", daemon=True)
        thread.start()

        def joined() -> None:
            thread.join()
            if failures:
                raise failures[0]

        return joined


class _LayerRecorder:
    def __init__(self, recorder: Recorder, layer: int) -> None:
        self._recorder, self._layer = recorder, layer

    def open(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        recorder, place = self._recorder, (self._layer, name)
        marked = _mark(tensors, lambda: recorder.end(*place, "backward", chunk))
        recorder.start(*place, "forward", chunk)
        return marked

    def close(self, name: str, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        recorder, place = self._recorder, (self._layer, name)
        recorder.end(*place, "forward", chunk)
        return _mark(tensors, lambda: recorder.start(*place, "backward", chunk))

    def watch(self, name: str, chunk: int) -> Watch:
        return _TransferWatch(self._recorder, self._layer, name, chunk)


@dataclass(frozen=True)
class _TransferWatch:
    recorder: Recorder
    layer: int
    name: str
    chunk: int

    def launch(self, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        recorder = self.recorder
        start = recorder.stamp()

        def note(end: Stamp) -> None:
            recorder.add((self.layer, self.name, "communication", phase, self.chunk), start, end)

        wait = recorder.completion(launch(), note)

        def watched() -> None:
            begun = recorder.stamp()
            wait()
            recorder.add((self.layer, self.name, "wait", phase, self.chunk), begun, recorder.stamp())

        return watched


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.note = note
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.note()
        return (None, *grads)


def _mark(tensors: tuple[Tensor | None, ...], note: Callable[[], None]) -> tuple[Any, ...]:
    if not torch.is_grad_enabled():
        return tensors
    return _Mark.apply(note, *tensors)
