"""NCCL over gloo: every process group has a stream of its own.

With `async_op=True` a collective runs there, between two events, and the work keeps its tensors alive until somebody
waits for it. That wait orders the current stream only, and drops the tensors (torch 2.8 and later). Without, it runs on
the current stream.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.simulated_gpu.gpu import active
from tests.simulated_gpu.operators import leaves, plain
from tests.simulated_gpu.places import place, text
from tests.simulated_gpu.streams import Stream, current_stream
from tests.simulated_gpu.tensors import DeviceTensor

IN_PLACE, SECOND_TO_FIRST = ((0,), (0,)), ((0,), (1,))
COLLECTIVES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "reduce"), IN_PLACE),
    **dict.fromkeys(("all_to_all_single", "alltoall_base", "alltoall"), SECOND_TO_FIRST),
    **dict.fromkeys(("all_gather_single", "_allgather_base", "allgather", "allgather_coalesced"), SECOND_TO_FIRST),
    **dict.fromkeys(("all_gather_single_coalesced", "allgather_into_tensor_coalesced"), SECOND_TO_FIRST),
    **dict.fromkeys(("reduce_scatter_single", "_reduce_scatter_base", "reduce_scatter"), SECOND_TO_FIRST),
    **dict.fromkeys(("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"), SECOND_TO_FIRST),
    **dict.fromkeys(("gather", "scatter"), SECOND_TO_FIRST),
    "send": ((), (0,)),
    "recv": ((0,), ()),
}
"""Methods of a process group, under the names of all versions of torch: which arguments are written, and which read."""
_inner = threading.local()


class Work:
    """What NCCL returns for `async_op=True`."""

    def __init__(self, stream: Stream, tensors: Sequence[Tensor]) -> None:
        self.event = stream.record_event()
        active().stashed[id(self.event)] = tensors  # by NCCL's watchdog too: also if the work itself is dropped
        self._event_id = id(self.event)

    def wait(self, timeout: Any = None) -> bool:
        self.event.wait()
        if timeout is not None:
            self.event.synchronize()
        active().stashed.pop(self._event_id, None)
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        return self.event.query()

    is_success = is_completed


class Done:
    """What a collective on the current stream returns."""

    def wait(self, timeout: Any = None) -> bool:
        return True


def launch(
    name: str, group: Any, is_async: bool, reads: Sequence[Tensor], writes: Sequence[Tensor], run: Callable[[], object]
) -> Work | Done:
    """Notes a collective and runs it at once."""
    gpu, stream = active(), current_stream()
    if is_async:
        ranks = dist.get_process_group_ranks(group)
        stream = gpu.nccl_streams.setdefault(id(group), (group, Stream(name=f"NCCL's stream of ranks {ranks}")))[1]
        stream.wait_stream(current_stream())
    for tensor in (*reads, *writes):
        if not tensor.is_contiguous():
            gpu.report(f"NCCL {name}: a tensor is not contiguous at {text(place())}")
    gpu.kernel(f"nccl {name}", plain(list(reads)), plain(list(writes)), stream.known)
    _inner.on = True
    try:
        with _disable_current_modes():
            run()
    finally:
        _inner.on = False
    return Work(stream, [*reads, *writes]) if is_async else Done()


def collective(name: str, original: Any) -> Any:
    """A method of `ProcessGroup`, in whose place it is put."""
    written, read = COLLECTIVES[name]

    @functools.wraps(original)
    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(leaves(args))
        if getattr(_inner, "on", False) or not any(isinstance(each, DeviceTensor) for each in tensors):
            if not getattr(_inner, "on", False):
                _on_host(name)
            return original(group, *args, **kwargs)
        options = next((each for each in args if hasattr(each, "asyncOp")), None)
        reads, writes = ([t.detach() for i in which for t in leaves(args[i])] for which in (read, written))
        return launch(
            name,
            group,
            getattr(options, "asyncOp", True),
            reads,
            writes,
            lambda: _over_gloo(lambda sent: original(group, *sent, **plain(kwargs)), plain(args), written),
        )

    return method


def _over_gloo(start: Callable[[Any], Any], args: Sequence[Any], written: Sequence[int]) -> None:
    """Runs a collective on copies: gloo's thread holds its tensors a moment longer than whoever waits for it, and when
    the memory of a tensor of the device is freed must not depend on that."""
    copies = [torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, each) for each in args]
    start(copies).wait()
    for i in written:
        for mine, copy in zip(leaves(args[i]), leaves(copies[i]), strict=True):
            mine.copy_(copy)


def _on_host(name: str) -> None:
    """NCCL refuses tensors of the host. torch moves pickled objects to the device, and back with a copy that blocks."""
    if any(each.endswith(("_object", "_object_list")) for each in _callers()):
        active().host_wait("a collective of objects")
    else:
        active().report(f"device mix: NCCL {name} of host tensors at {text(place())}")


def _callers() -> Iterator[str]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def barrier(original: Any) -> Any:
    """NCCL's barrier is an all-reduce for which the host waits."""

    @functools.wraps(original)
    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        active().host_wait("a barrier", current_stream().known)
        return original(group, *args, **kwargs)

    return method


def batch_isend_irecv(original: Any) -> Any:
    """One work for all operations, as NCCL's."""

    def batch(operations: Sequence[dist.P2POp]) -> list[Any]:
        tensors = [each.tensor.detach() for each in operations]
        if not any(isinstance(each, DeviceTensor) for each in tensors):
            return original(operations)
        writes = [each for each, operation in zip(tensors, operations, strict=True) if operation.op is dist.irecv]
        reads = [each for each, operation in zip(tensors, operations, strict=True) if operation.op is not dist.irecv]

        def run() -> None:
            copies = [plain(each).clone() for each in tensors]  # as in `_over_gloo`
            for work in original(
                [dist.P2POp(o.op, t, o.peer, o.group) for o, t in zip(operations, copies, strict=True)]
            ):
                work.wait()
            for operation, mine, copy in zip(operations, tensors, copies, strict=True):
                if operation.op is dist.irecv:
                    plain(mine).copy_(copy)

        group = operations[0].group or dist.group.WORLD
        return [launch("send and receive", group, True, reads, writes, run)]

    return batch
