"""The "optimizer" and "scheduler" sections: which types there are, and which parameters each takes.

Both are read off the classes that DeepSpeed would build, and tried on a parameter of one number.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from scmoe_ds.config.deepspeed_json import offloads, section
from scmoe_ds.config.deepspeed_keys import quiet
from scmoe_ds.config.deepspeed_values import broken_rule
from scmoe_ds.config.messages import fail, nearest, unknown_key

_OF_DEEPSPEED = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}
"""Parameters of Adam and AdamW that DeepSpeed takes out before it builds the optimizer."""

_OF_MUON = {
    "lr": 1e-3,
    "muon_lr": 1e-3,
    "adam_lr": 1e-3,
    "momentum": 0.95,
    "weight_decay": 0.0,
    "ns_method": "",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
}

_OF_MUP = {"muadam": "MuAdam", "muadamw": "MuAdamW", "musgd": "MuSGD"}
"""Optimizers that DeepSpeed takes from the package mup."""


def check_optimizer(whole: Mapping[str, Any]) -> Iterator[object]:
    """What is wrong with the optimizer and the scheduler, a line each. Their sections are objects, or absent."""
    zero = section(whole, "zero_optimization")
    if isinstance(whole.get("optimizer"), Mapping):
        yield from _check_optimizer(whole["optimizer"], whole, bool(zero.get("stage")), offloads(whole))
    if isinstance(whole.get("scheduler"), Mapping):
        wrapped = bool(zero.get("stage")) or any(section(whole, each).get("enabled") for each in ("bf16", "fp16"))
        yield from _check_scheduler(whole["scheduler"], wrapped)


def _check_optimizer(own: Mapping[str, Any], whole: Mapping[str, Any], zero: bool, on_cpu: bool) -> Iterator[object]:
    name, params = own.get("type"), section(own, "params")
    if not isinstance(name, str):
        yield 'optimizer.type is missing: name an optimizer, such as "AdamW"'
        return
    kind = _optimizer_class(name, params, on_cpu)
    if kind is None:
        others = [each for each in _classes(torch.optim, torch.optim.Optimizer) if each.lower() == name.lower()]
        near = nearest(name, ["Adam", "AdamW", "Lion", "Lamb", "Muon", *others])
        yield fail("optimizer.type", name, f'no optimizer of DeepSpeed or torch; use "{near or "AdamW"}"')
        return
    if isinstance(kind, str):
        yield fail("optimizer.type", name, kind)
        return
    if "max_grad_norm" in params:
        yield fail(
            "optimizer.params.max_grad_norm",
            params["max_grad_norm"],
            'DeepSpeed clips by the top-level key; write "gradient_clipping" instead',
        )
        params = {key: value for key, value in params.items() if key != "max_grad_norm"}
    extra = _OF_DEEPSPEED if name.lower() in ("adam", "adamw") else {}
    valid = _OF_MUON if name.lower() == "muon" else {**_defaults(kind, 1), **extra}
    lines = list(_check_params("optimizer.params", params, valid))
    yield from lines
    if not lines:
        # DeepSpeed's own classes compile kernels when they are built; AdamW has the same rules.
        tried = kind if kind.__module__.startswith("torch.") else torch.optim.AdamW
        kept = {key: value for key, value in params.items() if key in _defaults(tried, 1) and key != "capturable"}
        yield from _try("optimizer.params", kept, lambda params: tried(_groups(), **params).step())
    if zero and kind is torch.optim.Adagrad:
        yield fail(
            "optimizer.type",
            name,
            'DeepSpeed puts all parameter groups into one, and then misses the experts; use "AdamW"',
        )
    elif zero and kind not in ZERO_SUPPORTED_OPTIMIZERS and not whole.get("zero_allow_untested_optimizer"):
        yield fail(
            "optimizer.type",
            name,
            'DeepSpeed has not tested it under ZeRO; set "zero_allow_untested_optimizer": true, or use "AdamW"',
        )


def _optimizer_class(name: str, params: Mapping[str, Any], on_cpu: bool) -> Any:
    """The class that DeepSpeed builds; a sentence where it cannot be built; None where there is none of this name."""
    known = name.lower()
    if known in ("adam", "adamw"):
        if params.get("torch_adam"):
            return torch.optim.AdamW if known == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
        return DeepSpeedCPUAdam if on_cpu else FusedAdam
    if known == "adagrad":
        return DeepSpeedCPUAdagrad if on_cpu else torch.optim.Adagrad
    if known == "lion":
        return DeepSpeedCPULion if on_cpu else FusedLion
    if known == "lamb":
        return FusedLamb
    if known == "muon":
        return torch.optim.AdamW  # its own class compiles kernels when it is imported
    if known in _OF_MUP:
        if importlib.util.find_spec("mup") is None:
            return 'needs the package mup; pip install mup, or use "AdamW"'
        return getattr(importlib.import_module("mup"), _OF_MUP[known])
    return _classes(torch.optim, torch.optim.Optimizer).get(name)


def _check_scheduler(own: Mapping[str, Any], wrapped: bool) -> Iterator[object]:
    name, params = own.get("type"), section(own, "params")
    if not isinstance(name, str):
        yield 'scheduler.type is missing: name a schedule, such as "WarmupCosineLR"'
        return
    classes = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    classes |= {each: getattr(lr_schedules, each) for each in lr_schedules.VALID_LR_SCHEDULES}
    if name not in classes:
        near = nearest(name, classes)
        yield fail("scheduler.type", name, f'no schedule of DeepSpeed or torch; use "{near or "WarmupCosineLR"}"')
        return
    if wrapped and name not in lr_schedules.VALID_LR_SCHEDULES:
        yield fail(
            "scheduler.type",
            name,
            "torch's schedules refuse the optimizer that DeepSpeed wraps for ZeRO, "
            f"bf16 or fp16; use one of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
        )
        return
    if "params" not in own:
        yield "scheduler.params is missing: write {} for the defaults of the schedule"
    valid = _defaults(classes[name], 1)
    missing = [key for key, default in valid.items() if default is inspect.Parameter.empty and key not in params]
    for key in missing:
        yield f"scheduler.params.{key} is missing: {name} needs it"
    # The length of the run is filled in later.
    numbers = {key: 10**6 if key == "total_num_steps" and value == "auto" else value for key, value in params.items()}
    lines = list(_check_params("scheduler.params", numbers, valid))
    yield from lines
    if not lines and not missing and not any(isinstance(value, list) for value in numbers.values()):

        def run(params: Mapping[str, Any]) -> None:
            scheduler = classes[name](torch.optim.AdamW(_groups()), **params)
            for _ in range(2):
                scheduler.optimizer.step()
                scheduler.step()

        yield from _try("scheduler.params", numbers, run)
    for key, value in numbers.items():
        lowest = 1 if key == "total_num_steps" else 0 if key.endswith(("_lr", "_ratio")) else None
        if lowest is not None and isinstance(value, (int, float)) and value < lowest:
            yield fail(f"scheduler.params.{key}", value, f"must be at least {lowest}")
    warmup = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
    if params.get("warmup_type", warmup[0]) not in warmup:
        yield fail("scheduler.params.warmup_type", params["warmup_type"], f"must be one of {', '.join(warmup)}")


def _check_params(path: str, params: Mapping[str, Any], valid: Mapping[str, Any]) -> Iterator[object]:
    """Names, and types: each value must have the type of its default."""
    for key, value in params.items():
        default = valid.get(key)
        where = f"{path}.{key}"
        if key not in valid:
            yield unknown_key(where, key, list(valid))
        elif isinstance(default, tuple):
            if not isinstance(value, list) or len(value) != len(default) or any(broken_rule(x, float) for x in value):
                yield fail(where, value, f"must be a list of {len(default)} numbers, such as {list(default)}")
        elif isinstance(value, list) and isinstance(default, float):
            yield from (fail(where, value, rule) for x in value if (rule := broken_rule(x, float)))
        else:
            if rule := broken_rule(value, _holds(default, value)):
                yield fail(where, value, rule)


def _holds(default: Any, value: Any) -> Any:
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, (int, float)) or isinstance(value, str):  # no parameter without a default is a string
        return float
    return Any


def _try(path: str, params: Mapping[str, Any], build: Callable[[Mapping[str, Any]], object]) -> Iterator[object]:
    """Builds it; a parameter without which that works is the one to name."""
    if (message := _error_of(build, params)) is None:
        return
    for key, value in params.items():
        if _error_of(build, {other: each for other, each in params.items() if other != key}) is None:
            yield fail(f"{path}.{key}", value, f"{message}; change it")
            return
    yield fail(path, params, f"{message}; change it")


def _error_of(build: Callable[[Mapping[str, Any]], object], params: Mapping[str, Any]) -> str | None:
    try:
        with quiet():
            build(params)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _groups() -> list[dict[str, Any]]:
    """Two groups, as every model with experts has at least, of a parameter each."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for each in parameters:
        each.grad = torch.zeros(1)
    return [{"params": [each]} for each in parameters]


def _defaults(kind: type, first: int) -> dict[str, Any]:
    """Parameters of a constructor after the first ones, with their defaults."""
    parameters = list(inspect.signature(kind).parameters.values())[first:]
    return {each.name: each.default for each in parameters if each.name != "last_batch_iteration"}


def _classes(module: Any, base: type) -> dict[str, Any]:
    found = {name: each for name, each in vars(module).items() if isinstance(each, type) and issubclass(each, base)}
    return {name: each for name, each in found.items() if each is not base and not name.startswith("_")}
