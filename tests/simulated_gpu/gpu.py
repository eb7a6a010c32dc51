"""What a simulated device notes: findings, waits of the host, launches by part and operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations

from tests.simulated_gpu.memory import Memory
from tests.simulated_gpu.places import TRANSFER, part, place, text

Phase = Literal["forward", "backward"]


class Launch(NamedTuple):
    """What was launched: in which pass, for which part of a pair (see places.PARTS), and by which operator."""

    phase: Phase
    part: str
    operator: str


class Kernel(NamedTuple):
    """A launch, its stream, its number, and the last number of each stream that is over before it begins."""

    launch: Launch
    stream: int
    number: int
    over: dict[int, int]

    def may_run_beside(self, other: Kernel) -> bool:
        """Whether nothing orders the two."""
        return self.over.get(other.stream, -1) < other.number and other.over.get(self.stream, -1) < self.number


class Gpu:
    """A device, as tests see it.

    Attributes:
        findings: what a real device could do wrong; each once.
        host_waits: how often the host waited for the device, by why and where.
        launches: how often what was launched; see `launched`.
        kernels: all launches, in the host's order.
        capability: the compute capability that it claims.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.findings: list[str] = []
        self.host_waits: Counter[str] = Counter()
        self.launches: Counter[Launch] = Counter()
        self.kernels: list[Kernel] = []
        self.names = {0: "the main stream"}
        self.clocks = StreamSynchronizations()
        self.memory = Memory(self.clocks, self.report, self.names)
        self.stashed: dict[int, Sequence[Tensor]] = {}
        self.nccl_streams: dict[Any, Any] = {}
        self._number = 0
        self._parts: dict[int, str] = {}  # by autograd's number of the operator's node

    def reset(self) -> None:
        """Forgets what was noted, not what streams and memory know."""
        self.findings.clear()
        self.host_waits.clear()
        self.launches.clear()
        self.kernels.clear()

    def launched(self, phase: Phase | None = None, part: str | None = None, operator: str | None = None) -> int:
        """The number of launches of a pass, part or operator; None: of all."""
        asked = phase, part, operator
        return sum(
            count
            for launch, count in self.launches.items()
            if all(each in (None, own) for each, own in zip(asked, launch, strict=True))
        )

    def hidden(self, phase: Phase) -> int:
        """The backbone's launches that may run while rows are on their way between the ranks."""
        of_phase = [each for each in self.kernels if each.launch.phase == phase]
        transfers = [each for each in of_phase if each.launch.part == TRANSFER and "nccl" in each.launch.operator]
        backbone = [each for each in of_phase if each.launch.part == "backbone"]
        return sum(any(each.may_run_beside(other) for other in transfers) for each in backbone)

    def move(self, what: Any) -> Any:
        """A tensor on the device; or a module, whose parameters and buffers are moved there."""
        from tests.simulated_gpu.tensors import move

        return move(what)

    def peek(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, as a host tensor. Nothing waits and nothing is noted."""
        return getattr(tensor.detach(), "elem", tensor.detach())

    def report(self, finding: str) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    def host_wait(self, why: str, stream: int | None = None) -> None:
        """The host waits, until a stream has done all that it has to do by now."""
        self.host_waits[f"{why} at {text(place())}"] += 1
        if stream is not None:
            self.clocks.all_streams_wait_for_stream(stream)

    def kernel(
        self, operator: str, reads: Sequence[Tensor], writes: Sequence[Tensor], stream: int, counts: bool = True
    ) -> None:
        """A stream gets a kernel, which reads and writes these (plain) tensors."""
        with self.memory.lock:
            self._number += 1
            at = place()
            self.clocks.update_seq_num(stream, self._number)
            for tensors, is_write in ((reads, False), (writes, True)):
                for tensor in tensors:
                    self.memory.use(tensor, stream, self._number, is_write, operator, at)
            if counts:
                launch = self._origin(operator)
                self.launches[launch] += 1
                self.kernels.append(Kernel(launch, stream, self._number, dict(self.clocks.current_sync_states[stream])))

    def _origin(self, operator: str) -> Launch:
        """A kernel of autograd's own belongs to the part whose operator's gradient it computes."""
        phase: Phase = "backward" if torch._C._current_graph_task_id() >= 0 else "forward"
        own = part()
        node = torch._C._current_autograd_node()
        if own is None and phase == "backward" and node is not None:
            own = self._parts.get(node._sequence_nr())
        return Launch(phase, own or "backbone", operator)

    def note_node(self) -> None:
        """Notes to which part autograd's newest node belongs."""
        self._parts.setdefault(torch.autograd._get_sequence_nr() - 1, part() or "backbone")


_active: list[Gpu] = []


def active() -> Gpu:
    """The device that is being simulated."""
    if not _active:
        raise RuntimeError("this stream, event or tensor is of a simulated device, and none is simulated now")
    return _active[-1]


def is_active(gpu: Gpu) -> bool:
    """Whether a device is still being simulated."""
    return gpu in _active
