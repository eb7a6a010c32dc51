"""From recorded passes to the times of a pair's parts, the same on every rank.

Every rank has timed its own part, without overlap. The slowest rank's medians count for all. An all-to-all has the time
of the rank that came last to it, because the others' times also hold their waiting for that rank.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from scmoe_ds.planner.times import ChunkTimes, LateTimes, LateWindow, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.trace.recorder import PHASES, Recorder, Span

_CUT = ("dispatch", "experts", "combine")
_CURRENT = [f"current {name}" for name in ("gate", "encode", "counts", *_CUT, "decode")]
"""The second half of DGMoE. It runs at the join, where nothing is left to hide its communication."""
_TRANSFERS = {"counts", "dispatch", "combine", "current counts", "current dispatch", "current combine"}
_PARTS = {
    "gate": ("shortcut norm", "gate"),
    "encode": ("encode", "counts"),
    "decode": ("decode", "merge", *_CURRENT),
}
"""Parts of OperatorTimes and the spans that they are made of."""

Key = tuple[int, str, str]  # number of chunks (1 for what is not cut), name of the spans, phase


@dataclass(frozen=True)
class Recording:
    """The spans of one pass that ran without overlap, in this number of chunks."""

    chunks: int
    spans: Sequence[Span]


class TimedPasses:
    """Which of the first passes are timed, and in how many chunks.

    Args:
        counts: the numbers of chunks in question.
        passes: the least number of timed ones.
        device: where the pairs compute. A GPU's first passes allocate and compile for every number of chunks, and
            single times vary more there: each number gets 2 passes to warm up and at least 3 timed ones.
    """

    def __init__(self, counts: Sequence[int], passes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.counts, self.device = counts, device
        self.warm_up = 2 * len(counts) if on_gpu else 1
        self.timed = max(passes, (3 if on_gpu else 1) * len(counts))
        self._begun = 0
        self._recorders: list[tuple[int, Recorder]] = []

    @property
    def text(self) -> str:
        """The timed ones in words."""
        return f"micro-batches {self.warm_up + 1} to {self.warm_up + self.timed}"

    @property
    def is_over(self) -> bool:
        """Whether the next pass is none of them."""
        return self._begun == self.warm_up + self.timed

    def begin(self) -> tuple[int, Recorder | None]:
        """The number of chunks of the next pass, and what it reports to; None: it warms up."""
        number = self._begun - self.warm_up
        self._begun += 1
        chunks = self.counts[number % len(self.counts)] if number >= 0 or self.warm_up > 1 else 1
        if number < 0:
            return chunks, None
        self._recorders.append((chunks, Recorder(self.device)))
        return self._recorders[-1]

    def recordings(self) -> list[Recording]:
        """Of all timed passes. The last one is over."""
        return [Recording(chunks, recorder.spans()) for chunks, recorder in self._recorders]


def measure(
    recordings: Sequence[Recording],
    layers: Sequence[int],
    backbone: Sequence[str],
    group: dist.ProcessGroup | None,
    device: torch.device,
    late: LateWindow | None = None,
) -> OperatorTimes:
    """The times of one kind of pair. Collective over the world; every rank has recorded the same passes.

    Args:
        recordings: passes in 1 and any other numbers of chunks.
        layers: the MoE layers of this kind.
        backbone: labels of its operators, in order.
        group: the ranks between which its rows travel.
        device: where tensors for the exchange between ranks live.
        late: beside what the combine goes on, with a late join.
    """
    counts = sorted({recording.chunks for recording in recordings})
    beside = () if late is None else late.operators
    names = list(dict.fromkeys([*_CUT, *itertools.chain(*_PARTS.values()), *backbone, *beside]))
    samples: defaultdict[Key, list[float]] = defaultdict(list)
    transfers: dict[Key, list[float]] = {}
    for recording in recordings:
        durations: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        for span in recording.spans:
            if span.lane != "wait":
                durations[span.name, span.phase, span.layer].append(span.duration_ms)
        for name, phase, layer in itertools.product(names, PHASES, layers):
            found = durations[name, phase, layer]
            pieces = recording.chunks if name in _CUT else 1  # the rest takes the same time in any number of chunks
            if name in _TRANSFERS:
                # As many numbers on every rank, whatever it has seen: they are compared one by one.
                numbers = (found + [math.inf] * pieces)[:pieces]
                transfers.setdefault((pieces, name, phase), []).extend(numbers)
            elif found:
                samples[pieces, name, phase].append(sum(found))
    _take_the_last_rank(transfers, group, device)
    for key, times in transfers.items():
        together = [sum(chunks) for chunks in _in_groups(times, key[0])]
        samples[key] = [milliseconds for milliseconds in together if math.isfinite(milliseconds)]
    keys = list(itertools.product(counts, names, PHASES))
    # The lower of two middle ones: noise adds to a time, it never takes away.
    medians = torch.tensor([statistics.median_low(samples[key] or [0.0]) for key in keys], dtype=torch.float64)
    medians = medians.to(device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return times_from(dict(zip(keys, medians.tolist(), strict=True)), backbone, counts, late)


def _take_the_last_rank(
    transfers: dict[Key, list[float]], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    flat = torch.tensor(list(itertools.chain(*transfers.values())), dtype=torch.float64, device=device)
    dist.all_reduce(flat, op=dist.ReduceOp.MIN, group=group)
    numbers = iter(flat.tolist())
    for key, times in transfers.items():
        transfers[key] = list(itertools.islice(numbers, len(times)))


def _in_groups(times: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    return (times[first : first + size] for first in range(0, len(times), size))


def times_from(
    known: Mapping[Key, float], backbone: Sequence[str], chunk_counts: Sequence[int], late: LateWindow | None = None
) -> OperatorTimes:
    """Sorts measured totals into an `OperatorTimes`.

    Args:
        known: milliseconds by (number of chunks, name of a span, phase), chunks added up.
        backbone: labels of its operators, in order.
        chunk_counts: the numbers of chunks that were measured, 1 among them.
        late: as for `measure`.
    """

    def total(names: Sequence[str], chunks: int = 1) -> dict[str, float]:
        return {f"{phase}_ms": sum(of_span(name, phase, chunks) for name in names) / chunks for phase in PHASES}

    def of_span(name: str, phase: str, chunks: int) -> float:
        # Pieces together cannot take less than the whole. Such a measurement is noise; "auto" must not act on it.
        return max(known.get((count, name, phase), 0.0) for count in (1, chunks))

    def operators(names: Sequence[str]) -> tuple[OperatorTime, ...]:
        return tuple(OperatorTime(name=name, **total([name])) for name in names)

    return OperatorTimes(
        backbone=operators(backbone),
        late=late and LateTimes(operators=operators(late.operators), after_dispatch=late.after_dispatch),
        chunks={
            count: ChunkTimes(**{name: PassTimes(**total([name], count)) for name in _CUT}) for count in chunk_counts
        },
        **{part: PassTimes(**total(names)) for part, names in _PARTS.items()},
    )
