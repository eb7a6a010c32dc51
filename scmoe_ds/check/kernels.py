"""What torch does on a GPU where C++ decides by the device, which C++ does not see here; fakes.py says why.

Some operators are composed of others differently on a GPU, and keep other tensors for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from torch import Tensor

from scmoe_ds.compat import FakeTensor, efficient_attention, flash_attention, fused_rms_norm
from scmoe_ds.moe.kernels import choose_kernels

_HALF = (torch.float16, torch.bfloat16)
_data: Any = Tensor.data
_dropout, _attention, _rms_norm, _move = F.dropout, F.scaled_dot_product_attention, F.rms_norm, Tensor.to


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside the block, fake tensors can be moved in place, and DeepSpeed's own operators do nothing."""
    with (
        patch.object(FakeTensor, "data", property(_get_data, _set_data), create=True),
        patch.object(torch.utils, "swap_tensors", _set_data),
        patch.object(FakeTensor, "pin_memory", lambda tensor, *_: tensor, create=True),
        patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor),
        patch.object(OpBuilder, "load", lambda *_, **__: _NoOperators()),
    ):
        yield


@contextmanager
def of_gpu(device: torch.device, capability: tuple[int, int]) -> Iterator[None]:
    """Inside the block, fake tensors of `device` are computed with as on a GPU.

    Args:
        device: of the fakes.
        capability: the card's.
    """

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _to(tensor, device, *args, **kwargs)

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (
            _gpu_attention(capability, query, *args, **kwargs) if query.is_cuda else _attention(query, *args, **kwargs)
        )

    of_fakes: dict[str, Any] = {
        "to": to,
        "cuda": lambda tensor, *_, **__: to(tensor, device),
        "cpu": lambda tensor, *_, **__: to(tensor, torch.device("cpu")),
        "is_cuda": property(lambda tensor: tensor.device.type == "cuda"),
        "is_cpu": property(lambda tensor: tensor.device.type == "cpu"),
        "is_meta": property(lambda tensor: tensor.device.type == "meta"),
        "record_stream": lambda tensor, stream: None,
        "is_pinned": lambda tensor, *_: not tensor.is_cuda,
        "get_device": lambda tensor: tensor.device.index if tensor.is_cuda else -1,
        "type": _type,
    }
    with ExitStack() as stack:
        for name, value in of_fakes.items():
            stack.enter_context(patch.object(FakeTensor, name, value, create=True))
        for name, function in (
            ("dropout", _gpu_dropout),
            ("scaled_dot_product_attention", attention),
            ("rms_norm", _gpu_rms_norm),
        ):
            stack.enter_context(patch.object(F, name, function))
        # Triton launches its kernels itself, past fake tensors. Whatever is installed here, torch's operators run.
        for name in ("is_triton_supported", "prefer_triton_grouped_mm"):
            stack.enter_context(patch.object(CUDA_Accelerator, name, lambda _: False))
        choose_kernels.cache_clear()
        stack.callback(choose_kernels.cache_clear)
        yield


def _to(tensor: Tensor, gpu: torch.device, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which returns the tensor itself where it is on its device already."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device = kwargs.pop("device", None)
    if args and not isinstance(args[0], torch.dtype):
        device, args = args[0], args[1:]
    if device is not None:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        device = gpu if device.type == gpu.type and device.index is None else device
    if device is not None and device != tensor.device:
        return _move(tensor, device, *args, **kwargs)
    return _move(tensor, *args, **{"dtype": tensor.dtype, **kwargs}) if not args else _move(tensor, *args, **kwargs)


def _type(tensor: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    place = "torch.cuda" if tensor.is_cuda else "torch"
    if dtype is None:
        return f"{place}.{torch.empty(0, dtype=tensor.dtype).type().removeprefix('torch.')}"
    return tensor.to(dtype, non_blocking=non_blocking)


class _NoOperators:
    """An extension of DeepSpeed, such as its fused Adam. Its functions do nothing: they return no tensors."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _get_data(tensor: Any) -> Tensor:
    return cast(Tensor, _data.__get__(tensor))


def _set_data(tensor: Any, value: Any) -> None:
    """`tensor.data = value`, which may move a tensor to another device."""
    fake = value if isinstance(value, FakeTensor) else tensor.fake_mode.from_tensor(value)
    _data.__set__(tensor, fake)
    tensor.fake_device = fake.fake_device


def _gpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not (input.is_cuda and training and 0 < p < 1) or inplace:
        return _dropout(input, p, training, inplace)
    return cast(Tensor, torch.ops.aten.native_dropout(input, p, True)[0])


def _gpu_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not input.is_cuda or fused_rms_norm is None or weight is None:
        return _rms_norm(input, normalized_shape, weight, eps)
    return cast(Tensor, _FusedRMSNorm.apply(input, weight, len(normalized_shape)))


class _FusedRMSNorm(torch.autograd.Function):
    """The shapes of torch's kernel, which keeps its input and an fp32 number per row. A torch for CPUs has no such
    kernel: there the operator is composed of others, which keep two fp32 tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, dimensions: int) -> Tensor:
        rows = input.shape[: input.ndim - dimensions]
        ctx.save_for_backward(input, weight, input.new_empty(rows, dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight), None


def _gpu_attention(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention where it can be used, then the memory-efficient kernel, then plain products."""
    if query.dtype in _HALF and attn_mask is None and capability >= (8, 0) and query.shape[-1] <= 256:
        return cast(
            Tensor,
            flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0],
        )
    if not enable_gqa:
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return cast(
            Tensor,
            efficient_attention(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0],
        )
    return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
