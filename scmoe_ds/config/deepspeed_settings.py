"""Checks of DeepSpeed's part of the JSON: of the file alone, for a program, on a machine, with a model."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from scmoe_ds.config.deepspeed_json import at, offloads, section
from scmoe_ds.config.deepspeed_optimizers import check_optimizer
from scmoe_ds.config.deepspeed_refused import refusals
from scmoe_ds.config.deepspeed_values import check_keys
from scmoe_ds.config.expert_parallel import uses_autoep
from scmoe_ds.config.messages import fail
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.parallel.nccl import allocator_advice

logger = logging.getLogger("scmoe_ds")


def check_settings(whole: Mapping[str, Any], of_section: Collection[str]) -> list[str]:
    """What is wrong with DeepSpeed's part of the JSON, as far as the file alone decides, a line each.

    Args:
        of_section: keys of the "scmoe" section, which some write beside it.
    """
    if not whole.keys() - {"scmoe"}:
        return []
    lines: dict[str, str] = {}
    for line in map(str, [*refusals(whole), *check_keys(whole, of_section), *check_optimizer(whole)]):
        lines.setdefault(re.split(r"[ :]", line, maxsplit=1)[0], line)  # one for each key
    of_all = lines.pop("the", None)  # what DeepSpeed says of the whole JSON, if no key is to blame
    return list(lines.values()) or ([of_all] if of_all else [])


def check_program(whole: Mapping[str, Any]) -> None:
    """What the training programs of this package do by themselves, other than a loop of one's own.

    Raises:
        ScMoEConfigError: a setting that they would ignore or break, or a monitor that cannot write.
    """
    lines = []
    if not whole.get("optimizer"):
        lines.append(ScMoEConfigError('optimizer is missing: training needs one; add {"type": "AdamW", "params": {…}}'))
    if uses_autoep(whole):
        rule = (
            "is for Hugging Face models (docs/from_hugging_face.md); here scmoe.expert_parallel_size says it; remove it"
        )
        lines.append(fail("expert_parallel", whole["expert_parallel"], rule))
    if whole.get("managed_gradient_accumulation") is False:
        rule = "the training loop steps once per micro-batch, and leaves the accumulation to DeepSpeed; remove it"
        lines.append(fail("managed_gradient_accumulation", False, rule))
    writes = {"tensorboard": "output_path", "csv_monitor": "output_path", "flops_profiler": "output_file"}
    for name, key in writes.items():
        path = at(whole, f"{name}.{key}")
        if at(whole, f"{name}.enabled") is True and path and os.environ.get("RANK", "0") == "0":
            try:
                _try_to_write(Path(path), is_file=key == "output_file")
            except OSError as error:
                rule = f"cannot write there ({error.strerror}); name another place"
                lines.append(fail(f"{name}.{key}", path, rule))
    if lines:
        raise ScMoEConfigError("\n".join(map(str, lines)))


def _try_to_write(path: Path, is_file: bool) -> None:
    places = [path, *path.absolute().parents]
    tempfile.TemporaryDirectory(dir=next(each for each in places if each.is_dir())).cleanup()
    if any(each.is_file() for each in places[is_file:]):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def check_accelerator(whole: Mapping[str, Any]) -> None:
    """What this machine decides.

    Raises:
        ScMoEConfigError: a precision that the accelerator does not compute in, or an optimizer that it lacks.
    """
    accelerator = deepspeed.get_accelerator()
    name = accelerator.device_name()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    for precision, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if at(whole, f"{precision}.enabled") and not supported[precision]():
            rule = f'the accelerator "{name}" does not support it; use {other}, or remove the section for fp32'
            raise fail(f"{precision}.enabled", True, rule)
    if name != "cpu":
        return
    optimizer = at(whole, "optimizer.type")
    kind = str(optimizer).lower()
    if kind == "lamb" or (kind == "lion" and not offloads(whole)):
        raise fail("optimizer.type", optimizer, 'DeepSpeed has it for GPUs only; use "AdamW" on a CPU')
    if at(whole, "optimizer.params.capturable"):
        raise fail("optimizer.params.capturable", True, "is for GPUs only; remove it")


def check_model_and_optimizer(whole: Mapping[str, Any], model: object, optimizer: object) -> None:
    """What is handed to `initialize`.

    Raises:
        ScMoEConfigError: a pipeline, no optimizer for ZeRO, or one of the user's that offloading does not accept.
    """
    if isinstance(model, deepspeed.pipe.PipelineModule):
        raise ScMoEConfigError(
            "the model is a deepspeed.pipe.PipelineModule: a shortcut may not cross a pipeline stage; hand over the "
            "plain module"
        )
    stage = at(whole, "zero_optimization.stage")
    if optimizer is None and stage and not whole.get("optimizer"):
        raise fail(
            "zero_optimization.stage",
            stage,
            'ZeRO needs an optimizer: add an "optimizer" section to the DeepSpeed JSON, hand optimizer=… to '
            "initialize, or set stage 0 to evaluate only",
        )
    if optimizer is not None and offloads(whole) and whole.get("zero_force_ds_cpu_optimizer", True):
        raise ScMoEConfigError(
            "zero_optimization.offload_optimizer with an optimizer of your own: DeepSpeed requires its CPU Adam there; "
            'set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the DeepSpeed JSON'
        )


def check_trainable(whole: Mapping[str, Any], model: nn.Module, own: Collection[str]) -> None:
    """Raises a ScMoEConfigError where DeepSpeed would make an optimizer for no parameter at all.

    Args:
        model: with the parameters that a conversion adds.
        own: what the user hands over, an "optimizer" for example.
    """
    if whole.get("optimizer") and "optimizer" not in own and not any(each.requires_grad for each in model.parameters()):
        raise ScMoEConfigError(
            "optimizer: every parameter of the model is frozen, and nothing is left to train; set requires_grad of "
            "some, or remove the section and set zero_optimization.stage 0 to evaluate only"
        )


def check_filled_in(whole: Mapping[str, Any]) -> None:
    """Raises a ScMoEConfigError for the one "auto" that pretrain_gpt_scmoe.py fills in before, from --train-iters."""
    path = "scheduler.params.total_num_steps"
    if at(whole, path) == "auto":
        raise fail(path, "auto", "only the training programs know how long a run is; write the number of steps")


def steps_without_rate(schedule: Mapping[str, Any]) -> int:
    """How many steps DeepSpeed's warm-up makes before its learning rate leaves 0.

    It counts from one step before the start, and its first rate is the lowest one.
    """
    kind = schedule.get("type")
    if kind == "WarmupCosineLR":
        return 1 if at(schedule, "params.warmup_min_ratio") else 2
    return 2 if kind in ("WarmupLR", "WarmupDecayLR") and not at(schedule, "params.warmup_min_lr") else 0


def warn(whole: Mapping[str, Any]) -> None:
    """Logs settings that run, but not as their user expects."""
    if "gradient_clipping" not in whole:
        logger.info(
            "gradient_clipping is not set: DeepSpeed clips gradients at a norm of 1.0, its default "
            '("gradient_clipping": 0 trains without)'
        )
    if torch.cuda.is_available() and (advice := allocator_advice(os.environ)):
        logger.info(advice)
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and torch.cuda.is_available():
        logger.warning(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 puts all streams in one queue: communication and computation take turns. "
            "Unset it"
        )
    schedule, zero = section(whole, "scheduler"), section(whole, "zero_optimization")
    if steps := steps_without_rate(schedule):
        logger.info(
            f'scheduler.type = "{schedule["type"]}": DeepSpeed gives the first {steps} step{"s" * (steps > 1)} a '
            "learning rate of 0"
        )
    if not zero.get("stage"):
        logger.warning(
            "zero_optimization.stage is 0: DeepSpeed reports no gradient norm there; set stage 1 or 2 to see it"
        )
    of_zero_3 = {key: value for key, value in zero.items() if key.startswith(("zero_hpz", "zero_quantized"))}
    idle = [f"zero_optimization.{key}" for key, value in of_zero_3.items() if value not in (False, 1)]
    idle = [] if zero.get("stage") == 3 else idle + [key for key in ("compile", "aio") if whole.get(key)]
    if idle:
        logger.warning(f"{', '.join(idle)}: no effect without ZeRO-3 or DeepCompile, which ScMoE does not run with")
    on_cpu = offloads(whole) or deepspeed.get_accelerator().device_name() == "cpu"
    is_adam = str(at(whole, "optimizer.type")).lower() in ("adam", "adamw")
    if on_cpu and is_adam and not at(whole, "optimizer.params.torch_adam"):
        logger.warning(
            "optimizer.params.torch_adam is not true: the first start compiles DeepSpeed's Adam for the CPU (a minute "
            "or two, with g++ and ninja). Set it to do without"
        )
