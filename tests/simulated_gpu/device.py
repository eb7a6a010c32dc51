"""A CUDA device without a GPU.

    with simulated_gpu(capability=(8, 0)) as gpu:
        model = gpu.move(model)
        model(gpu.move(tokens)).sum().backward()
    assert gpu.findings == []

Tensors lie in the host's memory and say that they are on cuda:0. Everything runs at once, in the order of the host.
What is checked is whether streams and events would make a real device run it in an order with the same result
(memory.py), what the host would wait for, and how many kernels would be launched for which part of a pair (gpu.py). It
cannot see how fast a kernel is, kernels that compete for multiprocessors, deadlocks between communicators, the order of
atomic additions, or what an architecture supports. Backward passes run on the stream of their caller.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.cuda._sanitizer
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch import Tensor

from scmoe_ds.comm.side_stream import side_stream
from tests.simulated_gpu import gpu as state
from tests.simulated_gpu import nccl, streams
from tests.simulated_gpu.gpu import Gpu
from tests.simulated_gpu.operators import DeviceMode, fused, make_tensor, with_index
from tests.simulated_gpu.tensors import engine, is_pinned, pin

__all__ = ["NEEDS_SIMULATION", "fused", "simulated_gpu"]

GIB = 1 << 30
PRIVATE = {
    torch._C: (
        "DisableTorchFunctionSubclass",
        "_EnableTorchFunction",
        "_current_autograd_node",
        "_current_graph_task_id",
    ),
    torch.autograd: ("_engine_run_backward", "_get_sequence_nr"),
    torch.cuda._sanitizer.StreamSynchronizations: ("all_streams_wait_for_event", "is_ordered_after", "record_state"),
}
"""What the simulation touches of torch's private parts."""
_missing = [name for owner, names in PRIVATE.items() for name in names if not hasattr(owner, name)]
NEEDS_SIMULATION = pytest.mark.skipif(
    bool(_missing), reason=f"torch {torch.__version__} has no {', '.join(_missing)}, which the simulated device needs"
)


@contextmanager
def simulated_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Gpu]:
    """Everything inside sees one CUDA device; the threads that are started inside, too.

    Args:
        capability: the compute capability that it claims; (8, 0) is an A800.
    """
    gpu = Gpu(capability)
    with ExitStack() as stack:
        for owner, names in _replacements(gpu):
            for name, value in names.items():
                stack.enter_context(_replaced(owner, name, value))
        side_stream.cache_clear()
        stack.callback(side_stream.cache_clear)
        state._active.append(gpu)
        stack.callback(state._active.remove, gpu)
        stack.enter_context(DeviceMode(gpu))
        yield gpu


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = vars(owner).get(name)  # getattr would unwrap a method
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def _replacements(gpu: Gpu) -> list[tuple[Any, dict[str, Any]]]:
    """What is put in the place of what: of torch, torch.distributed, DeepSpeed and threading."""
    methods = nccl.COLLECTIVES.keys() & vars(dist.ProcessGroup).keys()
    groups = {name: nccl.collective(name, getattr(dist.ProcessGroup, name)) for name in methods}
    host_methods = {
        name: _host_use(getattr(Tensor, name), name == "numpy") for name in ("tolist", "numpy", "__array__")
    }
    return [
        (torch.cuda, _cuda(gpu.capability)),
        (torch.cuda.nvtx, {"range_push": lambda *_: 0, "range_pop": lambda: 0}),
        (torch, {"tensor": make_tensor(torch.tensor), "as_tensor": make_tensor(torch.as_tensor)}),
        (Tensor, {**host_methods, **_host_methods()}),
        (torch.autograd, {"_engine_run_backward": engine(torch.autograd._engine_run_backward)}),
        (dist.ProcessGroup, {**groups, "barrier": nccl.barrier(dist.ProcessGroup.barrier)}),
        (dist, {"batch_isend_irecv": nccl.batch_isend_irecv(dist.batch_isend_irecv), "get_backend": lambda *_: "nccl"}),
        (real_accelerator, {"ds_accelerator": CUDA_Accelerator()}),
        (threading.Thread, {"run": _thread_run(gpu, threading.Thread.run)}),
    ]


def _host_methods() -> dict[str, Any]:
    to = with_index(Tensor.to)
    return dict(
        cuda=lambda self, device=None, non_blocking=False, **_: to(self, "cuda", non_blocking=non_blocking),
        is_pinned=is_pinned,
        pin_memory=lambda self, *_: pin(self.clone()),
        to=to,
    )


def _cuda(capability: tuple[int, int]) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="simulated GPU", major=capability[0], minor=capability[1], total_memory=80 * GIB, multi_processor_count=108
    )
    return dict(
        Event=streams.Event,
        Stream=streams.Stream,
        _lazy_init=lambda: None,
        current_device=lambda: 0,
        current_stream=streams.current_stream,
        default_stream=lambda *_: streams.MAIN,
        device=lambda *_: nullcontext(),
        device_count=lambda: 1,
        get_device_capability=lambda *_: capability,
        get_device_name=lambda *_: properties.name,
        get_device_properties=lambda *_: properties,
        get_rng_state=lambda *_: torch.get_rng_state(),
        is_available=lambda: True,
        is_bf16_supported=lambda *_, **__: True,
        max_memory_allocated=lambda *_: 0,
        mem_get_info=lambda *_: (80 * GIB, 80 * GIB),
        memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=lambda *_: None,
        set_device=lambda *_: None,
        set_rng_state=lambda new_state, *_: torch.set_rng_state(new_state),
        set_stream=streams.set_stream,
        stream=streams.use_stream,
        synchronize=streams.synchronize,
    )


def _host_use(original: Any, writes: bool) -> Any:
    """A method that reads a host tensor without an operator; what `numpy` gives may be written."""

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        state.active().memory.host_use(self, writes)
        return original(self, *args, **kwargs)

    return method


def _thread_run(gpu: Gpu, original: Any) -> Any:
    """Modes are of one thread."""

    def run(self: threading.Thread) -> None:
        with DeviceMode(gpu):
            original(self)

    return run
