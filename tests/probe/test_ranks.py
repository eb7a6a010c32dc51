"""What two ranks measure of each other. One job for everything."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch.distributed as dist

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.probe.measure import measure
from scmoe_ds.simulate.profile import Profile
from tests.probe.small import SMALL


def two_ranks() -> tuple[dict[str, Any], dict[str, Any]]:
    """A measurement of two ranks of one node, and one of the same ranks as if they were two nodes."""
    one_node = measure(60.0, ["fp32"], SMALL).model_dump()
    with mock.patch.dict("os.environ", CROSS_RANK=str(dist.get_rank())):  # what launchers say
        return one_node, measure(60.0, ["fp32"], SMALL).model_dump()


def test_two_ranks_measure_the_same() -> None:
    (first, first_apart), (second, second_apart) = run_distributed(two_ranks, 2)
    assert (first, first_apart) == (second, second_apart)
    for found, nodes in ((first, 1), (first_apart, 2)):
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
