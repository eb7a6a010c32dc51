"""Tensor parallelism around whole experts: each rank sends its share of the tokens, and gets the results of all.

Tensor-parallel ranks hold the same tokens and route them alike. DeepSpeed drops all but one rank's share of them before
the dispatch and gathers the results after the combine, two more collectives that block. Here the combine itself brings
every row to all ranks that hold its token, and in the backward pass the gradient of the dispatch does: no collective
besides the two that overlap anyway. The price is that a combine carries as many bytes as it would without shares, which
counts where expert parallelism spans nodes and tensor parallelism does not.

Ranks are those of the travel group: the larger one of the tensor-parallel and the expert-parallel group, of which the
other is a part. Both consist of consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from scmoe_ds.comm.all_to_all import Route


@dataclass(frozen=True)
class Shares:
    """Who sends which of the tokens that tensor-parallel ranks have in common, and who gets them back.

    Attributes:
        ranks: size of the travel group.
        rank: this rank's place in it.
        holders: tensor-parallel ranks, which hold the same tokens; 1: every rank has tokens of its own.
        expert_ranks: ranks among which one set of experts is divided.
    """

    ranks: int
    rank: int
    holders: int
    expert_ranks: int

    @classmethod
    def of(cls, rank: int, holders: int, expert_ranks: int) -> Shares:
        """
        Args:
            rank: place in the world.
            holders, expert_ranks: tensor-parallel and expert-parallel size; one divides the other.
        """
        ranks = max(holders, expert_ranks)
        return cls(ranks, rank % ranks, holders, expert_ranks)

    @property
    def senders(self) -> int:
        """How many holders of the same tokens send to one expert rank: V."""
        return min(self.holders, self.expert_ranks)

    @property
    def experts_from(self) -> range:
        """The ranks from which this one's experts get tokens, and to which it sends its own."""
        first = self.rank - self.rank % self.expert_ranks
        return range(first, first + self.expert_ranks)

    def bucket(self, expert: Tensor, location: Tensor, local_experts: int) -> Tensor:
        """Where rows go, in the order in which they lie: by rank, then by the share that sends them, then by expert.

        Args:
            expert: int64 global expert of each choice, any shape.
            location: int64 place among the expert's tokens; consecutive ones go to different shares.
            local_experts: experts per rank: L.

        Returns:
            int64 in [0, ranks * V * L).
        """
        if self.holders == 1:
            return expert
        share = location % self.holders
        sender = self.rank - self.rank % self.holders + share
        owner = sender - sender % self.expert_ranks + expert // local_experts
        return (owner * self.senders + share % self.senders) * local_experts + expert % local_experts

    def route(self, to_RV: Sequence[Sequence[int]], from_R: Sequence[int]) -> Route:
        """The exchange of one chunk.

        Args:
            to_RV: rows that all holders send to each rank, by share; the order in which they lie.
            from_R: rows that this rank gets from each.
        """
        to_R = [sum(shares) for shares in to_RV]
        if self.holders == 1:
            return Route.plain(to_R, from_R)
        mine = self.rank % self.senders
        starts = list(accumulate((rows for shares in to_RV for rows in shares), initial=0))
        picked = []
        for owner in range(self.ranks):
            first = owner * self.senders + mine
            to_me = owner in self.experts_from
            picked.append(slice(starts[first], starts[first + 1] if to_me else starts[first]))
        # On the way back each rank gets what its fellow holders sent, which lies together: they follow each other.
        arrived = list(accumulate(from_R, initial=0))
        back = []
        for receiver in range(self.ranks):
            first = receiver - receiver % self.holders
            back.append(slice(arrived[first], arrived[first + self.holders]))
        return Route(
            [_length(piece) for piece in picked], list(from_R), [_length(piece) for piece in back], to_R, picked, back
        )

    def check_alike(self, checksum: int, checksums: Sequence[int]) -> None:
        """Compares the routing of the ranks that hold the same tokens.

        Raises:
            RuntimeError: it differs; on all of them, before a single row is sent.
        """
        first = self.rank - self.rank % self.holders
        fellows = checksums[first : first + self.holders]
        if any(other != checksum for other in fellows):
            raise RuntimeError(
                "tensor-parallel ranks have routed the same tokens differently: their weights or inputs have drifted "
                "apart. Resume from a checkpoint; if it comes back, look for random numbers or data that differ "
                "between ranks of a tensor-parallel group"
            )


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)
