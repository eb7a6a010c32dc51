"""Transfers on lanes: one at a time on each, in order of launch; lanes may share one link. No torch.

While n lanes are busy, each has 1/n of the link's rate. Time goes one way: what has been asked for up to a moment is
settled up to it, and no later launch may lie before it.
"""

from __future__ import annotations

import math
from collections import deque


class Transfer:
    """One on its way.

    Attributes:
        ms: what it takes alone on the link.
        start_ms: when it had its lane for itself; inf: not yet.
        end_ms: inf: not settled yet.
    """

    __slots__ = ("end_ms", "lane", "left_ms", "ms", "since_ms", "start_ms")

    def __init__(self, lane: int, ms: float) -> None:
        self.lane, self.ms = lane, ms
        self.left_ms = ms  # of it, from since_ms on
        self.start_ms = self.since_ms = self.end_ms = math.inf


class Link:
    """
    Args:
        lanes: how many.
        shared: False: each has a link of its own.
        remembers: whether `beside` will be asked.
    """

    def __init__(self, lanes: int = 1, shared: bool = True, remembers: bool = False) -> None:
        self.queues: list[deque[Transfer]] = [deque() for _ in range(lanes)]
        self.busy_since_ms = [0.0] * lanes  # of those that are
        self._heads: list[Transfer] = []  # of the busy lanes
        self._shared, self._remembers = shared, remembers
        self._was_busy: deque[tuple[float, float]] = deque()  # with any transfer
        self._is_busy_since_ms = 0.0
        self._is_alone, self._free_ms = lanes == 1, 0.0  # one lane: free from then on

    def launch(self, transfer: Transfer, at_ms: float) -> None:
        """Puts it into its lane. No earlier launch was later."""
        if self._is_alone:  # nothing that comes later changes when it ends
            transfer.start_ms = at_ms if at_ms > self._free_ms else self._free_ms
            transfer.end_ms = self._free_ms = transfer.start_ms + transfer.left_ms
            if self._remembers:
                self._remember(transfer.start_ms, transfer.end_ms)
            return
        self.settle(at_ms)
        queue = self.queues[transfer.lane]
        queue.append(transfer)
        if len(queue) == 1:
            if not self._heads:
                self._is_busy_since_ms = at_ms
            self.busy_since_ms[transfer.lane] = at_ms
            self._share(at_ms)
            self._heads.append(transfer)
            transfer.start_ms = transfer.since_ms = at_ms

    def settle(self, until_ms: float) -> None:
        """Ends all transfers that are over by then."""
        while self._heads:
            head, end_ms = self._next()
            if end_ms > until_ms:
                break
            self._end(head, end_ms)

    def end_ms(self, transfer: Transfer) -> float:
        """When it ends, if nothing is launched before that."""
        while transfer.end_ms == math.inf:
            self._end(*self._next())
        return transfer.end_ms

    def beside(self, start_ms: float, ms: float, slowed_by: float) -> float:
        """When a computation ends that takes `ms` with no transfer beside it, and slowed_by times as long with one."""
        for begin_ms, end_ms in self._was_busy:
            start_ms, ms, is_over = _beside(start_ms, ms, begin_ms, end_ms, slowed_by)
            if is_over:
                return start_ms
        while self._heads:
            head, end_ms = self._next()
            start_ms, ms, is_over = _beside(start_ms, ms, self._is_busy_since_ms, end_ms, slowed_by)
            if is_over:
                return start_ms
            self._end(head, end_ms)
        return start_ms + ms

    def forget(self, before_ms: float) -> None:
        """Nobody will ask any more what was before."""
        while self._was_busy and self._was_busy[0][1] <= before_ms:
            self._was_busy.popleft()

    def backlog_ms(self, lane: int, at_ms: float) -> list[float]:
        """What its transfers still take, alone on the link; the link is settled up to that moment."""
        if self._is_alone:
            return [max(0.0, self._free_ms - at_ms)]
        queue = self.queues[lane]
        return [self._left_ms(each, at_ms) if each is queue[0] else each.left_ms for each in queue]

    def place(self, transfer: Transfer) -> int:
        """In its lane, from 0; -1: it has ended."""
        return -1 if transfer.end_ms < math.inf else self.queues[transfer.lane].index(transfer)

    def busy_after(self, behind_ms: float, at_ms: float) -> list[float]:
        """When it was busy between two moments, relative to the later one, until which it is settled."""
        if not self._remembers:
            return []
        spans = [*self._was_busy, *[(self._is_busy_since_ms, math.inf)] * bool(self._heads)]
        limits = [time for span in spans if span[1] > behind_ms for time in (max(span[0], behind_ms), span[1])]
        return [min(time, at_ms) - at_ms for time in limits]

    def shift(self, by_ms: float) -> None:
        """Has everything that is on its way happen later."""
        self._free_ms += by_ms
        for head in self._heads:
            head.start_ms, head.since_ms = head.start_ms + by_ms, head.since_ms + by_ms
        self.busy_since_ms = [since_ms + by_ms for since_ms in self.busy_since_ms]
        self._is_busy_since_ms += by_ms
        self._was_busy = deque((start_ms + by_ms, end_ms + by_ms) for start_ms, end_ms in self._was_busy)

    def _rate(self) -> int:
        return len(self._heads) if self._shared else 1

    def _next(self) -> tuple[Transfer, float]:
        """The transfer that ends next, and when, if nothing is launched before that."""
        heads = self._heads
        if len(heads) == 1:
            return heads[0], heads[0].since_ms + heads[0].left_ms
        slower = self._rate()
        head = min(heads, key=lambda each: each.since_ms + each.left_ms * slower)
        return head, head.since_ms + head.left_ms * slower

    def _left_ms(self, head: Transfer, at_ms: float) -> float:
        return max(0.0, head.left_ms - (at_ms - head.since_ms) / self._rate())

    def _share(self, at_ms: float) -> None:
        """The number of busy lanes changes."""
        if self._shared:
            for head in self._heads:
                head.left_ms, head.since_ms = self._left_ms(head, at_ms), at_ms

    def _end(self, head: Transfer, at_ms: float) -> None:
        head.end_ms = at_ms
        queue = self.queues[head.lane]
        queue.popleft()
        if queue:  # as many lanes are busy as before
            self._heads[self._heads.index(head)] = queue[0]
            queue[0].start_ms = queue[0].since_ms = at_ms
            return
        if len(self._heads) > 1:
            self._share(at_ms)
        self._heads.remove(head)
        if self._remembers and not self._heads:
            self._remember(self._is_busy_since_ms, at_ms)

    def _remember(self, start_ms: float, end_ms: float) -> None:
        if self._was_busy and self._was_busy[-1][1] >= start_ms:
            start_ms = self._was_busy.pop()[0]
        self._was_busy.append((start_ms, end_ms))


def _beside(start_ms: float, ms: float, busy_ms: float, free_ms: float, slowed_by: float) -> tuple[float, float, bool]:
    """Until when a computation gets before the link is free, what is left of it, and whether that is nothing."""
    before_ms = max(0.0, busy_ms - start_ms)
    if ms <= before_ms:
        return start_ms + ms, 0.0, True
    start_ms, ms = start_ms + before_ms, ms - before_ms
    if start_ms + ms * slowed_by <= free_ms:
        return start_ms + ms * slowed_by, 0.0, True
    beside_ms = max(0.0, free_ms - start_ms)
    return start_ms + beside_ms, ms - beside_ms / slowed_by, False
