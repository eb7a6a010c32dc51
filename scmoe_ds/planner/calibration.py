"""From recorded micro-batches to the times of a pair's parts, the same on every rank.

Every rank has timed its own part, without overlap; the slowest rank's medians count for all. An all-to-all has the time
of the rank that came last to it: the others' is also the time that they waited for that one.
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

from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.trace.recorder import Span

_CUT = ("dispatch", "experts", "combine")
_PARTS = {
    "gate": ("shortcut norm", "gate"),
    "encode": ("encode", "counts"),
    # The second half of DGMoE runs at the join: nothing is left to hide its communication.
    "decode": ("decode", "merge", *(f"current {name}" for name in ("gate", "encode", "counts", *_CUT, "decode"))),
}
"""Parts of OperatorTimes and the spans that they are made of."""
_PHASES = ("forward", "backward")

Key = tuple[int, str, str]  # number of chunks (1 for what is not cut), name of the spans, phase


@dataclass(frozen=True)
class Recording:
    """The spans of one micro-batch that ran without overlap, in so many chunks."""

    chunks: int
    spans: Sequence[Span]


def measure(
    recordings: Sequence[Recording],
    layers: Sequence[int],
    backbone: Sequence[str],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> OperatorTimes:
    """The times of one kind of pair. Collective over the world; every rank has recorded the same micro-batches.

    Args:
        recordings: micro-batches in 1 and any other numbers of chunks.
        layers: the MoE layers of this kind.
        backbone: names of its operators, in order.
        group: the ranks between which its rows travel.
        device: where tensors for the exchange between ranks live.
    """
    counts = sorted({recording.chunks for recording in recordings})
    names = [*_CUT, *itertools.chain(*_PARTS.values()), *backbone]
    samples: defaultdict[Key, list[float]] = defaultdict(list)
    transfers: dict[Key, list[float]] = {}
    for name, phase in itertools.product(names, _PHASES):
        for recording, layer in itertools.product(recordings, layers):
            spans = [span for span in recording.spans if (span.name, span.phase, span.layer) == (name, phase, layer)]
            found = [span.duration_ms for span in spans if span.lane != "wait"]
            # What is not cut takes the same time whatever the number of chunks.
            key = (recording.chunks if name in _CUT else 1, name, phase)
            if name.split()[-1] in ("dispatch", "combine", "counts"):
                # As many numbers on every rank, whatever it has seen: they are compared one by one.
                length = recording.chunks if name in _CUT else 1
                transfers.setdefault(key, []).extend((found + [math.inf] * length)[:length])
            elif found:
                samples[key].append(sum(found))
    _take_the_last_rank(transfers, group, device)
    for key, times in transfers.items():
        together = [sum(chunks) for chunks in _in_groups(times, key[0])]
        samples[key] = [milliseconds for milliseconds in together if math.isfinite(milliseconds)]
    keys = list(itertools.product(counts, names, _PHASES))
    # The lower of two middle ones: noise adds to a time, it never takes away.
    medians = torch.tensor([statistics.median_low(samples[key] or [0.0]) for key in keys], dtype=torch.float64)
    medians = medians.to(device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return times_from(dict(zip(keys, medians.tolist(), strict=True)), backbone, counts)


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


def times_from(known: Mapping[Key, float], backbone: Sequence[str], chunk_counts: Sequence[int]) -> OperatorTimes:
    """Sorts measured totals into an `OperatorTimes`.

    Args:
        known: milliseconds by (number of chunks, name of a span, phase), chunks added up.
        backbone: names of its operators, in order.
        chunk_counts: the numbers of chunks that were measured, 1 among them.
    """

    def total(names: Sequence[str], chunks: int = 1) -> dict[str, float]:
        return {f"{phase}_ms": sum(of_span(name, phase, chunks) for name in names) / chunks for phase in _PHASES}

    def of_span(name: str, phase: str, chunks: int) -> float:
        # Pieces together cannot take less than the whole. Such a measurement is noise; "auto" must not act on it.
        return max(known.get((count, name, phase), 0.0) for count in (1, chunks))

    return OperatorTimes(
        backbone=tuple(OperatorTime(name=name, **total([name])) for name in backbone),
        chunks={
            count: ChunkTimes(**{name: PassTimes(**total([name], count)) for name in _CUT}) for count in chunk_counts
        },
        **{part: PassTimes(**total(names)) for part, names in _PARTS.items()},
    )
