"""What the executor does for a pair, as a program for simulated lanes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.lanes import Event
from scmoe_ds.planner.times import OperatorTimes, PassTimes


class _Chunks(NamedTuple):
    """Events of a number of chunks, one per chunk."""

    send: list[Event]
    experts: list[list[Event]]  # waiting for the rows, computing, sending them back
    arrive: list[Event]


class PairEvents:
    """The events of a pair's parts, made once for all of its schedules.

    Args:
        by_class: times of a pair on every class of ranks, see `lanes.Lanes`. They have the same operators and chunks;
            transfers take what they take on the first one.
    """

    def __init__(self, by_class: Sequence[OperatorTimes]) -> None:
        first = by_class[0]
        self.times, self._by_class = first, by_class
        self.begin = [computing(part, [getattr(each, part) for each in by_class]) for part in ("gate", "encode")]
        self.backbone = [
            computing(operator.name, [each.backbone[place] for each in by_class])
            for place, operator in enumerate(first.backbone)
        ]
        self._decode = computing("decode", [each.decode for each in by_class])
        self._chunks: dict[tuple[int, bool], _Chunks] = {}

    def program(self, schedule: Schedule) -> tuple[list[Event], list[Event]]:
        """What the executor does in a forward pass, in order: up to the end of the backbone, and at the join.

        Raises:
            ValueError: no times for this number of chunks; a slot beyond the backbone.
        """
        chunks = self._of(schedule.num_chunks, at_once=not schedule.overlap)
        if schedule.slots[-1] > len(self.backbone) + 1:
            raise ValueError(f"expert_slot {schedule.slots[-1]}: the backbone has {len(self.backbone)} operators")
        program, done = [*self.begin, *chunks.send], 0
        for slot, experts in zip(schedule.slots, chunks.experts, strict=True):
            program += self.backbone[done : slot - 1]
            program += experts
            done = slot - 1
        return program + self.backbone[done:], [*chunks.arrive, self._decode]

    def _of(self, count: int, at_once: bool) -> _Chunks:
        if (count, at_once) not in self._chunks:
            if count not in self.times.chunks:
                raise ValueError(f"num_chunks {count}: there are times for {sorted(self.times.chunks)} chunks only")
            parts = [each.chunks[count] for each in self._by_class]
            dispatch, combine = parts[0].dispatch, parts[0].combine
            chunks = _Chunks([], [], [])
            for chunk in range(count):
                number = "" if count == 1 else f" {chunk}"
                there, back = 2 * chunk, 2 * chunk + 1
                send, wait = _transferring(f"dispatch{number}", dispatch, there, at_once)
                send_back, arrive = _transferring(f"combine{number}", combine, back, at_once)
                compute = computing(f"experts{number}", [each.experts for each in parts])
                chunks.send.append(send)
                chunks.experts.append([wait, compute, send_back])
                chunks.arrive.append(arrive)
            self._chunks[count, at_once] = chunks
        return self._chunks[count, at_once]


def computing(name: str, by_class: Sequence[PassTimes]) -> Event:
    """A computation of every class."""
    forward_ms, backward_ms = zip(*((each.forward_ms, each.backward_ms) for each in by_class), strict=True)
    return Event("compute", name, forward_ms, backward_ms)


def _transferring(name: str, times: PassTimes, number: int, at_once: bool) -> tuple[Event, Event]:
    """Launch and wait of a transfer."""
    ms = (times.forward_ms,), (times.backward_ms,)
    return Event("launch", name, *ms, number, at_once), Event("wait", name, *ms, number, at_once)
