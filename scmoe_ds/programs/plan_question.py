"""What is asked of `scmoe plan`: flags and files become a model, a cluster and what is decided."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scmoe_ds.errors import ArgumentError, ClusterError
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import SWIN_PRESETS
from scmoe_ds.programs.flags.checks import require_flags
from scmoe_ds.programs.plan_model import model_of_gpt, model_of_preset
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.json_files import read_as, read_object
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing, routing_of
from scmoe_ds.simulate.space import Fixed

_TOKENS, _IMAGES = 2**19, 1024
"""Of a step where nothing says how many; as in the files of ds_configs/."""
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
_SIZES = (*_NEEDED, "ffn_hidden_size", "num_key_value_heads", "swiglu", "vocab_size")


@dataclass(frozen=True)
class Question:
    """All that a plan is made from.

    Attributes:
        tokens: of the whole training; of an image model, samples.
        whole: the DeepSpeed JSON; None: there is none.
        args: the command line, for the command that starts the training.
    """

    model: Model
    cluster: Cluster
    profile: Profile | None
    routing: Routing
    fixed: Fixed
    tokens: float
    whole: Mapping[str, Any] | None
    args: argparse.Namespace


def question_of(args: argparse.Namespace) -> Question:
    """Reads the files that the flags name.

    Raises:
        UserError: a file or flag to correct.
    """
    for name in ("nodes", "global_batch_size", "expert_parallel", "tensor_parallel", "micro_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    whole = None if args.deepspeed_config is None else read_object(args.deepspeed_config, ArgumentError)
    cluster = read_cluster(args.cluster)
    if args.nodes is not None:
        if args.nodes > 1 and cluster.between is None:
            raise ArgumentError(f'--nodes {args.nodes}: {args.cluster} has no "between", the network between nodes')
        cluster = cluster.model_copy(update={"nodes": args.nodes})
    model = model_of(args, whole)
    return Question(
        model=model,
        cluster=cluster,
        profile=None if args.profile is None else read_as(Profile, args.profile, ClusterError),
        routing=_routing(args),
        fixed=fixed_of(args, whole or {}, model, cluster.nodes * cluster.gpus_per_node),
        tokens=args.tokens or 1e9,
        whole=whole,
        args=args,
    )


def _routing(args: argparse.Namespace) -> Routing:
    return routing_of("uniform" if args.skew is args.expert_counts is None else args.skew or args.expert_counts)


def model_of(args: argparse.Namespace, whole: Mapping[str, Any] | None) -> Model:
    """The model of --model, --preset or sizes; numbers of experts are those of flags, else of the JSON's section."""
    if args.preset and args.model:
        raise ArgumentError("--preset and --model: give one of them")
    flags = {
        "num_experts": args.num_experts,
        "moe_every": args.expert_interval,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
    }
    given = (whole or {}).get("scmoe") or {}
    section = {**given, **{name: value for name, value in flags.items() if value is not None}}
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) not in (None, False)}
    if args.model:
        raise ArgumentError("--model: soon")
    if args.preset in SWIN_PRESETS:
        if sizes:
            raise ArgumentError(
                f"--{next(iter(sizes)).replace('_', '-')}: is a flag of texts, and --preset {args.preset} of images"
            )
        model = model_of_preset(args.preset, section)
    elif args.preset and not sizes:
        model = model_of_preset(args.preset, section)
    else:
        require_flags(argparse.Namespace(**_with_preset(args, sizes)), _NEEDED)
        preset = PRESETS.get(args.preset or "")
        experts = {} if preset is None else {"num_experts": preset.num_experts, "moe_every": preset.moe_every}
        model = model_of_gpt(
            args.preset or "GPT", argparse.Namespace(**_with_preset(args, sizes)), {**experts, **section}
        )
    return model if model.autoep else with_top_k(model, args.topk or _top_k_of(given))


def _with_preset(args: argparse.Namespace, sizes: dict[str, Any]) -> dict[str, Any]:
    preset = PRESETS.get(args.preset or "")
    return {**dict.fromkeys(_NEEDED), **({} if preset is None else preset.arguments), **sizes}


def _top_k_of(section: Mapping[str, Any]) -> int | None:
    """Routed experts per token without a shared expert, from those that a section has beside its own."""
    top_k = section.get("top_k")
    if not isinstance(top_k, int):
        return None
    return top_k if section.get("architecture") in ("topk", "pipelined_topk") else top_k + 1


def with_top_k(model: Model, top_k: int | None) -> Model:
    """The model with other numbers of routed experts per token; None: as it is."""
    if top_k is None:
        return model
    stages = [
        each
        if each.experts is None
        else each.model_copy(update={"experts": each.experts.model_copy(update={"top_k": top_k})})
        for each in model.stages
    ]
    return model.model_copy(update={"stages": tuple(stages)})


def fixed_of(args: argparse.Namespace, whole: Mapping[str, Any], model: Model, world: int) -> Fixed:
    """What is decided: by a flag, else by the DeepSpeed JSON; "auto" there is left to the search."""
    experts = (
        _at(whole, "expert_parallel", "autoep_size") if model.autoep else _at(whole, "scmoe", "expert_parallel_size")
    )
    micro = args.micro_batch or _at(whole, "train_micro_batch_size_per_gpu")
    tensor = args.tensor_parallel
    stage = args.zero_stage if args.zero_stage is not None else _at(whole, "zero_optimization", "stage")
    granularity = args.recompute_granularity
    return Fixed(
        batch=args.global_batch_size or _batch_of(whole, micro, world // (tensor or 1)) or _usual_batch(model, world),
        precision=args.precision or _precision_of(whole),
        expert_parallel=args.expert_parallel or experts,
        tensor_parallel=tensor,
        zero_stage=stage,
        micro_batch=micro,
        recompute=False if granularity == "none" else granularity,
        overlap_comm=(whole.get("zero_optimization") or {}).get("overlap_comm"),
    )


def _at(whole: Mapping[str, Any], *path: str) -> int | None:
    """A whole number of the JSON; None where it is not there, or "auto"."""
    value: Any = whole
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArgumentError(f"{'.'.join(path)} = {json.dumps(value)}: must be a whole number")
    return value


def _batch_of(whole: Mapping[str, Any], micro: int | None, data_parallel: int) -> int | None:
    whole_batch, accumulation = _at(whole, "train_batch_size"), _at(whole, "gradient_accumulation_steps")
    if whole_batch is None and micro and accumulation:
        return micro * accumulation * data_parallel
    return whole_batch


def _usual_batch(model: Model, world: int) -> int:
    """As many samples as in the shipped files, and a whole number for every rank."""
    samples = _IMAGES if model.images else _TOKENS / model.stages[0].tokens
    return max(1, math.ceil(samples / world)) * world


def _precision_of(whole: Mapping[str, Any]) -> Any:
    for name in ("bf16", "fp16"):
        section = whole.get(name)
        if isinstance(section, Mapping) and section.get("enabled"):
            return name
    return "fp32" if whole else "bf16"
