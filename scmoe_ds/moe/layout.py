"""The two layouts of routed tokens as rows (decode.py: the way back). Permutations and sizes only; nothing is sent.

Padded (DeepSpeed's): every expert has `capacity` rows. Empty ones are zeros. All ranks get equal pieces.
Exact: rows of routed tokens only, sorted by expert. Each rank gets as many as there are.

Either can be cut into chunks, which are sent and computed one after another: the padded layout by rows of the buffers,
the exact one by tokens. All rows of a chunk then come before those of the next.

Shape suffixes: T tokens, D hidden, K top-k, C capacity, L local experts, N chunks, P ranks, V senders (see slices.py),
X any, R rows sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.moe.decode import add_choices, token_of
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices


@dataclass(frozen=True)
class PaddedLayout:
    """DeepSpeed's buffers, one per expert: [P * L, C, D]. Each of N chunks has [P * L, ceil(C / N), D].

    Under tensor parallelism each expert has one buffer per sender, [P, V, L, C, D]. Each slice of the tokens needs a
    smaller C.

    Attributes:
        row_of_choice_KT: int64 row bucket * C + location of each choice; any row where dropped.
        choice_of_row_R: int64 choice k * T + t of each row; K * T of an empty one.
        buffers: of one chunk.
        capacity: rows of a buffer.
    """

    row_of_choice_KT: Tensor
    choice_of_row_R: Tensor
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
        return cls.from_rows(row_KT, buffers, capacity, num_chunks)

    @classmethod
    def from_rows(cls, row_KT: Tensor, buffers: int, capacity: int, num_chunks: int = 1) -> PaddedLayout:
        """From the row of each choice, which for a dropped one is the number of rows: it writes behind the last."""
        rows, choices = num_chunks * buffers * capacity, row_KT.numel()
        choice_R = torch.full((rows + 1,), choices, device=row_KT.device)
        choice_R.scatter_(0, row_KT.flatten(), torch.arange(choices, device=row_KT.device))
        return cls(row_KT.clamp(max=rows - 1), choice_R[:-1], buffers, capacity, num_chunks)

    @property
    def rows_per_chunk(self) -> int:
        return self.buffers * self.capacity

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [N * P * V * L * C, D], zeros in the empty rows."""
        T, D = tokens_TD.shape
        # Empty rows read a row of zeros.
        token_R = torch.where(self.choice_of_row_R < self.row_of_choice_KT.numel(), self.choice_of_row_R % max(T, 1), T)
        return torch.cat([tokens_TD, tokens_TD.new_zeros(1, D)]).index_select(0, token_R)


@dataclass(frozen=True)
class ExactLayout:
    """Rows of real tokens, sorted by chunk, within one by destination, sender and expert, and there by location.

    Attributes:
        row_of_choice_KT: int64 row of each choice; 0 where dropped.
        choice_of_row_R: int64 choice k * T + t of each row; on a GPU followed by the dropped choices.
        kept_KT: bool, which choices have a row.
        rows_NPVL: int64 rows of each chunk for each rank, from each sender, for each of its experts.
        checksum: int64 scalar, equal on ranks that route the same tokens alike; zero if no other rank has them.
    """

    row_of_choice_KT: Tensor
    choice_of_row_R: Tensor
    kept_KT: Tensor
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
        order_X = torch.sort(bucket_X, stable=True).indices
        number_X = torch.arange(K * T, device=order_X.device)
        row_X = torch.empty_like(order_X).scatter_(0, order_X, number_X)
        row_X = torch.where(kept_KT.flatten(), row_X, 0)
        alone = slices.tensor_parallel_size == 1
        checksum = torch.zeros((), dtype=torch.int64) if alone else (row_X * (number_X + 1)).sum()
        if not order_X.is_cuda:  # on a GPU the number of rows is not known on the host yet: cut them off when sending
            order_X = order_X[: int(rows.sum())]
        return cls(row_X.view(K, T), order_X, kept_KT, rows.view(shape), checksum)

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [R, D]."""
        return _Encode.apply(tokens_TD, self.choice_of_row_R, self.row_of_choice_KT, self.kept_KT)


class _Encode(torch.autograd.Function):
    """A row for each choice of a token. The gradient of a token is gathered from its rows and added up in fp32. torch's
    own gradient is a scatter: in bf16 it rounds after each addition, and on a GPU it adds in any order."""

    @staticmethod
    def forward(
        ctx: Any, tokens_TD: Tensor, choice_of_row_R: Tensor, row_of_choice_KT: Tensor, kept_KT: Tensor
    ) -> Tensor:
        ctx.save_for_backward(row_of_choice_KT, kept_KT)
        return tokens_TD.index_select(0, token_of(choice_of_row_R, kept_KT))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        row_of_choice_KT, kept_KT = ctx.saved_tensors
        return add_choices(grads[0], row_of_choice_KT, kept_KT.float()), None, None, None
