"""What two ranks measure of each other: on CPUs, and on simulated GPUs. One job for everything.

So long a time lets every size be measured, however busy the machine is; the rounds are few.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch.distributed as dist

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.measure import measure
from scmoe_ds.simulate.profile import Profile
from tests.probe.small import SMALL
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu


def on_cpus() -> list[dict[str, Any]]:
    """A measurement of two ranks of one node, and one of the same ranks as if they were two nodes."""
    one_node = measure(3600.0, ["fp32"], SMALL)
    with mock.patch.dict("os.environ", CROSS_RANK=str(dist.get_rank())):  # what launchers say
        return [one_node.model_dump(), measure(3600.0, ["fp32"], SMALL).model_dump()]


def on_gpus() -> tuple[dict[str, Any], list[str]]:
    """A measurement, and what the simulation found wrong with its streams."""
    with (
        simulated_gpu() as gpu,
        mock.patch("scmoe_ds.probe.clock.keep_gpu_busy"),
        mock.patch.object(Bench, "place", lambda bench, module: gpu.move(module.to(bench.dtype))),
        mock.patch.dict("scmoe_ds.probe.beside.SIDES", cuda=(8, 8)),
    ):
        return measure(3600.0, ["fp32", "bf16"], SMALL).model_dump(), gpu.findings


def everywhere() -> tuple[list[dict[str, Any]], tuple[dict[str, Any], list[str]] | None]:
    """All of it in one job."""
    return on_cpus(), None if NEEDS_SIMULATION.args[0] else on_gpus()


def test_two_ranks_measure_the_same() -> None:
    (cpus, gpus), second = run_distributed(everywhere, 2)
    assert (cpus, gpus) == second
    for found, nodes in zip(cpus, (1, 2), strict=True):
        profile = complete(found, nodes)
        assert profile.capability == (0, 0) and set(profile.peak) == {"fp32"}
    if gpus is not None:
        found, findings = gpus
        assert findings == []
        profile = complete(found, nodes=1)
        assert profile.capability == (9, 0) and set(profile.peak) == {"fp32", "bf16"}


def complete(found: dict[str, Any], nodes: int) -> Profile:
    """A profile that has every collective, both all-to-alls, and computation beside each."""
    profile = Profile.model_validate(found)
    assert (profile.nodes, profile.gpus_per_node) == (nodes, 2 // nodes)
    measured = [(each.collective, each.method) for each in (*profile.collectives, *profile.other_methods)]
    reductions = [("all-gather", ""), ("all-reduce", ""), ("reduce-scatter", "")]
    assert sorted(measured) == sorted([*(("all-to-all", method) for method in METHODS), *reductions])
    for each in profile.collectives:
        assert (each.ranks, each.nodes) == (2, nodes)
        assert [size for size, _ in each.ms] == list(SMALL.sent)
    assert {each.method for each in profile.slowdowns} == set(METHODS)
    assert profile.slowed_by is not None and profile.slowed_by >= 1
    assert profile.counts is not None
    return profile
