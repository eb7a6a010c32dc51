"""A trace of torch's profiler, read for three questions: what was launched by which part, where did the host wait, and
how much of the copies ran beside kernels.

On a CPU there are no kernels. A rehearsal counts operators instead, and those that would make the host wait.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Interval = tuple[float, float]
STEP = "measured step"
OUTSIDE = "between the parts"

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "hipLaunchKernel")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize")
_BLOCKING_COPY = "cudaMemcpy"  # exactly; cudaMemcpyAsync returns at once, or a synchronisation follows it
_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
_NO_KERNEL = ("view", "empty", "as_strided", "detach", "expand", "transpose", "select", "slice", "alias", "unsqueeze")


@dataclass(frozen=True)
class Event:
    """One entry of a trace; times in microseconds."""

    kind: str
    name: str
    start: float
    end: float
    thread: Any
    arguments: dict[str, Any]


@contextmanager
def profiled(path: Path, device: torch.device) -> Iterator[None]:
    """Profiles the block and writes its trace. Set `STEP` around what counts."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


@contextmanager
def measured_step(name: str = STEP) -> Iterator[None]:
    """Marks what counts. The device is at rest before and after, so that no wait falls across the border."""
    with record_function(name):
        yield


class ChromeTrace:
    """The events of a trace file."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.start)
        self.on_gpu = any(event.kind in ("kernel", "gpu_memcpy") for event in events)

    @classmethod
    def read(cls, path: Path) -> ChromeTrace:
        """A file that the profiler has written."""
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        entries = json.loads(text)["traceEvents"]
        return cls(
            [
                Event(
                    each.get("cat", ""),
                    each["name"],
                    float(each["ts"]),
                    float(each["ts"]) + float(each.get("dur", 0)),
                    each.get("tid"),
                    each.get("args", {}),
                )
                for each in entries
                if each.get("ph") == "X"
            ]
        )

    def ranges(self, name: str | None = None) -> list[Event]:
        """The host's ranges of `record_function`: of one name, or all."""
        return [each for each in self.events if each.kind == "user_annotation" and name in (None, each.name)]

    def launches(self, within: str = STEP) -> Counter[str]:
        """Launches by part: the innermost range around the launch, on its own thread.

        All kernels of one operator of torch are one launch, as in the budgets: a sort has several.
        """
        operators = [each for each in self.events if each.kind == "cpu_op" and each.name.startswith("aten::")]
        by_operator: dict[int, Event] = {}
        for launch in self._inside(self._launches(), within):
            around = [each for each in operators if _encloses(each, launch)]
            by_operator.setdefault(id(around[-1] if around else launch), launch)
        return Counter(self._part(launch, within) for launch in by_operator.values())

    def host_waits(self, within: str = STEP) -> Counter[str]:
        """By name, how often the host waited for the device."""
        return Counter(each.name for each in self._inside(self.events, within) if self._waits(each))

    def beside_kernels(self, copies: Sequence[Event] | None = None) -> float | None:
        """The share of the copies' time during which a kernel runs; None without copies.

        Args:
            copies: default: those between host and device.
        """
        copies = self.host_copies() if copies is None else copies
        copying = _union((each.start, each.end) for each in copies)
        own = set(map(id, copies))  # NCCL's transfers are kernels themselves
        computing = _union((each.start, each.end) for each in self.kernels() if id(each) not in own)
        total = sum(end - start for start, end in copying)
        return _common(copying, computing) / total if total else None

    def host_copies(self) -> list[Event]:
        """Copies from the device to the host and back."""
        found = [each for each in self.events if each.kind == "gpu_memcpy"]
        return [each for each in found if "DtoH" in each.name or "HtoD" in each.name]

    def kernels(self, word: str = "", within: str | None = None) -> list[Event]:
        """Kernels by their start.

        Args:
            word: part of their names, in any case.
            within: those that were launched in a range of that name.
        """
        found = [each for each in self.events if each.kind == "kernel" and word.lower() in each.name.lower()]
        if within is None:
            return found
        launched = self._launched(within)
        return [each for each in found if each.arguments.get("correlation") in launched]

    def parts(self, within: str = STEP) -> dict[str, Interval]:
        """For each part, when its first kernel starts and its last one ends; NCCL's kernels are left out."""
        launched, found = self._launched(within), dict[str, Interval]()
        for kernel in self.kernels(within=within):
            part = self._part(launched[kernel.arguments["correlation"]], within)
            if "nccl" not in kernel.name.lower():
                start, end = found.get(part, (kernel.start, kernel.end))
                found[part] = (min(start, kernel.start), max(end, kernel.end))
        return found

    def _launched(self, within: str) -> dict[Any, Event]:
        """The launches in ranges of a name, by the number that they share with their kernels."""
        return {each.arguments.get("correlation"): each for each in self._inside(self._launches(), within)}

    def _inside(self, events: Sequence[Event], within: str) -> list[Event]:
        borders = self.ranges(within)
        return [each for each in events if any(border.start <= each.start <= border.end for border in borders)]

    def _launches(self) -> list[Event]:
        if self.on_gpu:
            return [
                each
                for each in self.events
                if each.kind in ("cuda_runtime", "cuda_driver") and each.name.startswith(_LAUNCHES)
            ]
        operators = [each for each in self.events if each.kind == "cpu_op"]
        starts = [each.start for each in operators]

        def has_children(each: Event) -> bool:
            following = operators[bisect.bisect_right(starts, each.start) :][:1]
            return any(other.thread == each.thread and other.end <= each.end for other in following)

        computing = [each for each in operators if not any(word in each.name for word in _NO_KERNEL)]
        return [each for each in computing if each.name.startswith("aten::") and not has_children(each)]

    def _part(self, launch: Event, within: str) -> str:
        around = [each for each in self.ranges() if each.name != within and _encloses(each, launch)]
        return around[-1].name if around else OUTSIDE  # sorted by start: the last one is the innermost

    def _waits(self, event: Event) -> bool:
        if self.on_gpu:
            return event.kind in ("cuda_runtime", "cuda_driver") and (
                event.name in _WAITS or event.name == _BLOCKING_COPY
            )
        return event.kind == "cpu_op" and event.name in _HOST_READS


def _encloses(outer: Event, inner: Event) -> bool:
    return outer.thread == inner.thread and outer.start <= inner.start <= outer.end


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """How long both last at once; each without overlaps in itself and sorted."""
    total, index = 0.0, 0
    for start, end in first:
        while index < len(second) and second[index][1] <= start:
            index += 1
        for other_start, other_end in second[index:]:
            if other_start >= end:
                break
            total += min(end, other_end) - max(start, other_start)
    return total
