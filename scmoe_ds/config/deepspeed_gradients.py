"""The gradient norm and the backward pass of DeepSpeed 0.19: layouts and models with which they are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scmoe_ds.config.deepspeed_json import at, offloads
from scmoe_ds.config.messages import fail
from scmoe_ds.errors import ScMoEConfigError


def check_norm(whole: Mapping[str, Any], expert_parallel_size: int, divided: bool) -> None:
    """What depends on the layout.

    Args:
        divided: experts are in pieces on tensor-parallel ranks.

    Raises:
        ScMoEConfigError: a layout in which DeepSpeed's gradient norm, and clipping by it, is wrong. Without ZeRO, each
            rank takes the norm over the experts that it holds, and DeepSpeed clips by the ranks' mean. Its bf16
            optimizer counts what all ranks hold of divided experts (a bias) once for each rank.
    """
    stage, clip = at(whole, "zero_optimization.stage"), whole.get("gradient_clipping", 1.0)
    if clip and expert_parallel_size > 1 and not stage:
        raise fail(
            "zero_optimization.stage",
            0,
            f"with expert parallelism DeepSpeed clips (gradient_clipping = {clip}) by a norm that is too small; "
            'set stage 1 or 2, or "gradient_clipping": 0',
        )
    in_bf16 = at(whole, "bf16.enabled") or at(whole, "bfloat16.enabled")
    sums = at(whole, "data_types.grad_accum_dtype")
    if divided and in_bf16 and sums in ("fp32", "float32") and stage == 1 and not offloads(whole):
        raise fail(
            "data_types.grad_accum_dtype",
            sums,
            "with expert_tensor_parallelism DeepSpeed's bf16 optimizer counts parts of experts twice in the gradient "
            "norm; set zero_optimization.stage to 2",
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
