"""A schedule: before which backbone operators a pair computes its routed experts, and in how many chunks. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When a pair computes its routed experts.

    Args:
        expert_slot: the experts run before backbone operator number `expert_slot` (from 1); one past the last
            operator means after all of them. A tuple has a slot for each chunk, in order.
        num_chunks: pieces that the routed tokens are cut into.
        overlap: False runs the same operators in the same order with blocking communication.

    Raises:
        ValueError: a slot or num_chunks below 1; a tuple that decreases, or that is not num_chunks long.
    """

    expert_slot: int | tuple[int, ...]
    num_chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.expert_slot, list):  # JSON has no tuples
            object.__setattr__(self, "expert_slot", tuple(self.expert_slot))
        if not all(type(number) is int for number in (self.num_chunks, *self._given_slots)):
            raise ValueError(f"{self}: expert_slot and num_chunks must be whole numbers")
        if self.num_chunks < 1:
            raise ValueError(f"{self}: num_chunks counts from 1")
        if len(self.slots) != self.num_chunks:
            raise ValueError(f"{self}: expert_slot has {len(self.slots)} slots for {self.num_chunks} chunks")
        if min(self.slots) < 1:
            raise ValueError(f"{self}: expert_slot counts from 1")
        if list(self.slots) != sorted(self.slots):
            raise ValueError(f"{self}: expert_slot decreases, but chunks run in their order")

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot of every chunk, [num_chunks]."""
        return self._given_slots if isinstance(self.expert_slot, tuple) else self._given_slots * self.num_chunks

    @property
    def _given_slots(self) -> tuple[int, ...]:
        return self.expert_slot if isinstance(self.expert_slot, tuple) else (self.expert_slot,)
