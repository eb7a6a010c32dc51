"""A DeepSpeed JSON as method and layout. Read as it is: neither torch nor DeepSpeed is needed, and defaults are theirs.

Values that contradict each other or the number of GPUs are errors here. What a training refuses beyond that,
`scmoe check` finds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe_ds.errors import PlanError
from scmoe_ds.simulate.json_files import finding, nearest, read_object
from scmoe_ds.simulate.layout import Layout, Precision
from scmoe_ds.simulate.method import AUTOEP, DEEPSPEED_TOPK, PIPELINED, SHARED_OVERLAPPED, Method

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SECTION = {
    "architecture": str,
    "position": str,
    "join": str,
    "merge": str,
    "dispatch": str,
    "shortcut_norm": str,
    "top_k": int,
    "expert_parallel_size": int,
    "shortcut_distance": int,
    "expert_partition": int,
    "moe_shared_expert_intermediate_size": int,
    "min_capacity": int,
    "capacity_factor": float,
    "drop_tokens": bool,
    "post_norm": bool,
    "expert_tensor_parallelism": bool,
}
"""Fields of the "scmoe" section that a simulation reads, beside those of sizes."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": ("as_is", "scmoe", "topk", "shared_expert", "pipelined_topk", "overlapped_shared_expert"),
    "position": ("pos1", "pos2", "pos3"),
    "join": ("end", "late"),
    "merge": ("add", "cg1", "cg2"),
    "dispatch": ("exact", "padded"),
    "shortcut_norm": ("own", "shared"),
}
_MOST_CHUNKS = 8


@dataclass(frozen=True)
class Settings:
    """What a DeepSpeed JSON says of a training.

    Attributes:
        method: how its MoE layers run; None: it has neither a "scmoe" nor an "expert_parallel" section.
        layout: what it leaves open has DeepSpeed's default.
        section: the "scmoe" section, raw: sizes of experts are a model's.
    """

    method: Method | None
    layout: Layout
    section: Mapping[str, Any]


def read_settings(
    source: str | Path | Mapping[str, Any], world: int, tensor_parallel: int = 1, recompute: Any = False
) -> Settings:
    """
    Args:
        source: a path, or the parsed JSON.
        world: GPUs.
        tensor_parallel, recompute: of the flags, as in `Layout`; the JSON's own go before the defaults.

    Raises:
        PlanError: a value that contradicts another, or the number of GPUs, by its path.
    """
    whole = read_object(source, PlanError) if isinstance(source, (str, Path)) else dict(source)
    for name in ("zero_optimization", "bf16", "fp16", "expert_parallel", "tensor_parallel"):
        _object(whole, name)
    section = _object(whole, "scmoe")
    fields = _fields(section)
    own = _number(whole, "tensor_parallel.autotp_size") or 1
    if own > 1 and tensor_parallel > 1 and own != tensor_parallel:
        rule = f"--tensor-model-parallel-size says {tensor_parallel}; remove one of them"
        raise PlanError(finding("tensor_parallel.autotp_size", own, rule))
    tensor = max(own, tensor_parallel)
    if world % tensor:
        raise PlanError(f"--tensor-model-parallel-size {tensor}: must divide the world size {world}; change it")
    autoep = _at(whole, "expert_parallel.enabled") is True
    path = "expert_parallel.autoep_size" if autoep else "scmoe.expert_parallel_size"
    experts = _number(whole, path) or 1
    if world % experts:
        raise PlanError(finding(path, experts, f"must divide the world size {world}; change it, or take more GPUs"))
    micro, steps = _batch_sizes(whole, world // tensor)
    layout = Layout(
        world=world,
        expert_parallel=experts,
        tensor_parallel=tensor,
        zero_stage=_zero_stage(whole),
        micro_batch=micro,
        accumulation=steps,
        precision=_precision(whole),
        recompute=recompute or _at(whole, "activation_checkpointing.enabled") is True,
        hierarchical=section.get("all_to_all") == "hierarchical",
        expert_tensor_parallel=bool(fields.get("expert_tensor_parallelism", False)),
        reduce_bucket=_number(whole, "zero_optimization.reduce_bucket_size") or 500_000_000,
        allgather_bucket=_number(whole, "zero_optimization.allgather_bucket_size") or 500_000_000,
        states=_states(whole),
    )
    return Settings(_method(section, fields, autoep, "scmoe" in whole), layout, section)


def _method(section: Mapping[str, Any], fields: Mapping[str, Any], autoep: bool, ours: bool) -> Method | None:
    if not ours:
        return AUTOEP if autoep else None
    architecture = fields.get("architecture", "as_is" if autoep else "scmoe")
    scheduled = architecture not in ("topk", "shared_expert")
    kinds = {"topk": DEEPSPEED_TOPK, "pipelined_topk": PIPELINED, "as_is": PIPELINED}
    base = kinds.get(architecture, SHARED_OVERLAPPED)
    overlap = _object(section, "overlap", "scmoe.")
    chunks = overlap.get("num_chunks", "auto")
    on = scheduled and overlap.get("enabled", True) is not False
    position = fields.get("position", "pos1" if autoep else "pos2")
    shortcut = architecture == "scmoe"
    return Method(
        name=_name(architecture, position, fields.get("join")),
        architecture="scmoe" if shortcut else base.architecture,
        layer=base.layer if scheduled else "deepspeed",
        routed=fields.get("top_k", None if base.architecture == "topk" or autoep else 1),
        dispatch=fields.get("dispatch", "exact") if scheduled else "padded",
        position=position if shortcut else None,
        join="late" if fields.get("join") == "late" else "block",
        overlap=on,
        most_chunks=(chunks if isinstance(chunks, int) else _MOST_CHUNKS) if on else 1,
        merge=fields.get("merge", "add" if autoep else "cg1" if shortcut else "cg2"),
        shortcut_norm=fields.get("shortcut_norm", "shared" if autoep else "own"),
        post_norm=bool(fields.get("post_norm", False)),
        shortcut_distance=fields.get("shortcut_distance", 1),
        shared_hidden=fields.get("moe_shared_expert_intermediate_size", 0),
        adds_shared=not autoep or _at(section, "adapt.shared_expert") is not None,
        capacity_factor=float(fields.get("capacity_factor", 2.0)),
        min_capacity=fields.get("min_capacity", 4),
        drop_tokens=fields.get("drop_tokens", True) is True,
        parts=fields.get("expert_partition", 1),
    )


def _name(architecture: str, position: str, join: str | None) -> str:
    if architecture != "scmoe":
        return {"as_is": "as it is", "topk": DEEPSPEED_TOPK.name}.get(architecture, architecture.replace("_", " "))
    return f"ScMoE Pos-{position[-1]}" + (", late join" if join == "late" else "")


def _fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value, each of its kind."""
    found: dict[str, Any] = {}
    for name, kind in _SECTION.items():
        value = section.get(name)
        if value is None or value == "auto":
            continue
        if name == "architecture" and value == "dgmoe":
            raise PlanError(finding("scmoe.architecture", value, "its two gates are not simulated; use another"))
        choices = _CHOICES.get(name)
        if choices and value not in choices:
            rule = f"must be one of {', '.join(choices)}; {nearest(str(value), choices)}"
            raise PlanError(finding(f"scmoe.{name}", value, rule))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in (int, float) and not (is_number and value == kind(value) and value >= (name != "min_capacity")):
            least = 0 if kind is float or name == "min_capacity" else 1
            whole = "a whole number" if kind is int else "a number"
            if not (kind is float and is_number and value > 0):
                raise PlanError(finding(f"scmoe.{name}", value, f"must be {whole} of at least {least}"))
        if name == "expert_tensor_parallelism" and value == "partition":
            rule = (
                "is not simulated by this name; write what it stands for: expert_partition and expert_parallel_size "
                "times the tensor-parallel size"
            )
            raise PlanError(finding(f"scmoe.{name}", value, rule))
        if kind is bool and not isinstance(value, bool):
            raise PlanError(finding(f"scmoe.{name}", value, "must be true or false"))
        found[name] = value
    return found


def _batch_sizes(whole: Mapping[str, Any], data_parallel: int) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps: any two of DeepSpeed's three keys give the third."""
    total, micro, steps = (_number(whole, key) for key in _BATCH)
    if micro is None:
        steps = steps or 1
        micro = 1 if total is None else max(total // (steps * data_parallel), 1)
    elif steps is None:
        steps = max(total // (micro * data_parallel), 1) if total else 1
    product = micro * steps * data_parallel
    if total is not None and total != product:
        raise PlanError(
            f"{_BATCH[0]} = {total}: must equal {_BATCH[1]} ({micro}) * {_BATCH[2]} ({steps}) * data-parallel ranks "
            f"({data_parallel}) = {product}; leave one of the three out"
        )
    return micro, steps


def _zero_stage(whole: Mapping[str, Any]) -> int:
    stage = _at(whole, "zero_optimization.stage")
    if stage is None:
        return 0
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise PlanError(finding("zero_optimization.stage", stage, "must be 0, 1, 2 or 3"))
    for what in ("offload_optimizer", "offload_param"):
        if _at(whole, f"zero_optimization.{what}.device") not in (None, "none"):
            raise PlanError(
                finding(
                    f"zero_optimization.{what}.device",
                    _at(whole, f"zero_optimization.{what}.device"),
                    "what is kept out of the GPU's memory is not simulated; remove it",
                )
            )
    return int(stage)


def _precision(whole: Mapping[str, Any]) -> Precision:
    on = [name for name in ("bf16", "fp16") if _at(whole, f"{name}.enabled") is True]
    if len(on) > 1:
        raise PlanError("bf16.enabled = true: fp16.enabled is true as well; set one of them")
    return "bf16" if on == ["bf16"] else "fp16" if on else "fp32"


def _states(whole: Mapping[str, Any]) -> int:
    """fp32 values per parameter that DeepSpeed's and torch's optimizers keep."""
    kind = str(_at(whole, "optimizer.type") or "AdamW").lower()
    if kind == "sgd":
        return 1 if _at(whole, "optimizer.params.momentum") else 0
    return 1 if kind in ("lion", "adagrad", "muon") else 2


def _number(whole: Mapping[str, Any], path: str) -> int | None:
    """A count; None where there is none, or "auto"."""
    value = _at(whole, path)
    if value is None or value == "auto":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e8
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{path} = {json.dumps(value)}: must be an integer of at least 1")
    return value


def _object(whole: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    value = whole.get(name, {})
    if not isinstance(value, Mapping):
        raise PlanError(finding(f"{prefix}{name}", value, "must be a JSON object"))
    return value


def _at(whole: Any, path: str) -> Any:
    for key in path.split("."):
        whole = whole.get(key) if isinstance(whole, Mapping) else None
    return whole
