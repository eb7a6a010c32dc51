"""The nodes that our records were measured on: as a profile describes them, at a record's rate and pace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.harness.pace import Pace
from benchmarks.predict.own_rows import Row
from scmoe_ds.simulate.cluster import Between, Cluster
from scmoe_ds.simulate.machine import Machine, machine_of
from scmoe_ds.simulate.profile import Profile


@dataclass(frozen=True)
class Machines:
    """The nodes of a record: described, and as they were probed.

    Attributes:
        profiles: by the link's rate in Mbit/s.
    """

    cluster: Cluster
    profiles: Mapping[float, Profile]

    def of(self, row: Row) -> Machine:
        """With the row's link, and as fast as it was when the row was measured."""
        probed = self._probed(row)
        profile, between = self.profiles[probed].with_method(row.primitive), self.cluster.between
        assert between is not None
        link = between.model_copy(update={"nic_rate": probed * 1e6 / 8})
        machine = machine_of(self.cluster.model_copy(update={"between": link, "nodes": row.layout.world}), profile)
        return at_pace(at_rate(machine, row.rate_mbit / probed), self.pace(row))

    def pace(self, row: Row) -> PaceOver:
        """How long computation took when the row was measured, over what it took when its profile was."""
        return pace_over(self.profiles[self._probed(row)], row.pace)

    def _probed(self, row: Row) -> float:
        return min(self.profiles, key=lambda mbit: abs(math.log(mbit / row.rate_mbit)))


def at_rate(machine: Machine, factor: float) -> Machine:
    """Nodes with a link of `factor` times the rate: messages reach the shares of it that the probe has measured."""

    def other(between: Between | None) -> Between | None:
        return between and between.model_copy(update={"nic_rate": between.nic_rate * factor})

    measured = {name: (inside, other(between)) for name, (inside, between) in machine.measured.items()}
    cluster = machine.cluster.model_copy(update={"between": other(machine.cluster.between)})
    return replace(machine, cluster=cluster, measured=measured)


@dataclass(frozen=True)
class PaceOver:
    """How long the reference kernels took when a record was measured, over what they took in a profile; medians.

    Attributes:
        products, passes: of those that compute, and of those that memory bounds.
    """

    products: float = 1.0
    passes: float = 1.0

    def __str__(self) -> str:
        return f"{self.products:.2f} / {self.passes:.2f}"


def at_pace(machine: Machine, pace: PaceOver) -> Machine:
    """The same with computation that takes so much longer; links and what they take are as they were."""
    gpu = machine.cluster.gpu
    slower = gpu.model_copy(
        update={
            "peak": {precision: peak / pace.products for precision, peak in gpu.peak.items()},
            "bandwidth": gpu.bandwidth / pace.passes,
            "launch": gpu.launch * pace.products,
        }
    )
    return replace(machine, cluster=machine.cluster.model_copy(update={"gpu": slower}))


def pace_over(profile: Profile, pace: Pace) -> PaceOver:
    """Of a record, where it has noted its pace."""
    known = {(each.kind, each.phase, each.shape): each.ms for each in profile.table}
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for each in pace:
        if then := known.get((each["kind"], each["phase"], tuple(each["shape"]))):
            ratios[each["kind"] == "product"].append(each["ms"] / then)
    return PaceOver(*(statistics.median(ratios[product]) if ratios[product] else 1.0 for product in (True, False)))
