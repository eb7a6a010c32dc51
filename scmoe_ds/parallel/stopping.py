"""Stopping all ranks at the same iteration, for a signal to one of them or a limit of time."""

from __future__ import annotations

import signal
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send ahead of a preemption."""
_TIME_IS_UP = 1


class StopRequest:
    """Context manager that listens for `SIGNALS`; a rank that has heard one tells the others at the next `agreed`.

    Args:
        minutes: from now; None is no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._heard = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._heard = number

    def agreed(self) -> str | None:
        """Why all ranks are to stop now, or None; the same on every rank. Collective."""
        time_is_up = self._deadline is not None and time.monotonic() >= self._deadline
        code = self._heard or (_TIME_IS_UP if time_is_up else 0)
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        heard = torch.tensor(code, device=device)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        found = int(heard)
        if found == 0:
            return None
        return "--exit-duration-in-mins is over" if found == _TIME_IS_UP else f"{signal.Signals(found).name} received"
