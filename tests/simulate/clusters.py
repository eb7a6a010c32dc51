"""A cluster of round figures, so that times can be written down."""

from __future__ import annotations

from typing import Any

from scmoe_ds.simulate.cluster import Between, Cluster, Curve, Efficiency, Gpu, Inside
from scmoe_ds.simulate.machine import Machine, machine_of

FULL = Curve(points=((1.0, 1.0),), spread=0.0)


def cluster(nodes: int = 2, gpus_per_node: int = 4, **changed: Any) -> Cluster:
    """Peaks, rates and shares are powers of ten or 1.

    Args:
        changed: fields of the GPU, or "inside" and "between" with fields of these.
    """
    inside = {"kind": "nvlink switch", "rate": 1e11, "latency": 1e-6, "efficiency": FULL} | changed.pop("inside", {})
    between = {"nics": 2, "nic_rate": 1e10, "latency": 1e-5, "efficiency": FULL} | changed.pop("between", {})
    whole = Efficiency(likely=1.0, low=1.0, high=1.0)
    gpu: dict[str, Any] = {
        "name": "round",
        "peak": {"bf16": 1e14, "fp32": 1e13},
        "memory": 8e10,
        "bandwidth": 1e12,
        "launch": 0.0,
        "communication_share": 0.0,
        "efficiency": dict.fromkeys(("product", "attention", "pointwise"), whole),
    }
    return Cluster(
        name="round",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=Gpu(**(gpu | changed)),
        inside=Inside(**inside),
        between=Between(**between) if nodes > 1 else None,
    )


def machine(nodes: int = 2, gpus_per_node: int = 4, **changed: Any) -> Machine:
    """See `cluster`."""
    return machine_of(cluster(nodes, gpus_per_node, **changed))
