"""A cluster: nodes, GPUs, the links inside a node and between nodes. JSON files hold the same fields, with units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.cards import GPUS, NAMES, find
from scmoe_ds.simulate.gpu import Count, Efficiency, Frozen, Gpu, Measured, in_units
from scmoe_ds.simulate.interconnect import Between, Curve, Inside
from scmoe_ds.simulate.json_files import nearest, read_as
from scmoe_ds.simulate.plausible import beyond_hardware, contradictions

__all__ = ["Between", "Cluster", "Curve", "Efficiency", "Gpu", "Inside", "Measured"]


def _whole_gpu(value: Any) -> Any:
    """A name of the table, or "like" a name with what differs, as all figures of a GPU."""
    if isinstance(value, str):
        value = {"like": value}
    if isinstance(value, Gpu) or (isinstance(value, Mapping) and "like" not in value):
        return value
    if not isinstance(value, Mapping):
        raise ValueError('must be a name, an object with "like": NAME and what differs, or one with all figures')
    like = value["like"]
    card = find(like) if isinstance(like, str) else None
    if card is None:
        raise ValueError(f"no GPU type of this name is known; {nearest(str(like), NAMES)}")
    whole = in_units(GPUS[card.name])
    changed = {key: each for key, each in value.items() if key != "like"}
    for key, each in changed.items():  # peaks and efficiencies one by one
        both = isinstance(each, Mapping) and isinstance(whole.get(key), Mapping)
        whole[key] = {**whole[key], **each} if both else each
    return whole


class Cluster(Frozen):
    """A cluster.

    Attributes:
        gpu: in JSON also a name of `cards.py`, or an object with "like": NAME and what differs.
        between: None for a single node.
        price: of one GPU for an hour, in any currency; None: costs are given in GPU hours.
        sources: for every figure, where it is from: path of the field → sentence.
    """

    name: str
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=1, le=1024, strict=True)]
    gpu: Annotated[Gpu, BeforeValidator(_whole_gpu)]
    inside: Inside
    between: Between | None = None
    price: Annotated[float, Field(ge=0, strict=True)] | None = None
    sources: dict[str, str] = Field({})


def read_cluster(path: str | Path) -> Cluster:
    """The cluster that a JSON file describes.

    Raises:
        ClusterError: the file cannot be read, or a figure breaks a rule, contradicts another, or cannot be.
    """
    cluster = read_as(Cluster, path, ClusterError)
    if found := [f"{path}: {line}" for line in _findings(cluster)]:
        raise ClusterError("\n".join(found[:5]))
    return cluster


def _findings(cluster: Cluster) -> Iterator[str]:
    yield from contradictions(cluster.nodes, cluster.gpus_per_node, cluster.gpu, cluster.inside, cluster.between)
    yield from beyond_hardware(cluster.gpu, cluster.inside, cluster.between)
    fields = set(_paths(cluster))
    for path in cluster.sources:
        if path.startswith("between.") and cluster.between is None:
            if cluster.nodes == 1:  # otherwise it is missing, which has been said
                yield f"sources.{path}: there is no network; remove it, or add between"
        elif path not in fields:
            yield f"sources.{path}: names no field; {nearest(path, fields)}"


def _paths(part: BaseModel, before: str = "") -> Iterator[str]:
    for name in type(part).model_fields:
        inner = getattr(part, name)
        yield before + name
        if isinstance(inner, BaseModel):
            yield from _paths(inner, f"{before}{name}.")
        elif isinstance(inner, Mapping):
            yield from (f"{before}{name}.{key}" for key in inner)
