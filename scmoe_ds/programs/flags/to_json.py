"""How flags and the DeepSpeed JSON meet.

A flag sets what the JSON leaves out, or calls "auto"; a flag and a JSON that disagree are an error that names both.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from typing import Any

from scmoe_ds.config.deepspeed_json import load_deepspeed_json
from scmoe_ds.config.deepspeed_settings import check_program
from scmoe_ds.config.loading import LoadedConfig, load
from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.distill import merge_distill
from scmoe_ds.programs.flags.megatron import (
    JSON_FLAGS,
    LENGTH_FLAGS,
    MLP_TYPES,
    SCHEDULE_FLAGS,
    SECTION_FLAGS,
    dest_of,
    section_flag,
)
from scmoe_ds.programs.flags.router import merge_router


class _Merged:
    """A DeepSpeed JSON with values of flags. A flag sets what the JSON leaves out, or calls "auto".

    Attributes:
        whole: the JSON so far.
        source: its file, for the error.
    """

    def __init__(self, whole: dict[str, Any], source: str) -> None:
        self.whole: dict[str, Any] = copy.deepcopy(whole)
        self.source = source
        self._flags: dict[str, str] = {}  # which have set a path
        self._conflicts: dict[str, str] = {}

    def set(self, path: str, value: Any, flag: str) -> None:
        """Sets a key; notes a flag that contradicts the JSON, once."""
        *parents, key = path.split(".")
        target = self.whole
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                return  # the check of the JSON explains it
        before = target.get(key)
        if before in (None, "auto"):
            target[key] = value
            self._flags[path] = flag
        elif not _same(before, value):
            asked = f"{flag} asks for {path} = {json.dumps(value)}"
            other = f"{self._flags[path]} asks for" if path in self._flags else f"{self.source} has"
            self._conflicts.setdefault(flag, f"{asked}, but {other} {json.dumps(before)}")

    def finish(self) -> dict[str, Any]:
        """The whole JSON.

        Raises:
            ArgumentError: flags that contradict the JSON, all of them.
        """
        if self._conflicts:
            remedy = "remove one of them" if len(self._conflicts) == 1 else "remove one of each"
            raise ArgumentError("; ".join([*self._conflicts.values(), remedy]))
        return self.whole


def read_json(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON that the flags name, with what flags set; those of the schedule are left to `merge_schedule`.

    Raises:
        ArgumentError, ScMoEConfigError: no JSON, or flags that contradict it.
    """
    merged = _Merged(load_deepspeed_json(args.deepspeed_config), args.deepspeed_config)
    _merge_json_flags(merged, args)
    _merge_section_flags(merged, args)
    return merged.finish()


def load_merged(args: argparse.Namespace, whole: dict[str, Any]) -> LoadedConfig:
    """Checks all of the DeepSpeed JSON and its "scmoe" section.

    Raises:
        ScMoEConfigError: a setting that its user can correct.
    """
    _fill_in_schedule(whole, args.train_iters)
    config = load(whole)
    check_program(whole)
    return config


def _merge_section_flags(merged: _Merged, args: argparse.Namespace) -> None:
    for name, path in SECTION_FLAGS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if name == "mlp_type":
            value = MLP_TYPES[value]
        if name == "num_experts":
            if 1 in value:
                raise ArgumentError(
                    "--num-experts 1: this is Megatron-DeepSpeed's word for a dense MLP, which this program does not "
                    "train; use at least 2"
                )
            value = value[0] if len(value) == 1 else value
        merged.set(f"scmoe.{path}", value, section_flag(name))

    def put(path: str, value: Any, flag: str) -> None:
        merged.set(f"scmoe.{path}", value, flag)

    merge_router(args, merged.whole, put)
    merge_distill(args, merged.whole.get("scmoe"), put)


def _merge_json_flags(merged: _Merged, args: argparse.Namespace) -> None:
    has_optimizer = "optimizer" in merged.whole
    given = {flag: value for flag in JSON_FLAGS if (value := getattr(args, dest_of(flag))) not in (None, "")}
    betas = [given.pop("--adam-beta1", None), given.pop("--adam-beta2", None)]
    for flag, value in given.items():
        path, kind = JSON_FLAGS[flag]
        merged.set(path, kind[value] if isinstance(kind, dict) else value, flag)
    if betas != [None, None]:
        value = [default if beta is None else beta for beta, default in zip(betas, (0.9, 0.999), strict=True)]
        merged.set("optimizer.params.betas", value, "--adam-beta1 and --adam-beta2")
    if "--tensorboard-dir" in given:
        merged.set("tensorboard.enabled", True, "--tensorboard-dir")
        merged.whole["tensorboard"].setdefault("job_name", "")
    if "--wandb-project" in given:
        merged.set("wandb.enabled", True, "--wandb-project")
    if not has_optimizer and "optimizer" in merged.whole:
        _complete_optimizer(merged.whole["optimizer"])


def _complete_optimizer(section: dict[str, Any]) -> None:
    """Megatron's defaults, where flags alone make the section."""
    params = section.setdefault("params", {})
    params.setdefault("weight_decay", 0.01)
    if section.setdefault("type", "AdamW") == "AdamW":
        params.setdefault("torch_adam", True)
    else:
        params.setdefault("momentum", 0.9)


def set_length(args: argparse.Namespace, whole: dict[str, Any]) -> None:
    """--train-iters from --train-samples and --train-tokens; the shortest holds.

    Raises:
        ArgumentError: one of them without the batch size of all ranks.
    """
    lengths = [_steps(args, flag, whole) for flag in LENGTH_FLAGS if getattr(args, dest_of(flag)) is not None]
    if lengths:
        args.train_iters = min([*lengths, *([] if args.train_iters is None else [args.train_iters])])


def merge_schedule(whole: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON with the "scheduler" section that Megatron's flags for the learning rate describe.

    Raises:
        ArgumentError: a style that DeepSpeed lacks, no learning rate, or a JSON that has another schedule.
    """
    given = [flag for flag in SCHEDULE_FLAGS if getattr(args, dest_of(flag)) is not None]
    if not given:
        return whole
    merged = _Merged(whole, args.deepspeed_config)
    section = whole.get("optimizer")
    params = section.get("params") if isinstance(section, dict) else None
    lr = params.get("lr") if isinstance(params, dict) else None
    if not isinstance(lr, (int, float)) or not lr:
        raise ArgumentError(f"{given[0]}: needs a learning rate; give --lr, or optimizer.params.lr in {merged.source}")
    _check_schedule_flags(args, lr)
    lengths = {flag: _steps(args, flag, whole) for flag in given if flag.endswith(("-iters", "-samples", "-tokens"))}
    total = next((steps for flag, steps in lengths.items() if "decay" in flag), args.train_iters)
    warmup = next((steps for flag, steps in lengths.items() if "warmup" in flag), 0)
    if args.lr_warmup_fraction is not None:
        warmup = int(args.lr_warmup_fraction * total)
    own = {"warmup_num_steps": max(warmup, 1), "warmup_type": "linear"}
    floor, style = args.min_lr or 0.0, args.lr_decay_style or "linear"
    if style == "cosine":
        kind, own = "WarmupCosineLR", {**own, "total_num_steps": total, "cos_min_ratio": floor / lr}
    elif style == "linear":
        kind, own = "WarmupDecayLR", {**own, "total_num_steps": total, "warmup_min_lr": floor, "warmup_max_lr": lr}
    elif style == "constant":
        kind, own = "WarmupLR", {**own, "warmup_min_lr": 0.0, "warmup_max_lr": lr}
    else:
        raise ArgumentError(f"--lr-decay-style {style}: DeepSpeed has no such schedule; use cosine, linear or constant")
    flags = ", ".join(given)
    merged.set("scheduler.type", kind, flags)
    for key, value in own.items():
        merged.set(f"scheduler.params.{key}", value, flags)
    return merged.finish()


def _check_schedule_flags(args: argparse.Namespace, lr: float) -> None:
    if args.min_lr is not None and not 0 <= args.min_lr <= lr:
        raise ArgumentError(f"--min-lr {args.min_lr}: must be in 0 … {lr}, the learning rate")


def _steps(args: argparse.Namespace, flag: str, whole: dict[str, Any]) -> int:
    """Iterations that a flag in iterations, samples or tokens means."""
    value = getattr(args, dest_of(flag))
    if flag.endswith("-iters"):
        return int(value)
    batch = whole.get("train_batch_size")
    if not isinstance(batch, int) or batch < 1:
        raise ArgumentError(
            f"{flag} {value}: needs the batch size of all ranks; give --global-batch-size, or "
            "train_batch_size in the DeepSpeed JSON"
        )
    if flag.endswith("-samples"):
        return int(value // batch)
    return math.ceil(value / (batch * (getattr(args, "seq_length", None) or 1)))


def _same(before: Any, value: Any) -> bool:
    if isinstance(before, str) and isinstance(value, str):
        return before.lower() == value.lower()
    if isinstance(before, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(before, value)
    return bool(before == value)


def _fill_in_schedule(whole: dict[str, Any], train_iters: int) -> None:
    """ "total_num_steps": "auto" follows --train-iters, as "auto" values do in Hugging Face's DeepSpeed configs."""
    scheduler = whole.get("scheduler")
    if not isinstance(scheduler, dict):
        return
    params = scheduler.get("params")
    if isinstance(params, dict) and params.get("total_num_steps") == "auto":
        whole["scheduler"] = {**scheduler, "params": {**params, "total_num_steps": max(train_iters, 1)}}
