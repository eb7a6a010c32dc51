"""Two layouts of routed tokens on the wire, and the way back. Permutations and sizes only; nothing is sent here.

Padded (DeepSpeed's): every expert has `capacity` rows, empty ones are zeros; equal pieces for all ranks.
Exact: rows of real tokens only, sorted by expert; pieces as large as they are.

Either can be cut into chunks that travel and are computed one after another: padded by places in the buffers, exact by
tokens. Rows are then in order of chunks first.

Shape suffixes: T tokens, D hidden, E experts, L local experts, K routed experts per token, C capacity,
R rows of this rank's tokens, S rows that it receives, P ranks of the travel group, N chunks, V senders of one token's
rows to an expert rank (1 without tensor parallelism; see shares.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.sharded_moe import _route_slots, _sparse_encode
from torch import Tensor

from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.shares import Shares


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor elsewhere. From pageable memory the host would wait for all that the GPU has to do before."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def decode(rows_RD: Tensor, row_of_choice_KT: Tensor, weight_KT: Tensor) -> Tensor:
    """Gathers each token's expert outputs and adds them up, weighted, in fp32 (paper eq. 1).

    Args:
        rows_RD: expert outputs in the order in which their tokens were sent.
        row_of_choice_KT: int64 row of each choice; R for a dropped one.
        weight_KT: fp32 gate values.

    Returns:
        [T, D] in the dtype of `rows_RD`; zeros for a token whose choices were all dropped.
    """
    if rows_RD.shape[0] == 0:
        # Nothing was kept, but the result must hang on the rows: the other ranks wait for their gradients' exchange.
        return rows_RD.new_zeros(weight_KT.shape[1], rows_RD.shape[1]) + rows_RD.sum()
    # A dropped choice has weight 0 and may name any row; that spares a copy of all rows with a zero row appended.
    row_KT = row_of_choice_KT.clamp(max=rows_RD.shape[0] - 1)
    parts = [
        rows_RD.index_select(0, row_T) * weight_T.unsqueeze(1)
        for row_T, weight_T in zip(row_KT, weight_KT, strict=True)
    ]
    return functools.reduce(torch.add, parts).to(rows_RD.dtype)  # fp32 up to here: the weights are


@dataclass(frozen=True)
class PaddedLayout:
    """DeepSpeed's [E, C, D] buffers; of several chunks, each has [E, ceil(C / N), D].

    Under tensor parallelism each expert has one buffer per sender, [P, V, L, C, D], with C as much smaller.

    Attributes:
        row_of_choice_KT: row bucket * C + location of each choice; the number of rows where dropped.
        buffers: of one chunk.
        capacity: rows of a buffer.
    """

    row_of_choice_KT: Tensor
    buffers: int
    capacity: int
    num_chunks: int

    @classmethod
    def of(cls, routing: Routing, shares: Shares, num_chunks: int = 1) -> PaddedLayout:
        local_experts = routing.exp_counts.shape[0] // shares.expert_ranks
        buffers = shares.ranks * shares.senders * local_experts
        # At least one row, also where no rank has a token: DeepSpeed's experts cannot be asked about none.
        capacity = -(-max(int(routing.capacity), 1) // (shares.holders * num_chunks))
        kept_KT, location_KT = routing.expert_KT >= 0, routing.location_KT
        buffer_KT = shares.bucket(routing.expert_KT, location_KT, local_experts)
        if shares.holders > 1:
            location_KT = location_KT.div(shares.holders, rounding_mode="floor")
        if num_chunks > 1:
            buffer_KT = location_KT.div(capacity, rounding_mode="floor") * buffers + buffer_KT
            location_KT = location_KT % capacity
        buffer_KT = torch.where(kept_KT, buffer_KT, -1)
        row_KT = _route_slots(buffer_KT, location_KT, num_chunks * buffers, capacity)
        return cls(row_KT, buffers, capacity, num_chunks)

    @property
    def rows_per_chunk(self) -> int:
        return self.buffers * self.capacity

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [N * P * V * L * C, D], zeros in the empty rows."""
        return _sparse_encode(tokens_TD, self.row_of_choice_KT, self.num_chunks * self.buffers, self.capacity).flatten(
            0, 1
        )


@dataclass(frozen=True)
class ExactLayout:
    """Rows of real tokens, sorted by chunk, within one by destination, sender and expert, and there by location.

    Attributes:
        token_R: int64 source token of each row; on a GPU followed by those of the dropped choices.
        row_of_choice_KT: row of each choice, R where dropped.
        rows_NPVL: int64 rows of each chunk for each rank, from each sender, for each of its experts.
        checksum: int64 scalar over all rows' places: equal on ranks that route alike; zero where no others do.
    """

    token_R: Tensor
    row_of_choice_KT: Tensor
    rows_NPVL: Tensor
    checksum: Tensor

    @classmethod
    def of(cls, routing: Routing, shares: Shares, num_chunks: int = 1) -> ExactLayout:
        local_experts = routing.exp_counts.shape[0] // shares.expert_ranks
        K, T = routing.expert_KT.shape
        kept_KT = routing.expert_KT >= 0
        bucket_KT = shares.bucket(routing.expert_KT, routing.location_KT, local_experts)
        shape = (num_chunks, shares.ranks, shares.senders, local_experts)
        buckets = math.prod(shape)
        if num_chunks > 1:
            chunk_T = torch.arange(T, device=kept_KT.device) * num_chunks // max(T, 1)
            bucket_KT = bucket_KT + chunk_T * (buckets // num_chunks)
        # Dropped choices count for a bucket that does not exist: they sort behind all others and are cut off.
        bucket_X = torch.where(kept_KT, bucket_KT, buckets).flatten()
        # Not bincount: on a GPU it makes the host wait for the largest id.
        rows = torch.zeros(buckets + 1, dtype=torch.int64, device=bucket_X.device)
        rows = rows.scatter_add_(0, bucket_X, torch.ones_like(bucket_X))[:buckets]
        total = rows.sum()
        order_X = torch.sort(bucket_X, stable=True).indices
        places_X = torch.arange(K * T, device=order_X.device)
        row_X = torch.empty_like(order_X).scatter_(0, order_X, places_X)
        row_X = torch.minimum(row_X, total)
        checksum = (row_X * (places_X + 1)).sum() if shares.holders > 1 else torch.zeros((), dtype=torch.int64)
        if not order_X.is_cuda:  # on a GPU the number of rows is not known on the host yet: cut them off when sending
            order_X = order_X[: int(total)]
        return cls(order_X % T, row_X.view(K, T), rows.view(shape), checksum)

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [R, D]."""
        return _Encode.apply(tokens_TD, self.token_R, self.row_of_choice_KT)


class _Encode(torch.autograd.Function):
    """A token's row for each of its choices. A token's gradient is gathered from its rows and added up in fp32: torch's
    own, a scatter, would round after each addition in bf16, and on a GPU in any order."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, token_R: Tensor, row_of_choice_KT: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice_KT)
        return tokens_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_RD,), (row_of_choice_KT,) = grads, ctx.saved_tensors
        # Dropped choices have no row; on a GPU they may have one, whose gradient is zero.
        return decode(grad_RD, row_of_choice_KT, (row_of_choice_KT < grad_RD.shape[0]).float()), None, None


@dataclass(frozen=True)
class ReceivedRows:
    """How the rows that arrive from all ranks divide among the local experts.

    Rows arrive by rank and, within a rank, by local expert; experts want all of their rows together.

    Attributes:
        by_expert_S: int64 order that brings the rows of one expert together; None if they are already.
        rows_per_expert: rows of each local expert.
    """

    by_expert_S: Tensor | None
    rows_per_expert: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> ReceivedRows:
        """
        Args:
            rows: [P, L] int64 on the host, rows from each rank for each local expert.
            device: where the rows live.
        """
        totals = tuple(rows.sum(0).tolist())
        if rows.shape[0] == 1 or rows.shape[1] == 1:
            return cls(None, totals)
        local_expert = torch.arange(rows.shape[1]).repeat(rows.shape[0])
        order = torch.sort(local_expert.repeat_interleave(rows.flatten()), stable=True).indices
        return cls(to_device(order, device), totals)

    def group(self, rows_SD: Tensor) -> Tensor:
        """Arrival order → expert order."""
        return rows_SD if self.by_expert_S is None else rows_SD.index_select(0, self.by_expert_S)

    def ungroup(self, rows_SD: Tensor) -> Tensor:
        """Expert order → arrival order."""
        if self.by_expert_S is None:
            return rows_SD
        inverse = torch.empty_like(self.by_expert_S)
        inverse[self.by_expert_S] = torch.arange(inverse.numel(), device=inverse.device)
        return rows_SD.index_select(0, inverse)
