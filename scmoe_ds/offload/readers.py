"""How an expert's parameters travel to the device: on readers, each of which makes its copies one after another.

A reader beside a GPU has a copy stream of its own. Events order it against the stream that computes: a copy begins
when the kernels have ended that read what it writes over, and `Arrival.wait` has later kernels wait for the copy. The
host that computes waits for neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scmoe_ds.offload.pages import page_memory
from scmoe_ds.offload.pinned import pinned_pages
from scmoe_ds.trace.migrations import MigrationWatch, noted


class Arrival(Protocol):
    """A copy under way, or other work with an end. A CUDA event is one."""

    def wait(self) -> None:
        """After it, work that is enqueued on the current stream comes after that end. On a CPU the end has come.

        Raises:
            ExpertFileError: the file did not give what it should.
        """


@dataclass(frozen=True)
class Copied:
    """A copy that has been launched; None on a CPU, where it is over."""

    event: torch.cuda.Event | None

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class Reader:
    """Copies in order to one device.

    Args:
        device: the GPU, or the CPU.
        number: from 0.
    """

    def __init__(self, device: torch.device, number: int = 0) -> None:
        self.number = number
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: Arrival | None, watch: MigrationWatch | None
    ) -> Copied:
        """Launches copies of the second of each pair, in host memory, into the first, and returns at once.

        Beside a GPU the host memory is pinned, and stays as it is until the copy has ended.

        Args:
            after: what must have ended before the tensors may be written; None: nothing.
            watch: is told when the copy began and ended.
        """
        with torch.inference_mode(), self._current():
            if after is not None:
                after.wait()
            with noted(watch, "copy", self.number, sum(value.nbytes for _, value in pairs)):
                for into, value in pairs:
                    into.copy_(value, non_blocking=True)
            if self._stream is None:
                return Copied(None)
            for into, _ in pairs:
                into.record_stream(self._stream)  # a model may be dropped while its experts are still coming
            event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            event.record(self._stream)
            return Copied(event)

    @contextmanager
    def _current(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):  # and its device, which a new thread does not have
                yield


class BufferedReader(Reader):
    """Reads files into buffers of whole pages, and copies on from there; of one thread at a time.

    Beside a GPU it has two pinned buffers: one is filled while the other is copied.

    Args:
        device, number: of `Reader`.
        nbytes: of a buffer.
    """

    def __init__(self, device: torch.device, number: int, nbytes: int) -> None:
        super().__init__(device, number)
        gpu = device.type == "cuda"
        self._buffers = deque(
            (pinned_pages(nbytes, "--expert-tier disk") if gpu else page_memory(nbytes), Copied(None))
            for _ in range(1 + gpu)
        )

    def read(
        self,
        fill: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        into: Tensor,
        after: Arrival | None,
        watch: MigrationWatch | None,
    ) -> Copied:
        """Fills the buffer that was copied longest ago, and launches its copy.

        Args:
            fill: gets a buffer, [nbytes] uint8 from the start of a page, and returns the part to copy.
            dtype: of that part.
            into, after, watch: as for `copy`.
        """
        buffer, copied = self._buffers.popleft()
        try:
            if copied.event is not None:
                copied.event.synchronize()  # of this reader's thread alone
            with noted(watch, "read", self.number, into.numel() * dtype.itemsize):
                value = fill(buffer).view(dtype)
            copied = self.copy([(into, value)], after, watch)
        finally:
            self._buffers.append((buffer, copied))
        return copied

    def read_straight(
        self,
        fill: Callable[[], None],
        nbytes: int,
        copied: Sequence[tuple[Tensor, Tensor]],
        after: Arrival | None,
        watch: MigrationWatch | None,
    ) -> Copied:
        """Reads into memory of the CPU where it is needed, without a buffer.

        Args:
            fill: reads `nbytes`.
            copied, after, watch: as for `copy`.
        """
        if after is not None:
            after.wait()
        if nbytes:
            with noted(watch, "read", self.number, nbytes):
                fill()
        return self.copy(copied, None, watch) if copied else Copied(None)
