"""The link's rate: searched so that the all-to-all takes a given share of the baseline's MoE layer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness.measure import EVICTED_BYTES, cold
from benchmarks.harness.parts import layer_ms, record_steps, sum_ms
from benchmarks.harness.variants import Shape, baseline, build
from lab.nodes import shape_own_end
from scmoe_ds.planner.rounds import over_ranks
from scmoe_ds.trace.recorder import Span

LOWEST_MBIT, HIGHEST_MBIT = 5.0, 8000.0
REPEATS = 5
FIRST_MBIT, SEARCHES = 400.0, 6


@dataclass(frozen=True)
class Link:
    """The rate that was found, and what it was found from: medians over some steps of the baseline's pair.

    Attributes:
        share: all_to_all_ms / layer_ms.
        all_to_all_ms: the MoE layer's all-to-alls, each as long as for the rank that came last: the others' time is
            also the time that they waited for that one.
        layer_ms: the MoE layer with them, of the slower rank.
    """

    rate_mbit: float
    share: float
    all_to_all_ms: float
    layer_ms: float


def find_forward_rate(
    shape: Shape, share: float, method: str, dtype: torch.dtype = torch.float32, fixed_mbit: float | None = None
) -> Link:
    """Sets the link by forward passes of a top-2 pair with exact dispatch; see `find_rate`. Collective."""
    (variant,) = baseline("exact").values()
    run = build(variant, shape, 0.0, method).to(dtype).eval()
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size).to(dtype)

    def step() -> None:
        with torch.inference_mode():
            run(hidden)

    return find_rate(partial(record_steps, run, cold(step, torch.zeros(EVICTED_BYTES // 4))), share, fixed_mbit)


def next_rate(rate_mbit: float, communication_ms: float, total_ms: float, share: float) -> float:
    """The rate that would give the share if the communication took time in proportion to 1 / rate."""
    aim_ms = share / (1 - share) * max(total_ms - communication_ms, 0.02 * total_ms)
    return min(max(rate_mbit * communication_ms / aim_ms, LOWEST_MBIT), HIGHEST_MBIT)


def rates_in(path: str) -> dict[str, float]:
    """The rates of a benchmark's record by mode, Mbit/s: times at other rates could not be compared with its own."""
    return {mode: link["rate_mbit"] for mode, link in json.loads(Path(path).read_text())["links"].items()}


def find_rate(record: Callable[[int], list[list[Span]]], share: float, fixed_mbit: float | None = None) -> Link:
    """Sets the link so that the all-to-alls take `share` of the time of the baseline's MoE layers.

    They are timed in the baseline's own steps. A loop of all-to-alls alone would measure something else: gloo's
    collective is full duplex only if all ranks enter it at the same moment. A rank that comes later sends its rows
    before it says that it is ready to receive, and then the two directions take turns. Between ranks that compute, that
    is the rule.

    Args:
        record: the spans of so many forward passes or training steps of the baseline, without overlap.
        fixed_mbit: sets this rate, whatever the share is with it.
    """
    searches = SEARCHES if fixed_mbit is None else 1
    rate = fixed_mbit or FIRST_MBIT
    for search in range(searches):
        shape_own_end(rate)
        steps = record(REPEATS + 1)[1:]  # the first pays for connections and allocations
        sent = sum_ms(steps, min, lambda span: span.lane == "communication")
        (layer,) = over_ranks([statistics.median(layer_ms(spans) for spans in steps)])
        found = Link(rate, sent / layer, sent, layer)
        if abs(found.share - share) < 0.015 or search == searches - 1:
            break
        rate = next_rate(rate, sent, layer, share)
    return found
