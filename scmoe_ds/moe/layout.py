"""The two layouts of routed tokens as rows, and the way back. Permutations and sizes only; nothing is sent here.

Padded (DeepSpeed's): every expert has `capacity` rows. Empty ones are zeros. All ranks get equal pieces.
Exact: rows of routed tokens only, sorted by expert. Each rank gets as many as there are.

Either can be cut into chunks, which are sent and computed one after another: the padded layout by rows of the buffers,
the exact one by tokens. All rows of a chunk then come before those of the next.

Shape suffixes: T tokens, D hidden, K top-k, C capacity, L local experts, N chunks, P ranks, V senders (see slices.py),
X any, R/S rows sent/received.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to a device. From pageable memory the host would wait for all earlier work of the GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def decode(rows_RD: Tensor, row_of_choice_KT: Tensor, weight_KT: Tensor) -> Tensor:
    """Gathers each token's expert outputs and adds them up, weighted, in fp32 (paper eq. 1).

    Args:
        rows_RD: expert outputs, in the order in which the tokens were sent.
        row_of_choice_KT: int64 row of each choice; R for a dropped one.
        weight_KT: fp32 gate values.

    Returns:
        [T, D] in the dtype of `rows_RD`; zeros for a token whose choices were all dropped.
    """
    if rows_RD.shape[0] == 0:
        # No choice was kept. The result depends on the rows all the same: the other ranks wait for their gradient.
        return rows_RD.new_zeros(weight_KT.shape[1], rows_RD.shape[1]) + rows_RD.sum()
    # A dropped choice has weight 0 and may name any row. A zero row for it would need a copy of all rows.
    row_KT = row_of_choice_KT.clamp(max=rows_RD.shape[0] - 1)
    parts = [
        rows_RD.index_select(0, row_T) * weight_T.unsqueeze(1)
        for row_T, weight_T in zip(row_KT, weight_KT, strict=True)
    ]
    return functools.reduce(torch.add, parts).to(rows_RD.dtype)  # fp32 up to here: the weights are


@dataclass(frozen=True)
class PaddedLayout:
    """DeepSpeed's buffers, one per expert: [P * L, C, D]. Each of N chunks has [P * L, ceil(C / N), D].

    Under tensor parallelism each expert has one buffer per sender, [P, V, L, C, D]. Each slice of the tokens needs a
    smaller C.

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
    def of(cls, routing: Routing, slices: TokenSlices, num_chunks: int = 1) -> PaddedLayout:
        local_experts = routing.exp_counts.shape[0] // slices.expert_parallel_size
        buffers = slices.group_size * slices.senders * local_experts
        # At least one row, even if no rank has a token: DeepSpeed's experts do not compute on none.
        capacity = -(-max(int(routing.capacity), 1) // (slices.tensor_parallel_size * num_chunks))
        kept_KT, location_KT = routing.expert_KT >= 0, routing.location_KT
        buffer_KT = slices.bucket(routing.expert_KT, location_KT, local_experts)
        if slices.tensor_parallel_size > 1:
            location_KT = location_KT.div(slices.tensor_parallel_size, rounding_mode="floor")
        if num_chunks > 1:
            buffer_KT = location_KT.div(capacity, rounding_mode="floor") * buffers + buffer_KT
            location_KT = location_KT % capacity
        row_KT = torch.where(kept_KT, buffer_KT * capacity + location_KT, num_chunks * buffers * capacity)
        return cls(row_KT, buffers, capacity, num_chunks)

    @property
    def rows_per_chunk(self) -> int:
        return self.buffers * self.capacity

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [N * P * V * L * C, D], zeros in the empty rows."""
        row_KT, rows = self.row_of_choice_KT, self.num_chunks * self.rows_per_chunk
        T, D = tokens_TD.shape
        # The token of every row. Empty rows read a row of zeros; dropped choices write behind the last row.
        token_R = torch.full((rows + 1,), T, device=row_KT.device)
        token_R.scatter_(0, row_KT.flatten(), torch.arange(T, device=row_KT.device).expand_as(row_KT).flatten())
        return torch.cat([tokens_TD, tokens_TD.new_zeros(1, D)]).index_select(0, token_R[:-1])


@dataclass(frozen=True)
class ExactLayout:
    """Rows of real tokens, sorted by chunk, within one by destination, sender and expert, and there by location.

    Attributes:
        token_R: int64 source token of each row; on a GPU followed by those of the dropped choices.
        row_of_choice_KT: row of each choice, R where dropped.
        rows_NPVL: int64 rows of each chunk for each rank, from each sender, for each of its experts.
        checksum: int64 scalar, equal on ranks that route the same tokens alike; zero if no other rank has them.
    """

    token_R: Tensor
    row_of_choice_KT: Tensor
    rows_NPVL: Tensor
    checksum: Tensor

    @classmethod
    def of(cls, routing: Routing, slices: TokenSlices, num_chunks: int = 1) -> ExactLayout:
        local_experts = routing.exp_counts.shape[0] // slices.expert_parallel_size
        K, T = routing.expert_KT.shape
        kept_KT = routing.expert_KT >= 0
        bucket_KT = slices.bucket(routing.expert_KT, routing.location_KT, local_experts)
        shape = (num_chunks, slices.group_size, slices.senders, local_experts)
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
        number_X = torch.arange(K * T, device=order_X.device)
        row_X = torch.empty_like(order_X).scatter_(0, order_X, number_X)
        row_X = torch.minimum(row_X, total)
        alone = slices.tensor_parallel_size == 1
        checksum = torch.zeros((), dtype=torch.int64) if alone else (row_X * (number_X + 1)).sum()
        if not order_X.is_cuda:  # on a GPU the number of rows is not known on the host yet: cut them off when sending
            order_X = order_X[: int(total)]
        return cls(order_X % T, row_X.view(K, T), rows.view(shape), checksum)

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [R, D]."""
        return _Encode.apply(tokens_TD, self.token_R, self.row_of_choice_KT)


class _Encode(torch.autograd.Function):
    """A row for each choice of a token. The gradient of a token is gathered from its rows and added up in fp32. torch's
    own gradient is a scatter: in bf16 it rounds after each addition, and on a GPU it adds in any order."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, token_R: Tensor, row_of_choice_KT: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice_KT)
        return tokens_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_RD,), (row_of_choice_KT,) = grads, ctx.saved_tensors
        # A dropped choice has no row. On a GPU it may have one, whose gradient is zero.
        return decode(grad_RD, row_of_choice_KT, (row_of_choice_KT < grad_RD.shape[0]).float()), None, None


@dataclass(frozen=True)
class ReceivedRows:
    """How rows that arrive from all ranks are divided among the local experts.

    Rows arrive by rank and, within a rank, by local expert. An expert computes all of its rows together.

    Attributes:
        by_expert_S: int64 permutation that brings the rows of one expert together; None if they are already.
        rows_per_expert: rows of each local expert.
    """

    by_expert_S: Tensor | None
    rows_per_expert: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> ReceivedRows:
        """
        Args:
            rows: [P, L] int64 on the host: how many rows each rank sends to each local expert.
            device: of the rows.
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
