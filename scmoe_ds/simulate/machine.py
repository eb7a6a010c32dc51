"""A cluster to price with: what a profile measured takes the place of what its description says."""

from __future__ import annotations

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.cards import card_named, gpu_of
from scmoe_ds.simulate.case import Case, Machine, in_case, links_in_case
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.gpu import Efficiency, Gpu
from scmoe_ds.simulate.interconnect import Between, Curve, Inside
from scmoe_ds.simulate.measured_gpu import with_measured
from scmoe_ds.simulate.measured_links import measured_links
from scmoe_ds.simulate.profile import Profile

__all__ = ["Case", "Machine", "cluster_of", "machine_of"]


def machine_of(cluster: Cluster, profile: Profile | None = None, case: Case = "likely") -> Machine:
    """A cluster to price with.

    Args:
        cluster: as it is described.
        profile: of one or a few nodes of its kind. Its kernels take the place of the described ones. So do its links,
            for each collective; by their fitted latency and rate they serve any number of nodes.
        case: of all shares, described and measured.

    Raises:
        ClusterError: the profile is of other GPUs.
    """
    slowed_by = 1 / (1 - cluster.gpu.communication_share)
    if profile is None:
        return Machine(in_case(cluster, case), case, slowed_by=slowed_by)
    _same_kind(cluster.gpu, profile)
    cluster = cluster.model_copy(update={"gpu": with_measured(cluster.gpu, profile)})
    links = measured_links(cluster, profile)
    measured = {collective: links_in_case(*each, case) for collective, each in links.items()}
    return Machine(in_case(cluster, case), case, measured, profile.slowed_by or slowed_by, profiled=True)


def _same_kind(gpu: Gpu, profile: Profile) -> None:
    known, measured = card_named(gpu.name), card_named(profile.device)
    if (known is not measured and known is not None and measured is not None) or (
        (gpu.capability == (0, 0)) != (profile.capability == (0, 0))
    ):
        raise ClusterError(
            f"the profile's device = {profile.device}: the cluster has {gpu.name}; probe a node of the cluster's kind"
        )


def cluster_of(profile: Profile, nodes: int = 1, gpus_per_node: int | None = None, name: str = "") -> Cluster:
    """A cluster of nodes like those that were measured, where there is no description.

    Its links are those of the all-to-all; `machine_of` with the same profile adds the other collectives'.

    Args:
        nodes: of the cluster; may be more than were measured.
        gpus_per_node: default: as many as were measured.
        name: default: from the device.

    Raises:
        ClusterError: a figure is missing that the cluster needs.
    """
    gpus_per_node = gpus_per_node or profile.gpus_per_node
    card = card_named(profile.device)
    gpu = with_measured(gpu_of(card) if card else _bare(profile), profile)
    whole = Curve(points=((1.0, 1.0),), spread=0.0)
    nvlink = card.nvlink * 1e9 if card else 0.0
    inside = Inside(kind="loopback", rate=1e9, latency=0.0, efficiency=whole)
    if gpu.capability != (0, 0):
        inside = inside.model_copy(update={"kind": "nvlink switch", "rate": nvlink or 2.5e10})
    between = Between(nics=1, nic_rate=1e9, latency=0.0, efficiency=whole) if nodes > 1 else None
    cluster = Cluster(
        name=name or f"{nodes} × {gpus_per_node} {profile.device}, as measured",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        inside=inside,
        between=between,
        sources={"gpu": f"Measured on {profile.date}.", "inside": f"Measured on {profile.date}."},
    )
    links = measured_links(cluster, profile).get("all-to-all")
    _require_links(profile, nodes, gpus_per_node)
    assert links is not None or nodes * gpus_per_node == 1
    inside, between = links or (inside, between)
    return cluster.model_copy(update={"inside": inside, "between": between})


def _require_links(profile: Profile, nodes: int, gpus_per_node: int) -> None:
    groups = {each.nodes > 1 for each in profile.collectives if each.collective == "all-to-all"}
    if nodes > 1 and True not in groups:
        raise ClusterError(
            f"nodes = {nodes}: the profile has no all-to-all between nodes, which a plan for several needs; probe two "
            "nodes, or describe the network: clusters/README.md"
        )
    if gpus_per_node > 1 and False not in groups:
        raise ClusterError(
            f"gpus_per_node = {gpus_per_node}: the profile has no all-to-all inside a node, which a plan for several "
            "GPUs needs; probe with all GPUs of a node, or describe the links: clusters/README.md"
        )


def _bare(profile: Profile) -> Gpu:
    usual = {"product": 0.9, "grouped product": 0.8, "attention": 0.4}
    kinds = ("product", "grouped product", "attention", "pointwise", "activation", "reduction", "rows")
    return Gpu(
        name=profile.device,
        peak=profile.peak,
        memory=profile.memory,
        bandwidth=profile.bandwidth,
        launch=profile.launch,
        communication_share=0.1,
        efficiency={kind: _about(usual.get(kind, 0.7)) for kind in kinds},
        capability=profile.capability,
    )


def _about(share: float) -> Efficiency:
    return Efficiency(low=0.8 * share, likely=share, high=min(1.0, 1.1 * share))
