"""Settings with which DeepSpeed 0.19 gives MoE layers wrong gradients, or reports and clips by a wrong norm.

Right is the mean over all micro-batches of all ranks. Every key that acts in the backward pass was measured against
sums in fp64; tests/engine/test_accumulated_gradients.py repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scmoe_ds.config.deepspeed_keys import section
from scmoe_ds.config.messages import fail
from scmoe_ds.errors import ScMoEConfigError


def wrong_gradients(whole: Mapping[str, Any]) -> Iterator[ScMoEConfigError]:
    """What the file alone decides."""
    stage = section(whole, "zero_optimization").get("stage") or 0
    for name in ("bf16", "bfloat16", "fp16"):
        if stage == 0 and section(whole, name).get("enabled") is True:
            yield fail(
                "zero_optimization.stage",
                0,
                f"with {name}, DeepSpeed leaves experts out of the gradient norm "
                "and clips by the rest; set stage 1 or 2",
            )
    for key, wrong in (
        ("prescale_gradients", whole.get("prescale_gradients") is True),
        ("gradient_predivide_factor", whole.get("gradient_predivide_factor", 1.0) != 1.0),
    ):
        if wrong and stage == 2:
            yield fail(
                key, whole[key], "DeepSpeed has it without ZeRO-2 only; remove it, or set zero_optimization.stage to 1"
            )
    autocast = section(whole, "torch_autocast")
    if autocast.get("enabled") is True and str(autocast.get("dtype")) in ("torch.float16", "fp16", "float16", "half"):
        yield fail(
            "torch_autocast.dtype",
            autocast["dtype"],
            "DeepSpeed takes the norm and clips before it divides by "
            'the loss scale; use "bfloat16", or "fp16": {"enabled": true}',
        )


def check_norm(whole: Mapping[str, Any], expert_parallel_size: int, divided: bool) -> None:
    """What depends on the layout.

    Args:
        divided: experts are in pieces on tensor-parallel ranks.

    Raises:
        ScMoEConfigError: a layout in which DeepSpeed's gradient norm, and clipping by it, is wrong. Without ZeRO, each
            rank takes the norm over the experts that it holds, and DeepSpeed clips by the ranks' mean. Its bf16
            optimizer counts what all ranks hold of divided experts (a bias) once for each rank.
    """
    zero, clip = section(whole, "zero_optimization"), whole.get("gradient_clipping", 1.0)
    if clip and expert_parallel_size > 1 and not zero.get("stage"):
        raise fail(
            "zero_optimization.stage",
            0,
            "with expert parallelism DeepSpeed clips (gradient_clipping = "
            f'{clip}) by a norm that is too small; set stage 1 or 2, or "gradient_clipping": 0',
        )
    sums = section(whole, "data_types").get("grad_accum_dtype")
    in_bf16 = (section(whole, "bf16") or section(whole, "bfloat16")).get("enabled")
    offloads = section(zero, "offload_optimizer").get("device", "none") != "none"
    if divided and in_bf16 and sums in ("fp32", "float32") and zero.get("stage") == 1 and not offloads:
        raise fail(
            "data_types.grad_accum_dtype",
            sums,
            "with expert_tensor_parallelism DeepSpeed's bf16 optimizer "
            "counts parts of experts twice in the gradient norm; set zero_optimization.stage to 2",
        )


def check_output(module: nn.Module, inputs: object, output: object) -> None:
    """A hook on a model's forward pass: DeepSpeed prepares a backward pass through hooks on the output's tensors.

    Raises:
        ScMoEConfigError: a training pass whose output hides its tensors. Without its preparations DeepSpeed would count
            micro-batches repeatedly, for example.
    """
    if module.training and torch.is_grad_enabled() and not _needs_gradient(output):
        raise ScMoEConfigError(
            f"the model's forward pass returns {type(output).__name__}, and no tensor with a gradient in a tuple, list "
            "or dict: DeepSpeed looks nowhere else; return one of these (a transformers.utils.ModelOutput is a dict)"
        )


def _needs_gradient(output: object) -> bool:
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return any(map(_needs_gradient, output))
    return isinstance(output, torch.Tensor) and output.grad_fn is not None
