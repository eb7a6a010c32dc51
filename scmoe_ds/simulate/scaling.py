"""How a step scales with the number of GPUs, and from where on the all-to-all is longer than its window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scmoe_ds.errors import PlanError
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.search import Run, search
from scmoe_ds.simulate.space import Fixed

FITS = 0.01
"""Share of a step that may wait for all-to-alls while they are said to fit the window."""


@dataclass(frozen=True)
class Point:
    """One number of GPUs.

    Attributes:
        batch: samples of all ranks in a step.
        runs: of the compared methods, those that fit.
        efficiency: of the last method: samples per second and GPU, over those of the first point.
    """

    gpus: int
    batch: int
    runs: tuple[Run, ...]
    efficiency: float

    @property
    def exposed_share(self) -> float:
        """Of the last method's step, all-to-alls that it waits for."""
        step = self.runs[-1].step
        return step.exposed_ms / step.total_ms


def scaling(
    model: Model,
    cluster: Cluster,
    profile: Profile | None,
    routing: Routing,
    fixed: Fixed,
    compared: Sequence[Run],
    sizes: Sequence[int],
    weak: bool,
) -> list[Point]:
    """The compared methods on clusters of other sizes, each with its best EP and micro-batch; TP stays.

    Args:
        fixed: for the cluster as it is.
        compared: a baseline and a ScMoE, in their layouts on it.
        sizes: numbers of GPUs.
        weak: whether the batch grows with them; otherwise it stays, and ends the row where a rank has no sample.

    Raises:
        PlanError: a size that no cluster of such nodes has.
    """
    here, points = cluster.nodes * cluster.gpus_per_node, list[Point]()
    tensor = {each.method.name: each.layout.tensor_parallel for each in compared}
    first = None
    for gpus in sizes:
        batch = max(1, round(fixed.batch / here * gpus)) if weak else fixed.batch
        machine, runs = machine_of(of_size(cluster, gpus), profile), list[Run]()
        for each in compared:
            own = replace(fixed, batch=batch, tensor_parallel=min(tensor[each.method.name], gpus))
            try:
                runs += search(model, machine, routing, own, [each.method]).runs
            except PlanError:  # too little memory, or too few samples
                break
        if len(runs) == len(compared):
            rate = batch / runs[-1].step.total_ms / gpus
            first = first or rate
            points.append(Point(gpus, batch, tuple(runs), rate / first))
    return points


def of_size(cluster: Cluster, gpus: int) -> Cluster:
    """A cluster of the same nodes; with fewer GPUs than one has, a part of one."""
    per_node = min(gpus, cluster.gpus_per_node)
    if gpus % per_node or gpus < 1:
        raise PlanError(
            f"--scale {gpus}: must be a number of whole nodes of {cluster.gpus_per_node} GPUs, or less than one"
        )
    if gpus > per_node and cluster.between is None:
        raise PlanError(f'--scale {gpus}: {cluster.name} describes no network between nodes; add "between"')
    return cluster.model_copy(update={"nodes": gpus // per_node, "gpus_per_node": per_node})


def first_that_does_not_fit(points: Sequence[Point]) -> Point | None:
    """From where on the all-to-all is longer than its window."""
    return next((each for each in points if each.exposed_share > FITS), None)
