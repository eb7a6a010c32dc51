"""Records one micro-batch of a training run and draws its timeline (--scmoe-trace)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from scmoe_ds.parallel.process import device
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.trace.timeline import save_timeline
from scmoe_ds.training.log import say


class StepTrace:
    """
    Args:
        engine: of `scmoe_ds.initialize`.
        iteration: to record. If its schedule is not final, the first later iteration with a final schedule is recorded.
            None records nothing.
        directory: of the timeline's files.
    """

    def __init__(self, engine: Any, iteration: int | None, directory: str) -> None:
        self.engine, self.iteration, self.directory = engine, iteration, directory
        self._done = iteration is None
        self._recorder: Recorder | None = None

    @property
    def is_recording(self) -> bool:
        """Whether the micro-batch under way is recorded."""
        return self._recorder is not None

    def begin(self, iteration: int) -> None:
        """Records what follows, if that is due in this iteration. Collective."""
        if self._done or iteration < (self.iteration or 0) or self.engine.overlap.calibrating:
            return
        self._done = True
        dist.barrier()  # all ranks' times begin here
        self._recorder = Recorder(device())
        self.engine.overlap.record(self._recorder)

    def end(self, iteration: int) -> None:
        """Draws what has been recorded. Collective."""
        if self._recorder is None:
            return
        self.engine.overlap.record(None)
        spans, self._recorder = self._recorder.spans(), None
        if not spans:  # on no rank, because all have the same layers
            say("--scmoe-trace: nothing to draw; DeepSpeed's own layers are not recorded")
            return
        try:
            say(f"wrote {' and '.join(map(str, save_timeline(spans, self.directory, iteration)))}")
        except Exception as error:  # on rank 0 alone; a picture is no reason to stop
            say(f"--scmoe-trace: not written: {error}")

    def close(self) -> None:
        """Says so when the run ended before anything was recorded."""
        if not self._done:
            say(
                f"--scmoe-trace {self.iteration}: not written, the run ended before that iteration, or before "
                "its schedule was chosen"
            )
