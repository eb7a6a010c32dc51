"""DeepSpeed's own settings that ScMoE cannot run with, or that its user would wonder about.

Better a sentence here than DeepSpeed's assertion after minutes of start-up, or a key that has no effect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch

from scmoe_ds.config_errors import ScMoEConfigError, fail

logger = logging.getLogger("scmoe_ds")


def check_settings(whole: Mapping[str, Any]) -> None:
    """What the file alone decides.

    Raises:
        ScMoEConfigError: a setting that native MoE layers or these models do not run with.
    """
    zero = _section(whole, "zero_optimization")
    if zero.get("stage") == 3:
        raise fail("zero_optimization.stage", 3, "DeepSpeed's MoE layers do not run under ZeRO-3; use stage 1 or 2")
    if _section(zero, "offload_param").get("device", "none") != "none":
        raise fail("zero_optimization.offload_param", zero["offload_param"],
                   "offloads parameters under ZeRO-3 only; remove it (offload_optimizer works)")  # fmt: skip
    if _section(zero, "offload_optimizer").get("device") == "nvme":
        raise fail("zero_optimization.offload_optimizer.device", "nvme", 'works under ZeRO-3 only; use "cpu"')
    if _section(whole, "compile").get("deepcompile"):
        raise fail("compile.deepcompile", True, "reorders collectives that ScMoE schedules itself; remove it")
    if "expert_parallel" in whole:
        raise ScMoEConfigError(
            '"expert_parallel" (DeepSpeed AutoEP) and "scmoe" both replace MoE layers; remove one of them'
        )
    if whole.get("pipeline"):
        raise fail("pipeline", whole["pipeline"], "a shortcut may not cross a pipeline stage: "
                   "remove the section, and use expert and tensor parallelism")  # fmt: skip
    for key, value in _section(whole, "activation_checkpointing").items():
        if value:
            raise fail(f"activation_checkpointing.{key}", value, "has no effect on these models; remove the section "
                       "and use --recompute-granularity selective or full (in a model of your own: "
                       "GPT(…, recompute=…))")  # fmt: skip


def check_accelerator(whole: Mapping[str, Any]) -> None:
    """What this machine decides.

    Raises:
        ScMoEConfigError: a precision that the accelerator does not compute in.
    """
    accelerator = deepspeed.get_accelerator()
    for precision, supported, other in (("fp16", accelerator.is_fp16_supported, "bf16"),
                                        ("bf16", accelerator.is_bf16_supported, "fp16")):  # fmt: skip
        if _section(whole, precision).get("enabled") and not supported():
            raise fail(f"{precision}.enabled", True, f'the accelerator "{accelerator.device_name()}" does not support '
                       f"it; use {other}, or remove the section for fp32")  # fmt: skip


def check_model_and_optimizer(whole: Mapping[str, Any], model: object, optimizer: object) -> None:
    """What is handed to `initialize`.

    Raises:
        ScMoEConfigError: a pipeline, no optimizer for ZeRO, or one of the user's that offloading does not accept.
    """
    if isinstance(model, deepspeed.pipe.PipelineModule):
        raise ScMoEConfigError("the model is a deepspeed.pipe.PipelineModule: a shortcut may not cross a pipeline "
                               "stage; hand over the plain module")  # fmt: skip
    zero = _section(whole, "zero_optimization")
    if optimizer is None and zero.get("stage") and not whole.get("optimizer"):
        raise fail("zero_optimization.stage", zero["stage"], 'ZeRO needs an optimizer: add an "optimizer" section to '
                   "the DeepSpeed JSON, hand optimizer=… to initialize, or set stage 0 to evaluate only")  # fmt: skip
    offloads = _section(zero, "offload_optimizer").get("device", "none") != "none"
    if optimizer is not None and offloads and whole.get("zero_force_ds_cpu_optimizer", True):
        raise ScMoEConfigError("zero_optimization.offload_optimizer with an optimizer of your own: DeepSpeed wants its "
                               'CPU Adam there; set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the '
                               "DeepSpeed JSON")  # fmt: skip


def warn(whole: Mapping[str, Any]) -> None:
    """Logs settings that run, but not as their user expects."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and torch.cuda.is_available():
        logger.warning("CUDA_DEVICE_MAX_CONNECTIONS=1 puts all streams in one queue: communication and computation "
                       "take turns. Unset it")  # fmt: skip
    zero = _section(whole, "zero_optimization")
    if not zero.get("stage"):
        logger.warning("zero_optimization.stage is 0: DeepSpeed's gradient norm, and so clipping, is wrong for MoE "
                       "models there; set stage 1 or 2")  # fmt: skip
    optimizer = _section(whole, "optimizer")
    offloads = _section(zero, "offload_optimizer").get("device", "none") != "none"
    on_cpu = offloads or deepspeed.get_accelerator().device_name() == "cpu"
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if on_cpu and is_adam and not _section(optimizer, "params").get("torch_adam"):
        logger.warning("optimizer.params.torch_adam is not true: the first start compiles DeepSpeed's Adam for the "
                       "CPU (a minute or two, with g++ and ninja). Set it to do without")  # fmt: skip


def _section(whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = whole.get(key, {})
    return value if isinstance(value, Mapping) else {}
