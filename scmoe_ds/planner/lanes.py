"""A discrete-event simulation: what ranks compute and send, in the order in which they do. No torch.

All ranks run one program. They may differ in how long they compute: ranks that do not differ are a class. A transfer is
a collective. It begins when the last class has launched it and its lane is free (`link.py`). While a transfer runs,
computation beside it can be slower.

Events are simulated in the order of the program. That is exact: what comes later in it is launched when the last class
has got there, so it changes nothing that the earlier events need to know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from scmoe_ds.planner.link import Link, Transfer

Phase = Literal["forward", "backward"]
LaneName = Literal["compute", "communication", "wait", "reduction"]
TRANSFERS: tuple[LaneName, ...] = ("communication", "reduction")
"""Names of the lanes of transfers."""
TOLERANCE = 1e-9
"""Relative: two states that differ by less are the same."""


class Event(NamedTuple):
    """One step of a program.

    Attributes:
        does: "launch" and "wait" are of a transfer. In the backward pass they change places and the order is reversed:
            autograd runs the nodes so, a wait's node launches the gradient's transfer, a launch's waits for it.
        name: of its span; "": it has none.
        forward_ms, backward_ms: of every class; of a transfer, one number.
        transfer: which. Of several with one number on their way, the first to be launched is waited for first.
        at_once: whether the computation waits for the transfer where it is launched.
    """

    does: Literal["compute", "launch", "wait"]
    name: str
    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    transfer: int = -1
    at_once: bool = False


class LaneSpan(NamedTuple):
    """When something ran, in milliseconds.

    Attributes:
        label: what `Lanes.label` was when it began.
        rank_class: whose it is; 0 for transfers.
    """

    phase: Phase
    lane: LaneName
    name: str
    start_ms: float
    end_ms: float
    label: int
    rank_class: int


class Lanes:
    """The state of a simulation.

    Args:
        classes: of ranks.
        lanes: of transfers.
        slowed_by: factor on computation while a transfer runs, ≥ 1.
        shared: whether the lanes share a link.
        spans: whether to note when everything runs.

    Attributes:
        clocks: until when each class has got.
        exposed_ms: per lane, how long each class has stood still for its transfers.
        transfers_ms: per lane, how long its transfers were on their way.
        slack_ms: the least time between the end of a transfer and the wait for it; at most 0 if one was late.
        label: of the spans that follow.
    """

    def __init__(
        self, classes: int = 1, lanes: int = 1, slowed_by: float = 1.0, shared: bool = True, spans: bool = False
    ) -> None:
        self.clocks = [0.0] * classes
        self.exposed_ms = [[0.0] * classes for _ in range(lanes)]
        self.transfers_ms = [0.0] * lanes
        self.slack_ms = math.inf
        self.label = 0
        self._slowed_by = slowed_by
        self._link = Link(lanes, shared, remembers=slowed_by > 1)
        self._launched: dict[int, list[Transfer]] = {}  # and not waited for, by number
        self._last: dict[int, Transfer] = {}  # of those without a number, by lane
        self._numbered: set[int] = set()  # lanes that had some with a number
        self._spans: list[tuple[LaneSpan, Transfer | None]] | None = [] if spans else None

    def run(self, program: Sequence[Event], phase: Phase) -> None:
        """Runs a pass."""
        is_forward, launches = phase == "forward", "launch" if phase == "forward" else "wait"
        for event in program if is_forward else reversed(program):
            ms = event.forward_ms if is_forward else event.backward_ms
            if event.does == "compute":
                self.compute(ms, phase, event.name)
                continue
            if event.does == launches:
                self.launch(ms[0], phase, event.name, event.transfer)
            if (event.does == launches) == event.at_once:
                self._wait(self._launched[event.transfer].pop(0), phase, event.name)

    def repeat(self, run: Callable[[int], None], count: int) -> None:
        """Calls run(0) … run(count - 1), which all do the same: one by one until nothing changes any more.

        From there on it multiplies, unless spans are noted.
        """
        before: _State | None = None
        for number in range(count):
            if self._spans is None and number < count - 1:  # else nothing would be gained
                now = self._state()
                if before is not None and now.repeats(before):
                    self._skip(count - number, before, now)
                    return
                before = now
            run(number)

    def compute(self, ms: Iterable[float], phase: Phase, name: str = "") -> None:
        """Every class computes; `ms` of each."""
        clocks = self.clocks
        for number, of_class in enumerate(ms):
            start_ms = clocks[number]
            if self._slowed_by == 1:
                clocks[number] = start_ms + of_class
            else:
                clocks[number] = self._link.beside(start_ms, of_class, self._slowed_by)
            if self._spans is not None:
                self._note(phase, "compute", name, start_ms, clocks[number], number)

    def launch(self, ms: float, phase: Phase, name: str, number: int | None, lane: int = 0) -> None:
        """Launches a transfer: it starts when the last class has got there.

        Args:
            number: as `Event.transfer`; None: only `finish` waits for it.
        """
        transfer, clocks = Transfer(lane, ms), self.clocks
        self._link.launch(transfer, clocks[0] if len(clocks) == 1 else max(clocks))
        self.transfers_ms[lane] += ms
        if number is None:
            self._last[lane] = transfer
        elif number in self._launched:
            self._launched[number].append(transfer)
        else:
            self._launched[number] = [transfer]
            self._numbered.add(lane)
        if self._slowed_by > 1:
            self._link.forget(min(clocks))
        if self._spans is not None and name:
            span = LaneSpan(phase, TRANSFERS[lane], name, 0.0, 0.0, self.label, 0)
            self._spans.append((span, transfer))

    def wait(self, number: int, phase: Phase, name: str = "") -> None:
        """Every class waits for the first transfer of this number that nobody has waited for."""
        self._wait(self._launched[number].pop(0), phase, name)

    def finish(self, lane: int, phase: Phase, name: str = "") -> None:
        """Every class waits until nothing is left of the transfers of a lane that have no number."""
        transfer = self._last.pop(lane, None)
        if transfer is not None:
            self._wait(transfer, phase, name)

    def spans(self) -> list[LaneSpan]:
        """In the order of the program. It is over: nothing is launched any more."""
        return [
            span if of is None else span._replace(end_ms=self._link.end_ms(of), start_ms=of.start_ms)
            for span, of in self._spans or []
        ]

    def _wait(self, transfer: Transfer, phase: Phase, name: str) -> None:
        end_ms, clocks = transfer.end_ms, self.clocks
        if end_ms == math.inf:  # not settled yet
            end_ms = self._link.end_ms(transfer)
        if len(self.transfers_ms) > 1:  # other lanes may have made it longer
            self.transfers_ms[transfer.lane] += end_ms - transfer.start_ms - transfer.ms
        for rank_class, clock in enumerate(clocks):
            early_ms = clock - end_ms
            if early_ms < self.slack_ms:
                self.slack_ms = early_ms
            if early_ms < 0:
                self.exposed_ms[transfer.lane][rank_class] -= early_ms
                clocks[rank_class] = end_ms
                if self._spans is not None:
                    self._note(phase, "wait", name, clock, end_ms, rank_class)

    def _note(self, phase: Phase, lane: LaneName, name: str, start_ms: float, end_ms: float, number: int) -> None:
        if self._spans is not None and name:
            self._spans.append((LaneSpan(phase, lane, name, start_ms, end_ms, self.label, number), None))

    def _state(self) -> _State:
        at_ms, behind_ms = max(self.clocks), min(self.clocks)
        self._link.settle(at_ms)
        on_their_way = [(number, each) for number in sorted(self._launched) for each in self._launched[number]]
        moments = [moment for _, each in on_their_way for moment in (each.start_ms, each.end_ms)]
        limits = [moment - at_ms for moment in moments if moment < math.inf]
        return _State(
            at_ms=at_ms,
            transfers=[(number, self._link.place(each)) for number, each in on_their_way],
            numbers=[clock - at_ms for clock in self.clocks] + limits + self._link.busy_after(behind_ms, at_ms),
            backlogs=[self._link.backlog_ms(lane, at_ms) for lane in range(len(self.transfers_ms))],
            numbered=set(self._numbered),
            busy_since_ms=list(self._link.busy_since_ms),
            totals=[*itertools.chain(*self.exposed_ms), *self.transfers_ms],
        )

    def _skip(self, times: int, before: _State, now: _State) -> None:
        """What has happened between two states happens as often again."""
        by_ms = times * (now.at_ms - before.at_ms)
        self.clocks = [clock + by_ms for clock in self.clocks]
        self._link.shift(by_ms)
        for transfer in itertools.chain(*self._launched.values()):
            if transfer.end_ms < math.inf:  # the link shifts all others
                transfer.start_ms, transfer.end_ms = transfer.start_ms + by_ms, transfer.end_ms + by_ms
        for lane, (earlier, later) in enumerate(zip(before.backlogs, now.backlogs, strict=True)):
            if sum(later) != sum(earlier) and lane in self._last:
                self._last[lane].left_ms += times * (sum(later) - sum(earlier))
        totals = iter(
            later + times * (later - earlier) for later, earlier in zip(now.totals, before.totals, strict=True)
        )
        self.exposed_ms = [[next(totals) for _ in of_lane] for of_lane in self.exposed_ms]
        self.transfers_ms = [next(totals) for _ in self.transfers_ms]


class _State(NamedTuple):
    """What decides how a program goes on; times are since the most advanced class's clock, in milliseconds.

    Attributes:
        at_ms: that clock.
        transfers: launched and not waited for: their number, and their place in the lane.
        numbers: clocks, starts and ends of transfers, and when the link was busy behind the slowest class's clock.
        backlogs: per lane, what each of its transfers still takes.
        numbered: lanes with transfers that are waited for one by one.
        busy_since_ms: per lane, not relative.
        totals: counters.
    """

    at_ms: float
    transfers: list[tuple[int, int]]
    numbers: list[float]
    backlogs: list[list[float]]
    numbered: set[int]
    busy_since_ms: list[float]
    totals: list[float]

    def repeats(self, before: _State) -> bool:
        """Whether the program goes on as it did from the state before, so that this one comes again and again."""
        most = TOLERANCE * (self.at_ms - before.at_ms)

        def same(one: Sequence[float], other: Sequence[float]) -> bool:
            return len(one) == len(other) and all(abs(a - b) <= most for a, b in zip(one, other, strict=True))

        def grows(lane: int, earlier: list[float], later: list[float]) -> bool:
            # A lane that only gets longer was busy all the time and will be, however long it is.
            is_busy = self.busy_since_ms[lane] <= before.at_ms and bool(earlier)
            return is_busy and lane not in self.numbered and sum(later) >= sum(earlier)

        lanes = enumerate(zip(before.backlogs, self.backlogs, strict=True))
        return (
            self.transfers == before.transfers
            and same(self.numbers, before.numbers)
            and all(same(earlier, later) or grows(lane, earlier, later) for lane, (earlier, later) in lanes)
        )
