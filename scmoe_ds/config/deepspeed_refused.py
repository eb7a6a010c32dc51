"""DeepSpeed's settings that ScMoE cannot run with, and those with which DeepSpeed 0.19 computes something wrong.

A sentence here is better than DeepSpeed's assertion after minutes of start-up, or a key that has no effect. Every key
that acts in the backward pass was measured against sums in fp64, over all micro-batches of all ranks;
tests/engine/test_accumulated_gradients.py repeats it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from scmoe_ds.config.deepspeed_json import at, is_on, offloads, section
from scmoe_ds.config.expert_parallel import refusals_of_autoep, uses_autoep
from scmoe_ds.config.messages import fail
from scmoe_ds.config.offload_section import refusals_of_offload
from scmoe_ds.errors import ScMoEConfigError

_Rule = tuple[str, bool, str]
"""A key, whether its value is refused, and why, with the remedy."""

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "torch.float16": "fp16", "half": "fp16"}
_FEATURES = {
    "hybrid_engine.enabled": "generates text inside of RLHF training; remove the section",
    "autotuning.enabled": "starts jobs of its own that this one is not prepared for; remove the section",
    "data_efficiency.enabled": "acts on DeepSpeed's own data loader and layers only; remove the section",
    "use_data_before_expert_parallelism": "experts are laid out over consecutive ranks; remove it",
    "checkpoint.writer": "writes checkpoints in a way that their checksums do not cover; remove it",
    "checkpoint.load_universal": "cannot hold experts; remove it, --load resumes in any layout",
    "zero_optimization.elastic_checkpoint": "saves no step of torch's optimizers, so that no run can go on from the "
    "checkpoint; remove it, --load resumes in any layout",
    "checkpoint.use_node_local_storage": "checkpoints are read and checked as one directory; remove it, and give "
    "--save a directory that all nodes share",
    "pipeline": "a shortcut may not cross a pipeline stage: remove the section, and use expert and tensor parallelism",
}
"""Refused unless they are off."""
_WITH_AUTOEP = ("checkpoint.load_universal",)
"""DeepSpeed has these for AutoEP's layers."""
_SECTIONS = {
    "weight_quantization": "is for inference with ZeRO-3; remove the section",
    "datastates_ckpt": "writes checkpoints later than their checksums are taken; remove the section",
    "zero_optimization.zenflow": "does not know of experts; remove it",
}
"""Refused whatever they hold."""
_ABOVE_ONE = {
    "tensor_parallel.autotp_size": "splits layers that ScMoE does not know of; remove the section, and use "
    "--tensor-model-parallel-size",
    "sequence_parallel_size": "one rank of ScMoE holds whole sequences; remove it",
}
_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Monitor and the package that it needs."""


def refusals(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    """Settings that the JSON alone shows to be impossible."""
    for path, wrong, rule in chain(
        _features(whole), _zero(whole), _precision(whole), _gradients(whole), refusals_of_offload(whole)
    ):
        if wrong:
            yield fail(path, at(whole, path), rule)


def _features(whole: Mapping[str, Any]) -> Iterator[_Rule]:
    yield from refusals_of_autoep(whole)
    yield "compile.deepcompile", is_on(whole, "compile.deepcompile"), "reorders ScMoE's collectives; remove it"
    for path, rule in _FEATURES.items():
        yield path, bool(at(whole, path)) and not (path in _WITH_AUTOEP and uses_autoep(whole)), rule
    yield from ((path, at(whole, path) is not None, rule) for path, rule in _SECTIONS.items())
    for path, rule in _ABOVE_ONE.items():
        value = at(whole, path)
        yield path, isinstance(value, int) and value > 1, rule
    remedy = "remove the section and use --recompute-granularity selective or full (in your own program: recompute=…)"
    for key, value in section(whole, "activation_checkpointing").items():
        yield f"activation_checkpointing.{key}", bool(value), f"has no effect on these models; {remedy}"
    for monitor, package in _MONITORS.items():
        missing = is_on(whole, f"{monitor}.enabled") and importlib.util.find_spec(package) is None
        install = '"scmoe_ds[plots]"' if package == "tensorboard" else package
        yield f"{monitor}.enabled", missing, f"needs the package {package}; pip install {install}, or set it to false"


def _zero(whole: Mapping[str, Any]) -> Iterator[_Rule]:
    zero, z = section(whole, "zero_optimization"), "zero_optimization."
    off = {key for key, value in zero.items() if value is False}
    stage, bucket, device = zero.get("stage"), zero.get("allgather_bucket_size"), at(zero, "offload_optimizer.device")
    divided = stage in (1, 2)
    wrong_ranks = "DeepSpeed then averages experts over the wrong ranks; remove it"
    odd = isinstance(bucket, (int, float)) and bool(bucket % 2)
    runs_3 = stage == 3 and uses_autoep(whole)
    yield z + "stage", stage == 3 and not runs_3, "DeepSpeed's MoE layers do not run under ZeRO-3; use stage 1 or 2"
    yield z + "offload_param", offloads(whole, "offload_param") and not runs_3, "works under ZeRO-3 only; remove it"
    yield z + "offload_optimizer.device", device == "nvme" and not runs_3, 'works under ZeRO-3 only; use "cpu"'
    yield z + "contiguous_gradients", divided and "contiguous_gradients" in off, wrong_ranks
    yield z + "reduce_scatter", divided and "reduce_scatter" in off, "DeepSpeed requires true with experts; remove it"
    yield z + "compute_grad_norm", "compute_grad_norm" in off, "the gradient norm is logged and checked; remove it"
    yield z + "allgather_bucket_size", divided and odd, "must be even"
    yield z + "legacy_stage1", is_on(zero, "legacy_stage1"), "DeepSpeed has removed it; remove the key"


def _precision(whole: Mapping[str, Any]) -> Iterator[_Rule]:
    """Combinations at which DeepSpeed stops when it builds the optimizer."""
    bf16, fp16 = (is_on(whole, f"{name}.enabled") for name in ("bf16", "fp16"))
    bf16 = bf16 or is_on(whole, "bfloat16.enabled")
    model = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    parameters, sums = (_dtype(whole, f"data_types.{name}_dtype") for name in ("param", "grad_accum"))
    no_zero, on_cpu = not at(whole, "zero_optimization.stage"), offloads(whole)
    remedy = f"the model is in {model}, as bf16.enabled and fp16.enabled say; remove it, or change these"
    yield "bf16.enabled", bf16 and fp16, "fp16.enabled is true as well; keep one of them"
    yield "data_types.param_dtype", parameters not in (None, model), remedy
    remedy = f"without ZeRO gradients are in the model's {model}; remove it, or set zero_optimization.stage to 1"
    yield "data_types.grad_accum_dtype", no_zero and sums not in (None, model), remedy
    remedy = 'needs DeepSpeed\'s Adam on the CPU: remove it, or set offload_optimizer.device to "cpu" and no torch_adam'
    cpu_adam = on_cpu and not at(whole, "optimizer.params.torch_adam")
    for name, short in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        path = f"{name}.{short}_master_weights_and_grads"
        yield path, is_on(whole, path) and not cpu_adam, remedy


def _gradients(whole: Mapping[str, Any]) -> Iterator[_Rule]:
    """Settings with which MoE layers get wrong gradients, or DeepSpeed reports and clips by a wrong norm."""
    stage = at(whole, "zero_optimization.stage") or 0
    for name in ("bf16", "bfloat16", "fp16"):
        remedy = f"with {name}, DeepSpeed leaves experts out of the norm by which it clips; set stage 1 or 2"
        yield "zero_optimization.stage", stage == 0 and is_on(whole, f"{name}.enabled"), remedy
    remedy = "DeepSpeed has it without ZeRO-2 only; remove it, or set zero_optimization.stage to 1"
    divided = at(whole, "gradient_predivide_factor") not in (None, 1.0)
    yield "prescale_gradients", stage == 2 and is_on(whole, "prescale_gradients"), remedy
    yield "gradient_predivide_factor", stage == 2 and divided, remedy
    half = is_on(whole, "torch_autocast.enabled") and _dtype(whole, "torch_autocast.dtype") == "fp16"
    remedy = 'DeepSpeed clips before it divides by the loss scale; use "bfloat16", or "fp16": {"enabled": true}'
    yield "torch_autocast.dtype", half, remedy


def _dtype(whole: Mapping[str, Any], path: str) -> str | None:
    """The short name of a number format; None where there is none, or none that is known."""
    name = str(at(whole, path))
    return name if name in _SHORT.values() else _SHORT.get(name)
