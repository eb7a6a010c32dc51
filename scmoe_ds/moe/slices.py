"""Whole experts under tensor parallelism: each rank sends a slice of the tokens, and gets the results of all of them.

The ranks of a tensor-parallel group hold the same tokens and route them alike. In DeepSpeed each rank drops all but its
slice of them before the dispatch, and gathers the results after the combine: two more collectives, which block. Here
the combine itself brings each row to all ranks that hold its token. In the backward pass the dispatch's gradient does
so. No collective is left but the two that overlap anyway. The price: a combine carries as many bytes as without slices.
This matters when expert parallelism crosses nodes but tensor parallelism does not.

The exchange group is the larger one of the tensor-parallel and the expert-parallel group, and contains the other. Both
consist of consecutive ranks. A rank below is one within the exchange group.

Shape suffixes: P ranks, V senders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from scmoe_ds.comm.all_to_all import SplitSizes


@dataclass(frozen=True)
class TokenSlices:
    """Who sends which slice of the tokens to whom, and who gets the results.

    Attributes:
        rank: this rank within the exchange group.
        tensor_parallel_size: ranks that hold the same tokens; 1: each rank has tokens of its own.
        expert_parallel_size: ranks among which one set of experts is divided. One size divides the other.
    """

    rank: int = 0
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1

    @property
    def group_size(self) -> int:
        """Ranks of the exchange group: P."""
        return max(self.tensor_parallel_size, self.expert_parallel_size)

    @property
    def senders(self) -> int:
        """How many ranks with the same tokens send to one expert-parallel rank: V."""
        return min(self.tensor_parallel_size, self.expert_parallel_size)

    @property
    def expert_parallel_ranks(self) -> range:
        """This rank's expert-parallel group: its tokens go there, and its experts get tokens from there."""
        return _group_of(self.rank, self.expert_parallel_size)

    def bucket(self, expert: Tensor, location: Tensor, local_experts: int) -> Tensor:
        """The order in which rows lie: by the rank that they go to, then by sender, then by expert.

        Args:
            expert: int64 global expert of each choice, any shape.
            location: int64 number of the row among the expert's rows; consecutive ones belong to different slices.
            local_experts: experts per rank: L.

        Returns:
            int64 in [0, P * V * L).
        """
        if self.tensor_parallel_size == 1:
            return expert
        slice_number = location % self.tensor_parallel_size
        sender = _group_of(self.rank, self.tensor_parallel_size).start + slice_number
        receiver = sender - sender % self.expert_parallel_size + expert // local_experts
        return (receiver * self.senders + slice_number % self.senders) * local_experts + expert % local_experts

    def split_sizes(self, to_PV: Sequence[Sequence[int]], from_P: Sequence[int]) -> SplitSizes:
        """The sizes of one chunk's exchange.

        Args:
            to_PV: rows that the ranks with these tokens send to each rank, by sender; the order in which they lie.
            from_P: rows that this rank gets from each.
        """
        to_P = [sum(rows) for rows in to_PV]
        if self.tensor_parallel_size == 1:
            return SplitSizes.plain(to_P, from_P)
        starts = list(accumulate((count for rows in to_PV for count in rows), initial=0))
        picked = []
        for receiver in range(self.group_size):
            first = receiver * self.senders + self.rank % self.senders
            is_mine = receiver in self.expert_parallel_ranks  # to the others, other ranks send
            picked.append(slice(starts[first], starts[first + 1] if is_mine else starts[first]))
        # On the way back each rank gets all rows of its tokens. Their senders follow each other, and so do the rows.
        arrived = list(accumulate(from_P, initial=0))
        back = []
        for receiver in range(self.group_size):
            senders = _group_of(receiver, self.tensor_parallel_size)
            back.append(slice(arrived[senders.start], arrived[senders.stop]))
        return SplitSizes(_lengths(picked), list(from_P), _lengths(back), to_P, picked, back)

    def check_alike(self, checksum: int, checksum_P: Sequence[int]) -> None:
        """Compares the routing of the ranks that hold the same tokens.

        Raises:
            RuntimeError: it differs; on all of them, before a single row is sent.
        """
        if any(checksum_P[rank] != checksum for rank in _group_of(self.rank, self.tensor_parallel_size)):
            raise RuntimeError(
                "tensor-parallel ranks have routed the same tokens differently: their weights or inputs have drifted "
                "apart. Resume from a checkpoint; if it comes back, look for random numbers or data that differ "
                "between ranks of a tensor-parallel group"
            )


def _group_of(rank: int, size: int) -> range:
    """The group of consecutive ranks that a rank is in."""
    first = rank - rank % size
    return range(first, first + size)


def _lengths(pieces: Sequence[slice]) -> list[int]:
    return [int(piece.stop - piece.start) for piece in pieces]
