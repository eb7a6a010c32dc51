"""What happened when in a pair, forward and backward. Calibration and timeline both measure with it.

Two marks enclose a region of computation: `open` on the tensors that enter it, `close` on those that leave. A mark is
an identity whose backward takes the time, too. The gradient passes `close` first and `open` last. A pair that nobody
measures has `SILENT`, whose marks return their tensors untouched.

On a CPU times come from a monotonic clock, on a GPU from events of the current stream. Nothing is synchronised until
somebody asks for the spans.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Union

import torch
from torch import Tensor

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "backward")
Lane = Literal["compute", "communication", "wait", "migration"]
Wait = Callable[[], object]
Stamp = Any  # seconds of the host's clock, or an event of a GPU
Key = tuple[int, str, str, Lane, Phase, int]  # the fields of a span before its times


@dataclass(frozen=True)
class Migration:
    """What a span of the lane "migration" moves.

    Attributes:
        expert: of this rank, from 0.
        nbytes: of it, or of a part.
        tier: where it comes from.
        reader: that moves it, from 0.
        queued_ms: when it was asked for, since the start of the recording.
    """

    expert: int
    nbytes: int
    tier: Literal["host", "disk"]
    reader: int
    queued_ms: float


@dataclass(frozen=True)
class Span:
    """One measured interval on one rank.

    Attributes:
        layer: MoE layer (pair), from 0.
        name: tells it from all others of its layer, for people: "gate", "experts", "dispatch", "attention 2".
        kind: what it is one of: "attention" for "attention 2", "gate" for the "current gate" of DGMoE.
        lane: "compute"; "communication" from the launch of an all-to-all to its completion; "migration" of an expert;
            "wait" is the time that the compute lane stood still for one of that name.
        phase: forward or backward.
        chunk: from 0; 0 for what is not cut into chunks.
        start_ms, end_ms: since the start of the recording.
        migration: of the lane "migration" only.
    """

    layer: int
    name: str
    kind: str
    lane: Lane
    phase: Phase
    chunk: int
    start_ms: float
    end_ms: float
    migration: Migration | None = None

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.start_ms


class Named(Protocol):
    """What has a label of its own, and is one of a kind: an operator of a pair."""

    @property
    def label(self) -> str:
        """The `name` of its spans."""

    @property
    def kind(self) -> str:
        """Their `kind`."""


What = Union[str, Named]


class Watch(Protocol):
    """Observes the launches of one all-to-all, forward and backward."""

    def launch(self, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        """Calls `launch` and returns what waits for the exchange."""


class PairRecorder(Protocol):
    """What a pair reports to."""

    def open(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        """Marks the start of a region; returns the tensors that it works on and must not change in place.

        Args:
            what: an operator, or the name of a stage of the MoE layer.
            chunk: as in `Span`.
        """

    def close(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        """Marks the end of a region; returns its results."""

    def watch(self, name: str, chunk: int) -> Watch | None:
        """An observer for an all-to-all, or None."""

    def renamed(self, word: str) -> PairRecorder:
        """Puts a word before the names of all spans: for what a pair does twice."""


class _Silent:
    """The recorder of pairs that nobody measures."""

    def open(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        return tensors

    close = open

    def watch(self, name: str, chunk: int) -> None:
        return None

    def renamed(self, word: str) -> PairRecorder:
        return self

    def __reduce__(self) -> str:
        return "SILENT"  # a copy of a model has this very one


SILENT = _Silent()


class Recorder:
    """Collects the spans of any number of pairs, from now on.

    Args:
        device: where the pairs compute.
        regions: False: only all-to-alls and waits for them. Then nothing is added to autograd's graph.
    """

    def __init__(self, device: torch.device, regions: bool = True) -> None:
        self.device, self.regions = device, regions
        self._stamps: list[tuple[Key, Stamp, Stamp, Migration | None]] = []
        self._open: dict[Key, Stamp] = {}
        self._watching = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._origin = self.stamp()
        self._origin_s = time.perf_counter() if device.type == "cuda" else self._origin

    def pair(self, layer: int) -> PairRecorder:
        """The recorder to hand to the pair of MoE layer number `layer`."""
        return _LayerRecorder(self, layer)

    def spans(self) -> list[Span]:
        """All complete spans so far, by their start. Waits for the device.

        A region without a backward pass (it needs no gradient) has a forward span only.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans = [
            Span(*key, self.milliseconds(start), self.milliseconds(end), migration)
            for key, start, end, migration in self._stamps
        ]
        return sorted(spans, key=lambda span: (span.start_ms, span.end_ms))

    def stamp(self) -> Stamp:
        """Now, on the current stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, stamp: Stamp) -> float:
        """Since the start of the recording. A time of the host's clock counts from there too, whatever the device."""
        if isinstance(stamp, float):
            return 1e3 * (stamp - self._origin_s)
        return float(self._origin.elapsed_time(stamp))

    def start(self, key: Key) -> None:
        """A computation begins."""
        self._open[key] = self.stamp()

    def end(self, key: Key) -> None:
        """A computation is over."""
        start = self._open.pop(key, None)
        if start is not None:
            self.add(key, start, self.stamp())

    def add(self, key: Key, start: Stamp, end: Stamp, migration: Migration | None = None) -> None:
        """Notes a span; the key has all fields of `Span` before its times."""
        self._stamps.append((key, start, end, migration))

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


@dataclass(frozen=True)
class _LayerRecorder:
    recorder: Recorder
    layer: int
    prefix: str = ""

    def open(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        if not self.recorder.regions:
            return tensors
        forward, backward = (self._key(what, "compute", phase, chunk) for phase in PHASES)
        marked = _mark(tensors, lambda: self.recorder.end(backward))
        self.recorder.start(forward)
        return marked

    def close(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        if not self.recorder.regions:
            return tensors
        forward, backward = (self._key(what, "compute", phase, chunk) for phase in PHASES)
        self.recorder.end(forward)
        return _mark(tensors, lambda: self.recorder.start(backward))

    def watch(self, name: str, chunk: int) -> Watch:
        return _TransferWatch(self.recorder, lambda lane, phase: self._key(name, lane, phase, chunk))

    def renamed(self, word: str) -> PairRecorder:
        return _LayerRecorder(self.recorder, self.layer, f"{word} ")

    def _key(self, what: What, lane: Lane, phase: Phase, chunk: int) -> Key:
        label, kind = (what, what) if isinstance(what, str) else (what.label, what.kind)
        return self.layer, self.prefix + label, kind, lane, phase, chunk


@dataclass(frozen=True)
class _TransferWatch:
    recorder: Recorder
    key: Callable[[Lane, Phase], Key]

    def launch(self, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        recorder, start = self.recorder, self.recorder.stamp()
        wait = recorder.completion(launch(), lambda end: recorder.add(self.key("communication", phase), start, end))

        def watched() -> None:
            begun = recorder.stamp()
            wait()
            recorder.add(self.key("wait", phase), begun, recorder.stamp())

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
    return _Mark.apply(note, *tensors) if torch.is_grad_enabled() else tensors
