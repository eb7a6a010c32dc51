"""Tensors of a GPU that have shapes, dtypes and a device, but no values: torch's FakeTensors, also without a GPU.

Tensors of the host stay what they are. So the host's own arithmetic, which decides what is run, is the program's; what
lies on the GPU has no memory. To read a value of the GPU is an error that names the line.

C++ sees the meta device in the place of "cuda": autograd asks for the current stream of a tensor's device, and without
a GPU a process of torch would end there. Python sees "cuda".
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scmoe_ds.compat import FakeTensor, FakeTensorMode, buffers_of, parameters_of, read_scalar
from scmoe_ds.errors import UserError

NOT_THE_PROGRAM = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
"""Where lines stand that nobody has to look at: torch's and the check's."""
HOST, META = torch.device("cpu"), torch.device("meta")
_SMALL, _LARGE = 16, 2**20
"""Elements. New floating-point tensors of the host that are not small are fake, too: they are for values that are not
known, such as the optimizer's states under offloading. So are large ones of integers."""
_READS = {read_scalar, torch.ops.aten.equal.default}
_DEVICE = torch.ops.prim.device.default
_UNWRITTEN = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}


class CheckError(UserError):
    """What would fail on the device, found without it."""


class Fakes(FakeTensorMode):
    """Inside the block, every new tensor of `device` is fake.

    Args:
        device: of the fakes.

    Attributes:
        meta: a mode that has to be entered, too.
        capacity: of the gate of DeepSpeed's own layers that runs, where it follows from the data.
        building: a model is being built: parameters begin as `torch.empty` on the host, and are fake from there on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.target, self.building, self.reads_of_engine = device, False, 0
        self.meta, self.capacity = _AskedForMeta(), 0

    def __deepcopy__(self, memo: Any) -> Fakes:
        return self  # a copy of a fake tensor has its mode

    @property
    def avoid_device_init(self) -> bool:
        """No operator may run on a GPU, not even one of a constant."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return META if args[0].device.type == self.target.type != "cpu" else args[0].device
        asks_for_meta = kwargs.get("device") == META
        if asks_for_meta:  # usually C++, for one like a tensor of the GPU
            kwargs["device"] = self.target
            if self.meta.asked:
                like: Any = super().__torch_dispatch__(func, types, args, kwargs)
                return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=META)
        if self._is_real(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _READS:
            return self._read(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _read(self, tensor: Tensor) -> Any:
        """DeepSpeed may read: norms and overflows of gradients once a step, and conditions in its own layers. They are
        zero here. On a CPU nobody waits for a condition; the rare case, which it asks for, has not come."""
        line, is_condition = _line(), tensor.dtype == torch.bool
        if "/deepspeed/moe/" in line and not is_condition:
            return self.capacity
        if "/deepspeed/runtime/" in line or (is_condition and (self.target == HOST or "/deepspeed/moe/" in line)):
            self.reads_of_engine += 1
            return torch.zeros((), dtype=tensor.dtype).item()
        raise CheckError(
            f"{line}: reads a value of a tensor on the GPU, for which the host has to wait; keep the value on the GPU, "
            "or compute the decision from shapes"
        )

    def _is_real(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an operator concerns real tensors of the host alone."""
        if kwargs.get("device") not in (None, HOST) or _any_fake(args) or _any_fake(tuple(kwargs.values())):
            return False
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else None
        if sizes is None or not all(isinstance(size, int) for size in sizes):
            return True
        if self.building and func in _UNWRITTEN:
            return False
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        are_values = dtype.is_floating_point or self.target == HOST
        return torch.Size(sizes).numel() <= (_SMALL if are_values else _LARGE)


class _AskedForMeta(TorchFunctionMode):
    """Tells a call that names the meta device in Python from C++'s own wish for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before, self.asked = self.asked, any(_is_meta(each) for each in (*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            self.asked = before


def _is_meta(value: Any) -> bool:
    return (isinstance(value, torch.device) and value == META) or (isinstance(value, str) and value == "meta")


def _any_fake(values: Sequence[Any]) -> bool:
    return any(
        isinstance(value, FakeTensor) or (isinstance(value, (list, tuple)) and _any_fake(value)) for value in values
    )


def _line() -> str:
    """Where the program stands: the innermost line that is not torch's."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(NOT_THE_PROGRAM):
            return f"{frame.filename}:{frame.lineno}"
    return "?"


@contextmanager
def building(fakes: Fakes) -> Iterator[None]:
    """Inside the block, the parameters of a model that is built are fake, on the host."""
    fakes.building = True
    try:
        yield
    finally:
        fakes.building = False


def without_values(model: nn.Module, fakes: Fakes) -> None:
    """Makes all parameters and buffers of a model fake, in place; most are already."""
    for module in model.modules():
        owns: list[Any] = [parameters_of(module), buffers_of(module)]
        for own in owns:
            for name, tensor in own.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    fake = fakes.from_tensor(tensor)
                    fake.__dict__.update(tensor.__dict__)
                    own[name] = fake
