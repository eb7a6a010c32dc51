"""DeepSpeed's own settings that ScMoE cannot run with, or that its user would wonder about.

Better a sentence here than DeepSpeed's assertion after minutes of start-up, or a key that has no effect.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch

from scmoe_ds.config.deepspeed_gradients import wrong_gradients
from scmoe_ds.config.deepspeed_keys import check_keys, section
from scmoe_ds.config.deepspeed_optimizers import check_optimizer
from scmoe_ds.config.messages import fail
from scmoe_ds.errors import ScMoEConfigError

logger = logging.getLogger("scmoe_ds")


def check_settings(whole: Mapping[str, Any]) -> list[str]:
    """What is wrong with DeepSpeed's part of the JSON, as far as the file alone decides, a line each."""
    if not whole.keys() - {"scmoe"}:
        return []
    lines: dict[str, str] = {}
    for line in [*map(str, _refusals(whole)), *check_keys(whole), *check_optimizer(whole)]:
        lines.setdefault(re.split(r"[ :]", line, maxsplit=1)[0], line)  # one for each key
    of_all = lines.pop("the", None)  # what DeepSpeed says of the whole JSON: for want of something better
    return list(lines.values()) or ([of_all] if of_all else [])


def _refusals(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    """Settings that native MoE layers or these models do not run with."""
    zero = section(whole, "zero_optimization")
    if zero.get("stage") == 3:
        yield fail("zero_optimization.stage", 3, "DeepSpeed's MoE layers do not run under ZeRO-3; use stage 1 or 2")
    if section(zero, "offload_param").get("device", "none") != "none":
        yield fail(
            "zero_optimization.offload_param",
            zero["offload_param"],
            "offloads parameters under ZeRO-3 only; remove it (offload_optimizer works)",
        )
    if section(zero, "offload_optimizer").get("device") == "nvme":
        yield fail("zero_optimization.offload_optimizer.device", "nvme", 'works under ZeRO-3 only; use "cpu"')
    if section(whole, "compile").get("deepcompile") is True:
        yield fail("compile.deepcompile", True, "reorders collectives that ScMoE schedules itself; remove it")
    if "expert_parallel" in whole:
        yield ScMoEConfigError(
            '"expert_parallel" (DeepSpeed AutoEP) and "scmoe" both replace MoE layers; remove one of them'
        )
    if whole.get("pipeline"):
        yield fail(
            "pipeline",
            whole["pipeline"],
            "a shortcut may not cross a pipeline stage: remove the section, and use expert and tensor parallelism",
        )
    for key, value in section(whole, "activation_checkpointing").items():
        if value:
            yield fail(
                f"activation_checkpointing.{key}",
                value,
                "has no effect on these models; remove the section "
                "and use --recompute-granularity selective or full (in a model of your own: "
                "GPT(…, recompute=…))",
            )
    yield from _not_run_with(whole)
    yield from _monitors(whole)
    yield from _precision(whole)
    yield from _zero_with_experts(zero)
    yield from wrong_gradients(whole)


def _not_run_with(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    """DeepSpeed's features that do not go with ScMoE, and what serves instead."""
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("hybrid_engine.enabled", bool, "generates text inside of RLHF training; remove the section"),
        ("autotuning.enabled", bool, "starts jobs of its own that this one is not prepared for; remove the section"),
        ("data_efficiency.enabled", bool, "acts on DeepSpeed's own data loader and layers only; remove the section"),
        (
            "tensor_parallel.autotp_size",
            _above_one,
            "splits layers that ScMoE does not know of; remove the section, and use --tensor-model-parallel-size",
        ),
        ("sequence_parallel_size", _above_one, "one rank of ScMoE holds whole sequences; remove it"),
        ("weight_quantization", lambda value: value is not None, "is for inference with ZeRO-3; remove the section"),
        ("use_data_before_expert_parallelism", bool, "experts are laid out over consecutive ranks; remove it"),
        (
            "datastates_ckpt",
            lambda value: value is not None,
            "writes checkpoints later than their checksums are taken; remove the section",
        ),
        ("checkpoint.writer", bool, "writes checkpoints in a way that their checksums do not cover; remove it"),
        ("checkpoint.load_universal", bool, "cannot hold experts; remove it, --load resumes in any layout"),
        (
            "checkpoint.use_node_local_storage",
            bool,
            "checkpoints are read and checked as one directory; remove it, "
            "and give --save a directory that all nodes share",
        ),
    ]
    for path, broken, rule in rules:
        parent, _, key = path.rpartition(".")
        value = (section(whole, parent) if parent else whole).get(key)
        if broken(value):
            yield fail(path, value, rule)


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _monitors(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    for monitor, package in {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}.items():
        if section(whole, monitor).get("enabled") is True and importlib.util.find_spec(package) is None:
            yield fail(
                f"{monitor}.enabled", True, f"needs the package {package}; pip install {package}, or set it to false"
            )


def _precision(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    """Combinations at which DeepSpeed stops when it builds the optimizer."""
    bf16, fp16 = section(whole, "bf16") or section(whole, "bfloat16"), section(whole, "fp16")
    types = section(whole, "data_types")
    dtype = "bf16" if bf16.get("enabled") is True else "fp16" if fp16.get("enabled") is True else "fp32"
    if bf16.get("enabled") is True and fp16.get("enabled") is True:
        yield fail("bf16.enabled", True, "fp16.enabled is true as well; keep one of them")
    wanted = _SHORT.get(str(types.get("param_dtype")))
    if wanted not in (None, dtype):
        yield fail(
            "data_types.param_dtype",
            types["param_dtype"],
            f"the model is in {dtype}, as bf16.enabled and fp16.enabled say; remove it, or change these",
        )
    zero = section(whole, "zero_optimization")
    if not zero.get("stage") and _SHORT.get(str(types.get("grad_accum_dtype")), dtype) != dtype:
        yield fail(
            "data_types.grad_accum_dtype",
            types["grad_accum_dtype"],
            f"without ZeRO gradients are in the model's {dtype}; remove it, or set zero_optimization.stage to 1",
        )
    on_cpu = section(zero, "offload_optimizer").get("device") == "cpu"
    if on_cpu and not section(section(whole, "optimizer"), "params").get("torch_adam"):
        return
    for name, own in (("bf16", bf16), ("fp16", fp16)):
        if own.get(f"{name}_master_weights_and_grads") is True:
            yield fail(
                f"{name}.{name}_master_weights_and_grads",
                True,
                "needs DeepSpeed's Adam on the CPU: remove it, "
                'or set zero_optimization.offload_optimizer.device to "cpu" and no torch_adam',
            )


_SHORT = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}


def _zero_with_experts(zero: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    stage = zero.get("stage")
    if stage in (1, 2) and zero.get("contiguous_gradients") is False:
        yield fail(
            "zero_optimization.contiguous_gradients",
            False,
            "DeepSpeed then averages experts over the wrong ranks; remove it",
        )
    if stage in (1, 2) and zero.get("reduce_scatter") is False:
        yield fail("zero_optimization.reduce_scatter", False, "DeepSpeed wants true with experts; remove it")
    if zero.get("compute_grad_norm") is False:
        yield fail("zero_optimization.compute_grad_norm", False, "the gradient norm is logged and checked; remove it")
    bucket = zero.get("allgather_bucket_size")
    if stage in (1, 2) and isinstance(bucket, (int, float)) and bucket % 2:
        yield fail("zero_optimization.allgather_bucket_size", bucket, "must be even")
    if zero.get("zenflow") is not None:
        yield fail("zero_optimization.zenflow", zero["zenflow"], "does not know of experts; remove it")
    if zero.get("legacy_stage1") is True:
        yield fail("zero_optimization.legacy_stage1", True, "DeepSpeed has removed it; remove the key")


def check_program(whole: Mapping[str, Any]) -> None:
    """What the training programs of this package do by themselves, other than a loop of one's own.

    Raises:
        ScMoEConfigError: a setting that they would ignore or break, or a monitor that cannot write.
    """
    lines = []
    if whole.get("managed_gradient_accumulation") is False:
        lines.append(
            fail(
                "managed_gradient_accumulation",
                False,
                "the training loop steps once per micro-batch, and leaves the accumulation to DeepSpeed; remove it",
            )
        )
    writes = {"tensorboard": "output_path", "csv_monitor": "output_path", "flops_profiler": "output_file"}
    for name, key in writes.items():
        own = section(whole, name)
        if own.get("enabled") is True and own.get(key) and os.environ.get("RANK", "0") == "0":
            parents = [Path(own[key]), *Path(own[key]).absolute().parents]
            try:
                tempfile.TemporaryDirectory(dir=next(each for each in parents if each.is_dir())).cleanup()
                if any(each.is_file() for each in parents[key == "output_file" :]):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            except OSError as error:
                lines.append(
                    fail(f"{name}.{key}", own[key], f"cannot write there ({error.strerror}); name another place")
                )
    if lines:
        raise ScMoEConfigError("\n".join(map(str, lines)))


def check_accelerator(whole: Mapping[str, Any]) -> None:
    """What this machine decides.

    Raises:
        ScMoEConfigError: a precision that the accelerator does not compute in, or an optimizer that it lacks.
    """
    accelerator = deepspeed.get_accelerator()
    for precision, supported, other in (
        ("fp16", accelerator.is_fp16_supported, "bf16"),
        ("bf16", accelerator.is_bf16_supported, "fp16"),
    ):
        if section(whole, precision).get("enabled") and not supported():
            raise fail(
                f"{precision}.enabled",
                True,
                f'the accelerator "{accelerator.device_name()}" does not support '
                f"it; use {other}, or remove the section for fp32",
            )
    optimizer, on_cpu = section(whole, "optimizer"), accelerator.device_name() == "cpu"
    kind = str(optimizer.get("type")).lower()
    offloads = section(section(whole, "zero_optimization"), "offload_optimizer").get("device", "none") != "none"
    if on_cpu and (kind == "lamb" or (kind == "lion" and not offloads)):
        raise fail("optimizer.type", optimizer["type"], 'DeepSpeed has it for GPUs only; use "AdamW" on a CPU')
    if on_cpu and section(optimizer, "params").get("capturable"):
        raise fail("optimizer.params.capturable", True, "is for GPUs only; remove it")


def check_model_and_optimizer(whole: Mapping[str, Any], model: object, optimizer: object) -> None:
    """What is handed to `initialize`.

    Raises:
        ScMoEConfigError: a pipeline, no optimizer for ZeRO, or one of the user's that offloading does not accept.
    """
    if isinstance(model, deepspeed.pipe.PipelineModule):
        raise ScMoEConfigError(
            "the model is a deepspeed.pipe.PipelineModule: a shortcut may not cross a pipeline "
            "stage; hand over the plain module"
        )
    zero = section(whole, "zero_optimization")
    if optimizer is None and zero.get("stage") and not whole.get("optimizer"):
        raise fail(
            "zero_optimization.stage",
            zero["stage"],
            'ZeRO needs an optimizer: add an "optimizer" section to '
            "the DeepSpeed JSON, hand optimizer=… to initialize, or set stage 0 to evaluate only",
        )
    offloads = section(zero, "offload_optimizer").get("device", "none") != "none"
    if optimizer is not None and offloads and whole.get("zero_force_ds_cpu_optimizer", True):
        raise ScMoEConfigError(
            "zero_optimization.offload_optimizer with an optimizer of your own: DeepSpeed wants its "
            'CPU Adam there; set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the '
            "DeepSpeed JSON"
        )


def check_filled_in(whole: Mapping[str, Any]) -> None:
    """Raises a ScMoEConfigError for the one "auto" that pretrain_gpt_scmoe.py fills in before, from --train-iters."""
    if section(section(whole, "scheduler"), "params").get("total_num_steps") == "auto":
        raise fail(
            "scheduler.params.total_num_steps",
            "auto",
            "only the training programs know how long a run is; write the number of steps",
        )


def steps_without_rate(schedule: Mapping[str, Any]) -> int:
    """How many steps DeepSpeed's warm-up makes before its learning rate leaves 0: it counts from one before the start,
    and its first rate is the least one."""
    kind, params = schedule.get("type"), section(schedule, "params")
    if kind == "WarmupCosineLR":
        return 1 if params.get("warmup_min_ratio") else 2
    return 2 if kind in ("WarmupLR", "WarmupDecayLR") and not params.get("warmup_min_lr") else 0


def warn(whole: Mapping[str, Any]) -> None:
    """Logs settings that run, but not as their user expects."""
    if "gradient_clipping" not in whole:
        logger.info(
            'gradient_clipping is not set: DeepSpeed clips gradients at a norm of 1.0, its default ("gradient_'
            'clipping": 0 trains without)'
        )
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and torch.cuda.is_available():
        logger.warning(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 puts all streams in one queue: communication and computation "
            "take turns. Unset it"
        )
    schedule = section(whole, "scheduler")
    if steps := steps_without_rate(schedule):
        logger.info(
            f'scheduler.type = "{schedule["type"]}": DeepSpeed makes the first {steps} of the training steps '
            "with a learning rate of 0"
        )
    zero = section(whole, "zero_optimization")
    if not zero.get("stage"):
        logger.warning(
            "zero_optimization.stage is 0: DeepSpeed reports no gradient norm there; set stage 1 or 2 to see it"
        )
    idle = [
        f"zero_optimization.{key}"
        for key, value in zero.items()
        if key.startswith(("zero_hpz", "zero_quantized")) and value not in (False, 1)
    ]
    idle += [key for key in ("compile", "aio") if whole.get(key)]
    if idle:
        logger.warning(f"{', '.join(idle)}: no effect without ZeRO-3 or DeepCompile, which ScMoE does not run with")
    optimizer = section(whole, "optimizer")
    offloads = section(zero, "offload_optimizer").get("device", "none") != "none"
    on_cpu = offloads or deepspeed.get_accelerator().device_name() == "cpu"
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if on_cpu and is_adam and not section(optimizer, "params").get("torch_adam"):
        logger.warning(
            "optimizer.params.torch_adam is not true: the first start compiles DeepSpeed's Adam for the "
            "CPU (a minute or two, with g++ and ninja). Set it to do without"
        )
