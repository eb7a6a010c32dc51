"""A cluster in one of three cases: what kernels and collectives are priced with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scmoe_ds.simulate.cluster import Between, Cluster, Curve, Inside
from scmoe_ds.simulate.gpu import Efficiency, Gpu
from scmoe_ds.simulate.profile import Collective

Case = Literal["low", "likely", "high"]
"""Which end of every share's spread: "low" is the slower machine. What two cases take is a number's interval."""


@dataclass(frozen=True)
class Machine:
    """What kernels and collectives are priced with.

    Attributes:
        cluster: in the case: low, likely and high of every efficiency are the same number, and no spread is left.
        case: that its shares are of.
        measured: links by collective, where a profile has measured it.
        slowed_by: factor on computation while a transfer runs beside it.
        profiled: whether a profile's figures are in it.
    """

    cluster: Cluster
    case: Case = "likely"
    measured: Mapping[Collective, tuple[Inside, Between | None]] = field(default_factory=dict)
    slowed_by: float = 1.0
    profiled: bool = False

    def links(self, collective: Collective) -> tuple[Inside, Between | None]:
        """The links as this collective finds them; those of the description where nothing is measured."""
        return self.measured.get(collective, (self.cluster.inside, self.cluster.between))


def in_case(cluster: Cluster, case: Case) -> Cluster:
    """The cluster with one number for each share."""
    inside, between = links_in_case(cluster.inside, cluster.between, case)
    return cluster.model_copy(update={"gpu": _gpu(cluster.gpu, case), "inside": inside, "between": between})


def links_in_case(inside: Inside, between: Between | None, case: Case) -> tuple[Inside, Between | None]:
    """Links with one number for each share."""
    inside = inside.model_copy(update={"efficiency": _curve(inside.efficiency, case)})
    return inside, between and between.model_copy(update={"efficiency": _curve(between.efficiency, case)})


def _gpu(gpu: Gpu, case: Case) -> Gpu:
    shares = {kind: getattr(each, case) for kind, each in gpu.efficiency.items()}
    factor = _factor(gpu.spread, case)
    return gpu.model_copy(
        update={
            "efficiency": {kind: Efficiency(likely=share, low=share, high=share) for kind, share in shares.items()},
            "table": tuple(each.model_copy(update={"share": each.share * factor}) for each in gpu.table),
            "spread": 0.0,
        }
    )


def _curve(curve: Curve, case: Case) -> Curve:
    factor = _factor(curve.spread, case)
    return Curve(points=tuple((size, min(1.0, share * factor)) for size, share in curve.points), spread=0.0)


def _factor(spread: float, case: Case) -> float:
    return {"low": 1 / (1 + spread), "likely": 1.0, "high": 1 + spread}[case]
