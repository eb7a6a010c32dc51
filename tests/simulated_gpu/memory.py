"""Who uses which bytes, and whether the order of streams, events and host allows it.

A storage of the device belongs to the stream that it was allocated on. When its last reference goes, torch's caching
allocator gives it to that stream's next tensor; with `record_stream` only after what the recorded streams have to do at
that moment. Memory of the host is looked at while copies that nobody waits for read or write it. torch's own pinned
memory may be freed in the meantime: its allocator waits for the copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations

from tests.simulated_gpu.places import Place, place, text


@dataclass(frozen=True)
class Use:
    """An access of a kernel to the bytes [first, end) of a storage."""

    stream: int
    number: int
    first: int
    end: int
    writes: bool
    name: str
    at: Place


@dataclass
class Block:
    """A storage. Without a stream it is the host's."""

    stream: int | None
    at: Place
    recorded: set[int] = field(default_factory=set)
    uses: dict[tuple[int, int, int, bool], Use] = field(default_factory=dict)

    def conflicts(self, first: int, end: int, writes: bool) -> list[Use]:
        """Uses of the same bytes, if one of both is a write."""
        return [use for use in self.uses.values() if use.first < end and first < use.end and (writes or use.writes)]


class Memory:
    """All storages of the device, and those of the host that copies read or write without the host's waiting."""

    def __init__(self, clocks: StreamSynchronizations, report: Callable[[str], None], names: dict[int, str]) -> None:
        self.clocks, self.report, self.names = clocks, report, names
        self.blocks: dict[int, Block] = {}
        self.host_blocks = 0
        self.lock = threading.RLock()

    def allocate(self, tensor: Tensor, stream: int | None) -> None:
        """Notes the storage of a tensor, if it is new; `stream` None: of the host."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        with self.lock:
            if address and address not in self.blocks:
                self.blocks[address] = Block(stream, place())
                self.host_blocks += stream is None
                weakref.finalize(storage, self._free, address).atexit = False

    def use(self, tensor: Tensor, stream: int, number: int, writes: bool, name: str, at: Place) -> None:
        """A kernel reads or writes a tensor."""
        with self.lock:
            block = self.blocks.get(tensor.untyped_storage().data_ptr())
            if block is None or tensor.numel() == 0:
                return
            first, end = extent(tensor)
            for other in block.conflicts(first, end, writes):
                if not self.clocks.is_ordered_after(stream, other.number, other.stream):
                    self._conflict("race", f"{name} on {self.names[stream]} ({text(at)})", writes, other)
            block.uses[stream, first, end, writes] = Use(stream, number, first, end, writes, name, at)

    def host_use(self, tensor: Tensor, writes: bool) -> None:
        """The host itself reads or writes one of its tensors."""
        with self.lock:
            block = self.blocks.get(tensor.untyped_storage().data_ptr()) if self.host_blocks else None
            if block is None or block.stream is not None or tensor.numel() == 0:
                return
            for other in block.conflicts(*extent(tensor), writes):
                if self.clocks.host_sync_state.get(other.stream, -1) < other.number:
                    self._conflict("too early", f"the host ({text(place())})", writes, other)

    def record(self, tensor: Tensor, stream: int) -> None:
        """`tensor.record_stream(stream)`."""
        block = self.blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            block.recorded.add(stream)

    def _free(self, address: int) -> None:
        with self.lock:
            block = self.blocks.pop(address)
            if block.stream is None:
                self.host_blocks -= 1
                return
            last: dict[int, Use] = {}
            for use in block.uses.values():
                if use.stream not in last or last[use.stream].number < use.number:
                    last[use.stream] = use
            for stream, use in last.items():
                safe = {block.stream} | block.recorded
                if not any(each == stream or self.clocks.is_ordered_after(each, use.number, stream) for each in safe):
                    self.report(
                        f"use after free: memory of {self.names[block.stream]} ({text(block.at)}) is freed, and "
                        f"{self._describe(use)} may not be over"
                    )

    def _conflict(self, kind: str, who: str, writes: bool, other: Use) -> None:
        does, did = ("writes" if each else "reads" for each in (writes, other.writes))
        self.report(f"{kind}: {who} {does} what {self._describe(other)} {did}")

    def _describe(self, use: Use) -> str:
        return f"{use.name} on {self.names[use.stream]} ({text(use.at)})"


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    return first, first + (last + 1) * tensor.element_size()
