"""What is asked of `scmoe plan`: flags and files become a model, a cluster and what is decided."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ArgumentError, ClusterError, PlanError
from scmoe_ds.programs.plan_model import model_of
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.json_files import read_as, read_object
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import cluster_of
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing, routing_of
from scmoe_ds.simulate.settings import Settings, read_settings
from scmoe_ds.simulate.space import Fixed

_TOKENS, _IMAGES = 2**19, 1024
"""Of a step where nothing says how many; as in the files of ds_configs/."""


@dataclass(frozen=True)
class Question:
    """All that a plan is made from.

    Attributes:
        given: method and layout of the DeepSpeed JSON as it is; None: it has none.
        tokens: of the whole training; of an image model, samples.
        whole: the DeepSpeed JSON; None: there is none.
        args: the command line, for the command that starts the training.
    """

    model: Model
    cluster: Cluster
    profile: Profile | None
    routing: Routing
    fixed: Fixed
    given: tuple[Method, Layout] | None
    tokens: float
    whole: Mapping[str, Any] | None
    args: argparse.Namespace


def question_of(args: argparse.Namespace) -> Question:
    """Reads the files that the flags name.

    Raises:
        UserError: a file or flag to correct.
    """
    whole = None if args.deepspeed_config is None else read_object(args.deepspeed_config, PlanError)
    profile = None if args.profile is None else read_as(Profile, args.profile, ClusterError)
    cluster = _cluster(args, profile)
    world = cluster.nodes * cluster.gpus_per_node
    settings = None if whole is None else _settings(args, whole, world)
    model = model_of(args, whole)
    parts = 1 if settings is None or settings.method is None else settings.method.parts
    return Question(
        model=model,
        cluster=cluster,
        profile=profile,
        routing=_routing(args),
        fixed=_fixed(args, whole or {}, Layout(world) if settings is None else settings.layout, model, parts),
        given=None if settings is None or settings.method is None else (_named(args, settings.method), settings.layout),
        tokens=args.tokens or 1e9,
        whole=whole,
        args=args,
    )


def _cluster(args: argparse.Namespace, profile: Profile | None) -> Cluster:
    """The described one, or one of nodes like those that were measured."""
    if args.cluster is None:
        if profile is None:
            raise ArgumentError("--cluster: missing; name a description, as those in clusters/, or a --profile")
        return cluster_of(profile, args.nodes or profile.nodes)
    cluster = read_cluster(args.cluster)
    if args.nodes is None:
        return cluster
    if args.nodes > 1 and cluster.between is None:
        raise ArgumentError(f'--nodes {args.nodes}: {args.cluster} has no "between", the network between nodes')
    return cluster.model_copy(update={"nodes": args.nodes})


def _settings(args: argparse.Namespace, whole: Mapping[str, Any], world: int) -> Settings:
    try:
        found = read_settings(whole, world, args.tensor_parallel or 1, _recompute(args) or False)
    except PlanError as error:
        raise PlanError(f"{args.deepspeed_config}: {error}") from None
    overlap_comm = (whole.get("zero_optimization") or {}).get("overlap_comm")
    return replace(found, layout=replace(found.layout, overlap_comm=overlap_comm))


def _named(args: argparse.Namespace, method: Method) -> Method:
    """The JSON's own method, beside those of the table."""
    return replace(method, name=f"{Path(args.deepspeed_config).name}: {method.name}")


def _recompute(args: argparse.Namespace) -> Any:
    granularity = args.recompute_granularity
    return False if granularity == "none" else granularity


def _routing(args: argparse.Namespace) -> Routing:
    return routing_of("uniform" if args.skew is args.expert_counts is None else str(args.skew or args.expert_counts))


def _fixed(args: argparse.Namespace, whole: Mapping[str, Any], base: Layout, model: Model, parts: int) -> Fixed:
    """What is decided: by a flag, else by the DeepSpeed JSON; what it leaves out, or "auto", is left to the search."""

    def written(*path: str) -> bool:
        value: Any = whole
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value not in (None, "auto")

    experts = ("expert_parallel", "autoep_size") if model.autoep else ("scmoe", "expert_parallel_size")
    # Parts can lie on more ranks than there are experts, or than have tokens of their own; whole experts do not.
    counts = [stage.experts.num_experts for stage in model.stages if stage.experts is not None]
    size = base.expert_parallel
    whole_fit = parts == 1 or (size <= base.data_parallel and not any(count % size for count in counts))
    tensor = args.tensor_parallel or (base.tensor_parallel if base.tensor_parallel > 1 else None)
    batch = base.micro_batch * base.accumulation * base.data_parallel
    micro = base.micro_batch if written("train_micro_batch_size_per_gpu") else None
    known = written("train_batch_size") or (micro and written("gradient_accumulation_steps"))
    return Fixed(
        batch=args.global_batch_size or (batch if known else _usual_batch(model, base.world)),
        base=replace(base, precision=args.precision or base.precision, hierarchical=False),
        expert_parallel=args.expert_parallel or (base.expert_parallel if written(*experts) and whole_fit else None),
        tensor_parallel=tensor,
        zero_stage=args.zero_stage
        if args.zero_stage is not None
        else (base.zero_stage if written("zero_optimization", "stage") else None),
        micro_batch=args.micro_batch or micro,
        recompute=_recompute(args),
    )


def _usual_batch(model: Model, world: int) -> int:
    """As many samples as in the shipped files, and a whole number for every rank."""
    samples = _IMAGES if model.images else _TOKENS / model.stages[0].tokens
    return max(1, math.ceil(samples / world)) * world
