"""Ends a rank whose GPU waits in vain for other ranks, in our words, before NCCL ends it without any.

With gloo a collective that nobody joins raises an exception after its timeout. NCCL's collectives only order streams:
the host goes on until it needs a number of the GPU, and stands. After the timeout NCCL's own watchdog aborts the
process from C++, and no Python runs any more. So a thread looks, a little earlier: has the main thread stood at one
place, with work of the GPU outstanding, for almost the timeout?

A thread that saves, loads data, compiles or is in a debugger stands too, but the GPU is soon done then. Time is counted
in looks, so that a machine that slept has not waited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from scmoe_ds.errors import ExchangeError
from scmoe_ds.parallel import standing
from scmoe_ds.parallel.failures import at_iteration
from scmoe_ds.parallel.standing import Standing, device_is_busy

_LOOK_S = 1.0
_EARLIER_S = 10.0
"""By so much NCCL's watchdog is forestalled: it counts from the launch, this one from the moment at which the host
stands, and before its last word a rank listens whether another one names a cause."""


class StallWatch(threading.Thread):
    """Watches the main thread. Start it once the ranks have met.

    Args:
        timeout_s: of collectives.
        end: says the error in a sentence and ends the process; `FailureReporter.end`.
        thread, is_busy: who stands, and whether the GPU has work; for tests.
        look_s: seconds between two looks.
    """

    def __init__(
        self,
        timeout_s: float,
        end: Callable[[Exception], NoReturn],
        thread: Standing | None = None,
        is_busy: Callable[[], bool] = device_is_busy,
        look_s: float = _LOOK_S,
    ) -> None:
        super().__init__(name="scmoe-stalls", daemon=True)
        self._limit_s, self._look_s = timeout_s - min(_EARLIER_S, timeout_s / 3), look_s
        self._end, self._standing, self._is_busy = end, thread or Standing(), is_busy

    def run(self) -> None:
        """Looks until the process ends, one way or the other."""
        stood_s, before = 0.0, time.monotonic()
        while stood_s < self._limit_s:
            time.sleep(self._look_s)
            elapsed_s, before = time.monotonic() - before, time.monotonic()
            stands = not self._standing.has_moved() and self._is_busy()
            stood_s = stood_s + min(elapsed_s, 2 * self._look_s) if stands else 0.0
        self._end(self._error(stood_s))

    def _error(self, stood_s: float) -> ExchangeError:
        ranks, me = range(dist.get_world_size()), dist.get_rank()
        error = ExchangeError(
            "communication between ranks",
            ranks,
            [rank for rank in ranks if rank != me],
            f"timed out: for {stood_s:.0f} s the GPU has not gone on, and the host waits for it in "
            f"{self._standing.place}; the last that it has reached is {standing.reached}",
        )
        if standing.iteration is not None:
            at_iteration(error, standing.iteration)
        return error
