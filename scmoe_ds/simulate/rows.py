"""What a search says of each method: step time, throughput, MFU, cost, exposed communication, speed-up.

Each number is an interval. Its ends come from four other machines, on which all efficiencies of the GPUs, and all of
the links, are as low or as high as their sources allow. A speed-up is a quotient of two methods on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.machine import Case, Machine, machine_of
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.search import Run, run

_CORNERS: tuple[tuple[Case, Case], ...] = (("low", "low"), ("low", "high"), ("high", "low"), ("high", "high"))
"""Of the GPUs, of the links."""


@dataclass(frozen=True)
class Interval:
    """A number and how far off it may be; low ≤ likely ≤ high."""

    likely: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of a number on all machines, the likely one first."""
        return cls(values[0], min(values), max(values))

    def overlaps(self, other: Interval) -> bool:
        """Whether both may be the same number."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Row:
    """A method in its fastest layout.

    Attributes:
        run: on the likely machine.
        steps_ms: of a step on the likely machine and at the corners.
        tokens_per_second: of all ranks; of an image model, samples.
        mfu: operations that the model needs over those that the GPUs could do.
        exposed_ms: of a step, all-to-alls that the computation waits for.
        exposed_share: of a step.
        speedup: over the first row.
        gpu_hours: for `tokens`.
        cost: of them; None: the cluster has no price.
    """

    run: Run
    steps_ms: tuple[float, ...]
    step_ms: Interval
    tokens_per_second: Interval
    mfu: Interval
    exposed_ms: Interval
    exposed_share: Interval
    speedup: Interval
    gpu_hours: Interval
    cost: Interval | None

    @property
    def name(self) -> str:
        """The method's."""
        return self.run.method.name


def machines(cluster: Cluster, profile: Profile | None) -> tuple[Machine, ...]:
    """The likely machine, and those at the corners of what is not known."""
    cases: dict[Case, Machine] = {case: machine_of(cluster, profile, case) for case in ("low", "likely", "high")}
    corners = [
        replace(cases[links], cluster=cases[links].cluster.model_copy(update={"gpu": cases[gpus].cluster.gpu}))
        for gpus, links in _CORNERS
    ]
    return (cases["likely"], *corners)


def rows(model: Model, found: Sequence[Run], corners: Sequence[Machine], routing: Routing, tokens: float) -> list[Row]:
    """One row for each run.

    Args:
        found: of a search on the likely machine.
        corners: all other machines.
        tokens: of a whole training, for hours and cost; of an image model, samples.
    """
    everywhere = [
        (each, *(run(model, each.method, each.layout, machine, routing) for machine in corners)) for each in found
    ]
    return [_row(model, runs, everywhere[0], tokens, corners[0].cluster) for runs in everywhere]


def _row(model: Model, runs: Sequence[Run], first: Sequence[Run], tokens: float, cluster: Cluster) -> Row:
    likely, layout = runs[0], runs[0].layout
    seconds = [each.step.total_ms / 1000 for each in runs]
    done = samples_of(likely) if model.images else samples_of(likely) * tokens_per_sample(model)
    flops = likely.work.flops * layout.accumulation
    hours = Interval.of([tokens / done * each * layout.world / 3600 for each in seconds])
    price = cluster.price
    return Row(
        run=likely,
        steps_ms=tuple(each.step.total_ms for each in runs),
        step_ms=Interval.of([each.step.total_ms for each in runs]),
        tokens_per_second=Interval.of([done / each for each in seconds]),
        mfu=Interval.of([flops / each / cluster.gpu.peak[layout.precision] for each in seconds]),
        exposed_ms=Interval.of([each.step.exposed_ms for each in runs]),
        exposed_share=Interval.of([each.step.exposed_ms / each.step.total_ms for each in runs]),
        speedup=Interval.of([base.step.total_ms / each.step.total_ms for base, each in zip(first, runs, strict=True)]),
        gpu_hours=hours,
        cost=None if price is None else Interval(*(price * each for each in (hours.likely, hours.low, hours.high))),
    )


def samples_of(found: Run) -> int:
    """Of all ranks in a step."""
    layout = found.layout
    return layout.micro_batch * layout.accumulation * layout.data_parallel


def tokens_per_sample(model: Model) -> int:
    """Of a text; an image's are counted in its first stage."""
    return model.stages[0].tokens
