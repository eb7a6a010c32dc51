"""How much of ReaLB's decision and conversion the layer waits for, by one pair whose experts are exchanged in turns.

Its experts are as they are, or converted and decided before the first step. The second is measured twice in each round:
their mean is what the first is compared with, and their difference shows the noise. Everything else is the same memory,
so that a round's difference is theirs. Before each step the caches are emptied. The difference is small beside either
time: the median's interval says how well it is known. A clock around the calls says how much of the processor's time
both take, exposed or not.

Weights that were just converted may still lie in a cache when the experts run, those converted beforehand do not: what
is exposed may be slightly more. The A/A share compares two single measurements: its interval is wider than the noise of
the exposed share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from torch import Tensor

from benchmarks.harness.measure import EVICTED_BYTES, median_interval
from benchmarks.harness.parts import RecordedPair, parts_of
from scmoe_ds.moe.decisions.low_precision import LowPrecision, LowPrecisionContainer
from scmoe_ds.moe.decisions.low_precision_formats import Format
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks

BACKBONE = ("attention", "MLP", "shared expert")
AS_IT_IS, BEFOREHAND, AGAIN = "as it is", "beforehand", "beforehand again"
WARM_UP = 2
LEAST_ROUNDS = 6
"""Fewer values have no 95 % interval of their median."""


class Clocked(LowPrecisionContainer):
    """Knows the processor time of decision and conversion, since `seconds` was last set."""

    seconds = 0.0

    def _timed(self, work: Callable[[], Any]) -> Any:
        started = time.thread_time()  # the thread of the all-to-all may use the same core meanwhile
        result = work()
        self.seconds += time.thread_time() - started
        return result

    def notice(self, routing: Routing, ranks: int) -> Tensor:
        """Of the container."""
        found: Tensor = self._timed(partial(super().notice, routing, ranks))
        return found

    def told(self, told_PX: Tensor) -> None:
        """Of the container."""
        self._timed(partial(super().told, told_PX))

    def announce(self, rows_per_expert: Sequence[int]) -> None:
        """Of the container."""
        self._timed(partial(super().announce, rows_per_expert))


class Prepared(LowPrecisionContainer):
    """Converted and decided before the first step: what both would leave if they took no time."""

    def prepare(self, hot: bool) -> None:
        """From now on this rank is hot, or it is not."""
        self.notices, self.hot = 0, hot
        self._convert(range(self.num_local_experts))

    def announce(self, rows_per_expert: Sequence[int]) -> None: ...

    def _forget(self) -> None: ...


def pair_rounds(text: str) -> int:
    """A flag's value."""
    if not text.isdecimal() or int(text) < LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {LEAST_ROUNDS}")
    return int(text)


def variants(
    container: Experts, slices: TokenSlices, settings: LowPrecision, format: Format, hot: bool
) -> tuple[Clocked, Prepared]:
    """The experts of a pair with low precision, and the same without decision and conversion.

    Args:
        container: the experts as they were before.
        hot: whether this rank is.
    """
    clocked, prepared = (kind(container, slices, settings, format) for kind in (Clocked, Prepared))
    assert isinstance(clocked, Clocked) and isinstance(prepared, Prepared)
    prepared.prepare(hot)
    return clocked, prepared


def measure(row: RecordedPair, clocked: Clocked, prepared: Prepared, hidden: Tensor, rounds: int) -> dict[str, Any]:
    """Shares of the step and of the layer, of the slower rank. Collective.

    Args:
        row: a pair with its schedule, which gets the experts in turns.
    """
    layer = row.pair.layer
    work: list[float] = []

    def step(experts: LowPrecisionContainer) -> None:
        layer.deepspeed_moe.experts, clocked.seconds = experts, 0.0
        row.step(hidden)
        if experts is clocked:
            work.append(clocked.seconds)

    evicted = torch.zeros(EVICTED_BYTES // 4)

    def before() -> None:
        evicted.add_(1)
        dist.barrier()

    experts_of = {AS_IT_IS: clocked, BEFOREHAND: prepared, AGAIN: prepared}
    spans: dict[str, list[Any]] = {}

    def recorded(name: str) -> None:
        row.spans = spans.setdefault(name, [])
        step(experts_of[name])

    own = interleave({name: partial(recorded, name) for name in experts_of}, rounds, WARM_UP, before)
    steps = {name: over_ranks(seconds) for name, seconds in own.items()}
    layers = {name: over_ranks(layer_seconds(own[name], spans[name][WARM_UP:])) for name in experts_of}
    works = over_ranks(work[WARM_UP:])
    both = [[statistics.mean(each) for each in zip(of[BEFOREHAND], of[AGAIN], strict=True)] for of in (layers, steps)]
    return {
        "work_ms": 1e3 * statistics.median(works),
        "work_of_layer": statistics.median(works) / statistics.median(layers[AS_IT_IS]),
        "layer_ms": 1e3 * statistics.median(layers[AS_IT_IS]),
        "layer": _exposed(layers[AS_IT_IS], both[0]),
        "step": _exposed(steps[AS_IT_IS], both[1]),
        "layer_again": _exposed(layers[AGAIN], layers[BEFOREHAND]),
    }


def layer_seconds(steps: Sequence[float], spans: Sequence[Any]) -> list[float]:
    """Steps without the backbone's operators and the shared expert."""
    parts = map(parts_of, spans)
    return [step - 1e-3 * sum(each[kind] for kind in BACKBONE) for step, each in zip(steps, parts, strict=True)]


def _exposed(times: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """Shares of `times` that are gone in `without`: their spread over the rounds, and the median's interval."""
    shares = [1 - less / more for more, less in zip(times, without, strict=True)]
    return {"spread": vars(Spread.of(shares)), "interval": median_interval(shares)}


def text(found: dict[str, Any]) -> str:
    """What `measure` returned, in sentences."""
    layer, step, again = (_share(found[kind]) for kind in ("layer", "step", "layer_again"))
    return (
        f"Decision and conversion take {found['work_ms']:.1f} ms of the slower rank, "
        f"{100 * found['work_of_layer']:.1f} % of its layer's {found['layer_ms']:.0f} ms. Exposed are {layer} of the "
        f"layer, {step} of the step. Both done beforehand, measured twice (A/A): {again} of the layer."
    )


def _share(found: dict[str, Any]) -> str:
    low, high = (100 * each for each in found["interval"])
    spread = Spread(**found["spread"])
    return (
        f"{100 * spread.median:.1f} % (95 % interval of the median {low:.1f} to {high:.1f}; 10th–90th percentile "
        f"{100 * spread.p10:.1f} to {100 * spread.p90:.1f})"
    )
