"""One call timed as a training step would find it: its weights out of the caches, its input just written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scmoe_ds.compat import keep_gpu_busy

EVICTED_BYTES = 64 << 20
"""More than the last level of any cache that a core has to itself."""
_AHEAD_CYCLES = 4_000_000
"""About 2 ms of a GPU: the host launches some hundred kernels in that time."""


@dataclass(frozen=True)
class Run:
    """A call.

    Attributes:
        written: tensors that the operator before it has just written: those are in the caches.
        little: the same on little data: a training step has used its code a short time ago.
    """

    call: Callable[[], object]
    written: Sequence[Tensor] = ()
    little: Callable[[], object] = lambda: None


NOTHING = Run(lambda: None)


class ColdClock:
    """Times calls on one device, on a GPU by events.

    Before each timed call other memory is written, more than the last cache holds. On a GPU a kernel that only waits
    goes first, so that the host is ahead and the time between launches does not count.

    Args:
        evicted_bytes: that are written; default: more than the caches of the device hold.
    """

    def __init__(self, device: torch.device, evicted_bytes: int | None = None) -> None:
        self.device = device
        if evicted_bytes is None:
            evicted_bytes = EVICTED_BYTES
            if device.type == "cuda":
                evicted_bytes = max(evicted_bytes, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._other = torch.zeros(evicted_bytes // 4, device=device)

    def get_cold(self, before: Run = NOTHING) -> None:
        """Empties the caches, fills them with what is in them before this call, and lets the host get ahead."""
        self._other.add_(1)
        before.little()
        for tensor in before.written:
            tensor.mul_(1)
        if self.device.type == "cuda":
            keep_gpu_busy(_AHEAD_CYCLES)

    def cold(self, run: Run) -> float:
        """Milliseconds of a call whose weights, and what a forward pass kept, are in no cache."""
        self.get_cold(run)
        return self.warm(run.call)

    def warm(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call as it is."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def host(self, call: Callable[[], object]) -> float:
        """Milliseconds from an idle device until a call is over, host and device."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - started)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
