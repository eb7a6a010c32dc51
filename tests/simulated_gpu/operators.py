"""Every operator of PyTorch, as it would be launched: on the current stream, reading and writing bytes of the device."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.simulated_gpu.gpu import Gpu, active, is_active
from tests.simulated_gpu.places import place, text
from tests.simulated_gpu.streams import CUDA, current_stream
from tests.simulated_gpu.tensors import DeviceTensor, copy_to_device, copy_to_host, in_device_call, named, pin

COPIES = {"_to_copy", "copy_"}
NO_KERNEL = set(
    "_fused_sdp_choice detach lift_fresh empty empty_like empty_strided new_empty new_empty_strided".split()
)
"""Beside views: what runs on the host alone."""
WAITING = set(
    "_local_scalar_dense bincount equal is_nonzero masked_select nonzero unique_consecutive _unique2 unique_dim".split()
)
"""The host waits in these for a size or a value."""


class DeviceMode(TorchDispatchMode):
    """Sees every operator of this thread, those of the host too."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_active(self.gpu):  # a thread that outlives the simulation
            return func(*args, **(kwargs or {}))
        if torch.is_inference_mode_enabled():  # without autograd, nobody has taken it apart
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    gpu, name = active(), func._schema.name.removeprefix("aten::")
    tensors = list(leaves((args, tuple(kwargs.values()))))
    ours = [each for each in tensors if isinstance(each, DeviceTensor)]
    hosts = [each for each in tensors if not isinstance(each, DeviceTensor) and not each.is_meta]
    device = kwargs.get("device")
    made_here = is_cuda(device) or (not tensors and in_device_call())
    if kwargs.pop("pin_memory", False):
        return pin(func(*args, **kwargs))
    if not ours and not made_here:
        return _on_host(gpu, func, args, kwargs, hosts)
    if made_here:
        kwargs["device"] = torch.device("cpu")
    assert not name.startswith("c10d::"), f"{name} is not simulated; see nccl.COLLECTIVES"
    gpu.note_node()
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        copy_to_host(args[1].elem, args[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        return args[0]
    plain_args, plain_kwargs = plain(args), plain(kwargs)
    outputs = func(*plain_args, **plain_kwargs)
    known = {id(each.elem): each for each in ours}
    # In inference mode, a view is an inference tensor where its base is one.
    normal = is_view(func) and torch.is_inference_mode_enabled() and not any(each.is_inference() for each in ours)
    with torch.inference_mode(False) if normal else nullcontext():
        wrapped = wrap(outputs, known)
    if name in COPIES and hosts:
        copy_to_device(hosts[0], kwargs.get("non_blocking", len(args) > 2 and args[2]), wrapped.elem)
        return wrapped
    if any(each.dim() for each in hosts):
        _mixed(gpu, name, hosts)
    if not (is_view(func) or name in NO_KERNEL):
        written = [each.elem for each in leaves(written_arguments(func, args, kwargs))]
        made = [each.elem for each in leaves(wrapped) if id(each.elem) not in known]
        reads = [each.elem for each in ours if not any(each.elem is other for other in written)]
        writes = [*written, *made]
        counts = not writes or any(each.numel() for each in writes)
        stream = current_stream().known
        gpu.kernel(name, reads, writes, stream, counts)
        if waits(gpu, name, args, kwargs):
            gpu.host_wait(f"aten::{name}", stream)
    return wrapped


def _on_host(gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any], hosts: list[Tensor]) -> Any:
    if gpu.memory.host_blocks and not is_view(func) and func._schema.name.removeprefix("aten::") not in NO_KERNEL:
        written = list(leaves(written_arguments(func, args, kwargs)))
        for tensor in hosts:
            gpu.memory.host_use(tensor, any(tensor is other for other in written))
    return func(*args, **kwargs)


def _mixed(gpu: Gpu, name: str, hosts: list[Tensor]) -> None:
    if name.startswith("index") and not name.startswith("index_"):
        gpu.host_wait(f"aten::{name} with an index on the host", current_stream().known)
    else:
        gpu.report(f"device mix: {name} with host tensors {[tuple(each.shape) for each in hosts]} at {text(place())}")


def waits(gpu: Gpu, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits in an operator for a value of the device."""
    if name in ("index", "index_put", "index_put_"):
        filled = name != "index" and args[2].numel() == 1 and not isinstance(args[2], DeviceTensor)  # masked_fill
        return not filled and any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if name == "_grouped_mm":
        return gpu.capability < (9, 0)
    return name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None)


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operator returns other views of its arguments, and launches nothing."""
    if func._schema.name == "aten::_unsafe_view":
        return True
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, each.name) for i, each in arguments if each.alias_info is not None and each.alias_info.is_write)


def written_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]


def leaves(value: Any) -> Any:
    """All tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)


def plain(value: Any) -> Any:
    """Arguments with the host tensors behind those of the device."""
    if isinstance(value, DeviceTensor):
        return value.elem
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return type(value)(plain(each) for each in value) if type(value) in (list, tuple) else value


def wrap(value: Any, known: dict[int, DeviceTensor]) -> Any:
    """Results as tensors of the device; an argument that is returned stays the very one."""
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else DeviceTensor(value)
    return type(value)(wrap(each, known) for each in value) if type(value) in (list, tuple) else value


def is_cuda(device: Any) -> bool:
    """Whether an argument names the device."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def with_index(original: Any) -> Any:
    """`Tensor.to`: in C++, "cuda" without a number asks CUDA for it."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = named(args)
        args = tuple(CUDA if is_cuda(each) else each for each in args)
        return original(self, *args, **{name: CUDA if is_cuda(each) else each for name, each in kwargs.items()})

    return to


def make_tensor(original: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor`, which copy in C++ below every mode."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, Tensor) and original.__name__ == "as_tensor":
            return data.to(device=device, dtype=options.get("dtype"))
        tensor = original(data, *args, **options)
        return tensor.to(CUDA) if is_cuda(device) else tensor

    return made


def fused(name: str, function: Any) -> Any:
    """A function of tensors, such as the reference of a Triton kernel, as one kernel of the device."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        ours = [each for each in leaves((args, tuple(kwargs.values()))) if isinstance(each, DeviceTensor)]
        with _disable_current_modes():
            outputs = function(*plain(args), **plain(kwargs))
        if not ours:
            return outputs
        known = {id(each.elem): each for each in ours}
        wrapped = wrap(outputs, known)
        made = [each.elem for each in leaves(wrapped) if id(each.elem) not in known]
        active().kernel(name, [each.elem for each in ours], made, current_stream().known)
        return wrapped

    return kernel
