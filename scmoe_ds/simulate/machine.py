"""A cluster in one of three cases, with what a profile measured in place of what its description says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scmoe_ds.simulate.cluster import Between, Cluster, Curve, Inside
from scmoe_ds.simulate.gpu import Efficiency, Gpu
from scmoe_ds.simulate.profile import Collective, Profile

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


def machine_of(cluster: Cluster, profile: Profile | None = None, case: Case = "likely") -> Machine:
    """A cluster to price with.

    Args:
        cluster: as it is described.
        profile: of one or a few nodes of its kind; what it has measured takes the place of what is described.
        case: of all efficiencies.
    """
    changed = cluster.model_copy(
        update={
            "gpu": _gpu(cluster.gpu, case),
            "inside": cluster.inside.model_copy(update={"efficiency": _curve(cluster.inside.efficiency, case)}),
            "between": cluster.between
            and cluster.between.model_copy(update={"efficiency": _curve(cluster.between.efficiency, case)}),
        }
    )
    return Machine(changed, case, slowed_by=1 / (1 - cluster.gpu.communication_share))


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
    return {"low": 1 - spread, "likely": 1.0, "high": 1 + spread}[case]
