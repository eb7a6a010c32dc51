"""Records one micro-batch of a training run, or one pass of generation, and draws its timeline (--scmoe-trace)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from scmoe_ds.parallel.output import log
from scmoe_ds.parallel.process import device
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.trace.timeline import save_timeline


class Recorded(Protocol):
    """What can be recorded: a `Calibrator`, or passes of generation."""

    @property
    def calibrating(self) -> bool:
        """Whether the schedule of what comes next is not final yet."""

    def record(self, recorder: Recorder | None) -> None:
        """Has all pairs report to a recorder from the next forward pass on, or to none."""


class StepTrace:
    """
    Args:
        recorded: whose spans are drawn.
        iteration: to record, from 1. If its schedule is not final, the first later one with a final schedule is
            recorded. None records nothing.
        directory: of the timeline's files.

    Attributes:
        is_recording: whether the micro-batch under way is recorded.
    """

    def __init__(self, recorded: Recorded, iteration: int | None, directory: str) -> None:
        self.recorded, self.iteration, self.directory = recorded, iteration, directory
        self._done, self.is_recording = iteration is None, False
        self._recorder: Recorder | None = None
        self._recorded = 0  # which iteration

    def begin(self, iteration: int) -> None:
        """Records what follows, if that is due in this iteration. Collective."""
        if self._done or iteration < (self.iteration or 0) or self.recorded.calibrating:
            return
        self._done = self.is_recording = True
        dist.barrier()  # all ranks' times begin here
        if device().type == "cuda":
            torch.cuda.synchronize()  # and those of the host's clock and the GPU's
        self._recorder = Recorder(device())
        self.recorded.record(self._recorder)

    def end(self, iteration: int) -> None:
        """Ends the recording."""
        if self.is_recording:
            self.recorded.record(None)
            self.is_recording, self._recorded = False, iteration

    def draw(self) -> None:
        """Draws what has been recorded, once. Collective."""
        if self._recorder is None:
            return
        spans, self._recorder = self._recorder.spans(), None
        if not spans:  # on no rank, because all have the same layers
            log("--scmoe-trace: nothing to draw; DeepSpeed's own layers are not recorded")
            return
        try:
            log(f"wrote {' and '.join(map(str, save_timeline(spans, self.directory, self._recorded)))}")
        except Exception as error:  # on rank 0 alone; a picture is no reason to stop
            log(f"--scmoe-trace: not written: {error}")

    def close(self) -> None:
        """Draws what has not been drawn, or says that the run ended before anything was recorded. Collective."""
        self.draw()
        if not self._done:
            log(
                f"--scmoe-trace {self.iteration}: not written, the run ended before that iteration, or before "
                "its schedule was chosen"
            )
