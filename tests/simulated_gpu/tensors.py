"""Tensors that say that they are on cuda:0. Below autograd each is a tensor of the host, its `elem`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tests.simulated_gpu.gpu import active
from tests.simulated_gpu.streams import CUDA, current_stream

_in_call = threading.local()


class DeviceTensor(Tensor):
    """A tensor on the simulated device. Its operators are those of `operators.run`."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device="cpu",
            requires_grad=requires_grad,
        )
        made.elem = elem
        active().memory.allocate(elem, current_stream().known)
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.elem = value.elem

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass(), device_call(True):
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tests.simulated_gpu.operators import run

        return run(func, args, kwargs or {})

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*named(args), **kwargs)
        moved = self if dtype in (None, self.dtype) and not copy else super().to(dtype or self.dtype, copy=copy)
        return to_host(moved, non_blocking) if device is not None and device.type == "cpu" else moved

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return to_host(self, False)

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return to_host(self.detach(), False).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"device": CUDA, "dtype": self.dtype, **options})

    def record_stream(self, stream: Any) -> None:
        active().memory.record(self.detach().elem, stream.known)

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = copied(self, DeviceTensor(self.elem.clone()))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return to_host(self.detach(), False).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"


def named(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of `to`. Another tensor stands for its device and dtype; in C++ every tensor says that it is the host's."""
    return (args[0].device, args[0].dtype, *args[1:]) if args and isinstance(args[0], Tensor) else args


@contextmanager
def device_call(inside: bool) -> Iterator[None]:
    """While an operator in C++ runs on tensors of the device, it makes its own tensors there too."""
    before, _in_call.on = getattr(_in_call, "on", False), inside
    try:
        yield
    finally:
        _in_call.on = before


def in_device_call() -> bool:
    return getattr(_in_call, "on", False)


def engine(original: Any) -> Any:
    """A backward pass is no such operator. What runs in it, such as a recomputation, may again call some."""

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with torch._C._EnableTorchFunction(), device_call(False):
            return original(*args, **kwargs)

    return run_backward


def copied(original: Tensor, tensor: Tensor) -> Tensor:
    """A leaf with the marks of another one."""
    leaf: Tensor = nn.Parameter(tensor, original.requires_grad) if isinstance(original, nn.Parameter) else tensor
    leaf.__dict__.update(
        {name: value for name, value in original.__dict__.items() if name not in ("elem", "_is_param")}
    )
    return leaf.requires_grad_(original.requires_grad)


def move(what: Any) -> Any:
    """See `Gpu.move`. Parameters that are shared stay shared."""
    if isinstance(what, Tensor):
        return what if isinstance(what, DeviceTensor) else copied(what, DeviceTensor(what.detach().clone()))
    seen: dict[int, Tensor] = {}
    for module in what.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = seen.setdefault(id(tensor), move(tensor))
    return what


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DeviceTensor, non_blocking: bool) -> Tensor:
        return copy_to_host(tensor.detach().elem, None, non_blocking)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(CUDA), None


def to_host(tensor: Tensor, non_blocking: bool) -> Tensor:
    """`tensor.to("cpu")`. torch copies to pinned memory if it is not to block."""
    return _ToHost.apply(tensor, non_blocking)


def copy_to_host(source: Tensor, target: Tensor | None, non_blocking: bool) -> Tensor:
    """Copies a device tensor's `elem` to a host tensor, or to a new one."""
    gpu, stream = active(), current_stream().known
    if target is None:
        with _disable_current_modes():
            target = torch.empty_like(source)
        if non_blocking:
            pin(target)
    still_running = non_blocking and is_pinned(target)
    if still_running:
        gpu.memory.allocate(target, None)
    else:
        gpu.memory.host_use(target, True)
    gpu.kernel("copy to host", [source], [target], stream)
    with _disable_current_modes():
        target.copy_(source)
    if not still_running:
        why = "a copy to pageable memory" if non_blocking else "a blocking copy to the host"
        gpu.host_wait(why, stream)
    return target


def copy_to_device(source: Tensor, non_blocking: bool, target: Tensor) -> None:
    """Notes the copy of a host tensor to a device tensor's `elem`."""
    gpu, stream = active(), current_stream().known
    still_running = non_blocking and is_pinned(source)
    if still_running:
        gpu.memory.allocate(source, None)
    else:
        gpu.memory.host_use(source, False)
    gpu.kernel("copy to the device", [source], [target], stream)
    if not still_running:
        gpu.host_wait("a copy from pageable memory" if non_blocking else "a blocking copy to the device", stream)


def pin(tensor: Tensor) -> Tensor:
    """Marks the storage of a host tensor as pinned."""
    tensor.untyped_storage().pinned_here = True  # type: ignore[attr-defined]
    return tensor


def is_pinned(tensor: Tensor, *_: Any) -> bool:
    return getattr(tensor.untyped_storage(), "pinned_here", False)
