"""Two micro-batches on their way: the forward pass of one beside the backward pass of the one before it.

The other way to hide an all-to-all: beside the computation of another micro-batch, with any architecture. It is that of
Megatron-core's --overlap-moe-expert-parallel-comm and of DualPipe, and this package does not run it. Pair by pair, the
two passes take turns in a fixed order, so that each transfer has an operator of the other pass beside it:

    transfers       combine'              dispatch               dispatch'           combine
    computation     before the tap, gate  experts'               experts             encode', before the tap'

A dash marks the backward pass. A shared expert of the model runs behind the launch of its pass's combine. A step needs
two micro-batches at least, and the activations of two are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scmoe_ds.planner.lanes import Event, Phase
from scmoe_ds.planner.times import PassTimes
from scmoe_ds.simulate.times import PairTimes


def both_passes(forward: PairTimes, backward: PairTimes) -> list[Event]:
    """The program of a pair going forward, and of a pair going backward, on every class of ranks.

    It is a program for a forward pass: the backward pass's times are its forward times, its order is reversed already.
    """
    ahead, back = _Pass(forward, "forward", 0), _Pass(backward, "backward", 2)
    return [
        back.compute("decode"),
        back.launch("combine", 0),
        *back.backbone(),
        ahead.before(),
        ahead.compute("gate"),
        ahead.compute("encode"),
        ahead.launch("dispatch", 0),
        back.wait("combine", 0),
        back.experts(),
        back.launch("dispatch", 1),
        ahead.wait("dispatch", 0),
        ahead.experts(),
        ahead.launch("combine", 1),
        *ahead.backbone(),
        back.wait("dispatch", 1),
        back.compute("encode"),
        back.compute("gate"),
        back.before(),
        ahead.wait("combine", 1),
        ahead.compute("decode"),
    ]


class _Pass:
    """Events of a pair in one phase.

    Args:
        first: number of its first transfer.
    """

    def __init__(self, pair: PairTimes, phase: Phase, first: int) -> None:
        self._before, self._by_class, self._first = pair.before, pair.by_class, first
        self._is_forward = phase == "forward"
        self._part = pair.by_class[0].chunks[1]

    def before(self) -> Event:
        return self._computing("before tap", [self._before] * len(self._by_class))

    def compute(self, part: Literal["gate", "encode", "decode"]) -> Event:
        return self._computing(part, [getattr(each, part) for each in self._by_class])

    def experts(self) -> Event:
        return self._computing("experts", [each.chunks[1].experts for each in self._by_class])

    def backbone(self) -> list[Event]:
        operators = zip(*(each.backbone for each in self._by_class), strict=True)
        events = [self._computing(of_classes[0].name, of_classes) for of_classes in operators]
        return events if self._is_forward else events[::-1]

    def launch(self, part: Literal["dispatch", "combine"], number: int) -> Event:
        ms = (self._ms(getattr(self._part, part)),)
        return Event("launch", self._name(part), ms, ms, self._first + number)

    def wait(self, part: Literal["dispatch", "combine"], number: int) -> Event:
        return self.launch(part, number)._replace(does="wait")

    def _computing(self, name: str, by_class: Sequence[PassTimes]) -> Event:
        ms = tuple(self._ms(each) for each in by_class)
        return Event("compute", self._name(name), ms, ms)

    def _ms(self, times: PassTimes) -> float:
        return times.forward_ms if self._is_forward else times.backward_ms

    def _name(self, name: str) -> str:
        return name if self._is_forward else f"{name}'"
