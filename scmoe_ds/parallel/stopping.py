"""Stops all ranks at the same iteration: after a signal to one of them, at a time limit, or after a bad step."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that schedulers send before a preemption."""
_TIME_IS_UP = 1
listening = False
"""Whether a StopRequest of this process hears the signals."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step: why they stop (None: they do not), and the largest finding of all ranks."""

    reason: str | None
    finding: int


class StopRequest:
    """Context manager that listens for `SIGNALS`. A rank that has received one tells the others at the next `agreed`.

    Args:
        minutes: time limit from now; None is no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._heard = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        global listening
        listening = True
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        global listening
        listening = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._heard = number

    def agreed(self, finding: Tensor | int = 0) -> Agreement:
        """The same result on every rank. Collective, once per step. The host waits for the device.

        Args:
            finding: of this rank, 0 for none; a scalar on any device.
        """
        time_is_up = self._deadline is not None and time.monotonic() >= self._deadline
        code = self._heard or (_TIME_IS_UP if time_is_up else 0)
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        both = torch.stack([torch.as_tensor(each, dtype=torch.int64, device=device) for each in (code, finding)])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        heard, found = both.tolist()
        if heard == 0:
            return Agreement(None, found)
        reason = "--exit-duration-in-mins is over" if heard == _TIME_IS_UP else f"{signal.Signals(heard).name} received"
        return Agreement(reason, found)
