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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.moe.decode import decode, weigh
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.order import ByExpert, Order
from scmoe_ds.moe.slices import TokenSlices


@dataclass(frozen=True)
class PaddedLayout:
    """DeepSpeed's buffers, one per expert: [P * L, C, D]. Each of N chunks has [P * L, ceil(C / N), D].

    Under tensor parallelism each expert has one buffer per sender, [P, V, L, C, D]. Each slice of the tokens needs a
    smaller C.

    Attributes:
        row_of_choice_KT: int64 row bucket * C + location of each choice; any row where dropped.
        choice_of_row_R: int64 choice k * T + t of each row; K * T of an empty one.
        written_KT: int64 row of each choice; one behind the last where dropped.
        buffers: of one chunk.
        capacity: rows of a buffer.
    """

    row_of_choice_KT: Tensor
    choice_of_row_R: Tensor
    written_KT: Tensor
    buffers: int
    capacity: int
    num_chunks: int

    @classmethod
    def of(cls, routing: Routing, slices: TokenSlices, num_chunks: int = 1) -> PaddedLayout:
        local_experts = len(routing.choices.rows_E) // slices.expert_parallel_size
        buffers = slices.group_size * slices.senders * local_experts
        # At least one row, even if no rank has a token: DeepSpeed's experts do not compute on none.
        capacity = -(-max(int(routing.capacity), 1) // (slices.tensor_parallel_size * num_chunks))
        location_KT, kept_KT = routing.choices.location_KT, routing.choices.kept_KT
        buffer_KT = slices.bucket(routing.choices.expert_KT, location_KT, local_experts)
        if slices.tensor_parallel_size > 1:
            location_KT = location_KT.div(slices.tensor_parallel_size, rounding_mode="floor")
        if num_chunks > 1:
            buffer_KT = location_KT.div(capacity, rounding_mode="floor") * buffers + buffer_KT
            location_KT = location_KT % capacity
        row_KT = torch.add(location_KT, buffer_KT, alpha=capacity)
        if kept_KT is not None:
            rows = num_chunks * buffers * capacity
            row_KT = torch.add(row_KT, ~kept_KT, alpha=rows).clamp(max=rows)
        return cls.from_rows(row_KT, buffers, capacity, num_chunks)

    @classmethod
    def from_rows(cls, row_KT: Tensor, buffers: int, capacity: int, num_chunks: int = 1) -> PaddedLayout:
        """From the row of each choice, which for a dropped one is the number of rows: it writes behind the last."""
        rows, choices = num_chunks * buffers * capacity, row_KT.numel()
        choice_R = torch.full((rows + 1,), choices, device=row_KT.device)
        choice_R.scatter_(0, row_KT.flatten(), torch.arange(choices, device=row_KT.device))
        return cls(row_KT.clamp(max=rows - 1), choice_R[:-1], row_KT, buffers, capacity, num_chunks)

    @property
    def rows_per_chunk(self) -> int:
        return self.buffers * self.capacity

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [N * P * V * L * C, D], zeros in the empty rows."""
        return _EncodePadded.apply(tokens_TD, self.choice_of_row_R.shape[0], self.row_of_choice_KT, self.written_KT)

    def weigh(self, rows_RD: Tensor, weight_KT: Tensor) -> Tensor:
        """Each row times the weight of its choice; empty ones stay zeros."""
        return weigh(rows_RD, self.row_of_choice_KT, self.choice_of_row_R, weight_KT)

    def decode(self, rows_RD: Tensor, weight_KT: Tensor | None) -> Tensor:
        """The sum of each token's rows, weighted where weights are given; see `decode`."""
        if weight_KT is None:
            weight_KT = (self.written_KT < self.choice_of_row_R.shape[0]).float()
        return decode(rows_RD, self.row_of_choice_KT, self.choice_of_row_R, weight_KT, padded=True)


class _EncodePadded(torch.autograd.Function):
    """Buffers with a row for each choice of a token. An empty row is written once, and no copy of all tokens with a row
    of zeros is made for it."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, rows: int, row_of_choice_KT: Tensor, written_KT: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice_KT, written_KT)
        ctx.rows = rows
        rows_RD = tokens_TD.new_zeros(rows + 1, tokens_TD.shape[1])  # dropped choices write behind the last row
        for row_T in written_KT:
            rows_RD.index_copy_(0, row_T, tokens_TD)
        return rows_RD[:-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        row_of_choice_KT, written_KT = ctx.saved_tensors
        return _add_rows(grads[0], row_of_choice_KT, written_KT < ctx.rows), None, None, None


@dataclass(frozen=True)
class ExactLayout:
    """Rows of real tokens, sorted by chunk, within one by destination, sender and expert, and there by location.

    Attributes:
        row_of_choice_KT: int64 row of each choice; 0 where dropped.
        choice_of_row_R: int64 choice k * T + t of each row; on a GPU followed by the dropped choices.
        kept_KT: bool, which choices have a row; None: all.
        rows_NPVL: int64 rows of each chunk for each rank, from each sender, for each of its experts.
        checksum: int64 scalar, equal on ranks that route the same tokens alike; zero if no other rank has them.
    """

    row_of_choice_KT: Tensor
    choice_of_row_R: Tensor
    kept_KT: Tensor | None
    rows_NPVL: Tensor
    checksum: Tensor

    @classmethod
    def of(cls, routing: Routing, slices: TokenSlices, num_chunks: int = 1) -> ExactLayout:
        choices, local_experts = routing.choices, len(routing.choices.rows_E) // slices.expert_parallel_size
        shape, alone = (num_chunks, slices.group_size, slices.senders, local_experts), slices.tensor_parallel_size == 1
        if num_chunks == 1 and alone:
            return cls._ordered(choices.order, choices.kept_KT, choices.rows_E.view(shape))
        bucket_KT = slices.bucket(choices.expert_KT, choices.location_KT, local_experts)
        layout = cls.by(in_chunks(bucket_KT, num_chunks, math.prod(shape[1:])), choices.kept_KT, shape)
        if alone:
            return layout
        row_KT = layout.row_of_choice_KT
        checksum = (row_KT.flatten() * torch.arange(1, row_KT.numel() + 1, device=row_KT.device)).sum()
        return replace(layout, checksum=checksum)

    @classmethod
    def by(cls, bucket_KT: Tensor, kept_KT: Tensor | None, shape: tuple[int, int, int, int]) -> ExactLayout:
        """From the order in which rows lie.

        Args:
            bucket_KT: int64 chunk, rank, sender and expert of each choice, as one number.
            kept_KT: bool, which choices have a row; None: all.
            shape: how many there are of each of the four.
        """
        buckets = math.prod(shape)
        order = ByExpert.of(bucket_KT if kept_KT is None else torch.where(kept_KT, bucket_KT, buckets))
        return cls._ordered(order, kept_KT, order.starts(buckets).diff().view(shape))

    @classmethod
    def _ordered(cls, order: Order, kept_KT: Tensor | None, rows_NPVL: Tensor) -> ExactLayout:
        row_KT, choice_R = order.place_KT, order.choice_X
        if kept_KT is not None:
            row_KT = row_KT * kept_KT
            if not choice_R.is_cuda:  # on a GPU the host does not know the number of rows yet: cut off when sending
                choice_R = choice_R[: int(rows_NPVL.sum())]
        return cls(row_KT, choice_R, kept_KT, rows_NPVL, torch.zeros((), dtype=torch.int64))

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [R, D]."""
        return _Encode.apply(tokens_TD, self.choice_of_row_R, self.row_of_choice_KT, self.kept_KT)

    @property
    def rows_NPVX(self) -> Tensor:
        """What ranks are told of the rows."""
        return self.rows_NPVL

    def weigh(self, rows_RD: Tensor, weight_KT: Tensor) -> Tensor:
        """Each row times the weight of its choice."""
        return weigh(rows_RD, self.row_of_choice_KT, self.choice_of_row_R, weight_KT, self.kept_KT)

    def decode(self, rows_RD: Tensor, weight_KT: Tensor | None) -> Tensor:
        """[R, D] → [T, D]: the sum of each token's rows, weighted where weights are given; see `decode`."""
        maps = self.row_of_choice_KT, self.choice_of_row_R
        if weight_KT is None:
            return _Total.apply(rows_RD, *maps, self.kept_KT)
        return decode(rows_RD, *maps, weight_KT, self.kept_KT)


def in_chunks(bucket_KT: Tensor, num_chunks: int, buckets: int) -> Tensor:
    """Numbers of a chunk's buckets → numbers of all chunks' buckets: those of the chunk that each token is in."""
    T = bucket_KT.shape[1]
    if num_chunks == 1:
        return bucket_KT
    return bucket_KT + torch.arange(T, device=bucket_KT.device) * num_chunks // max(T, 1) * buckets


class _Encode(torch.autograd.Function):
    """A row for each choice of a token. The gradient of a token is gathered from its rows and added up in fp32. torch's
    own gradient is a scatter: in bf16 it rounds after each addition, and on a GPU it adds in any order."""

    @staticmethod
    def forward(
        ctx: Any, tokens_TD: Tensor, choice_of_row_R: Tensor, row_of_choice_KT: Tensor, kept_KT: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(row_of_choice_KT, kept_KT)
        return tokens_TD.index_select(0, _token_of(choice_of_row_R, row_of_choice_KT))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _add_rows(grads[0], *ctx.saved_tensors), None, None, None


class _Total(torch.autograd.Function):
    """`_Encode` the other way round."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, row_of_choice_KT: Tensor, choice_of_row_R: Tensor, kept_KT: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(_token_of(choice_of_row_R[: rows_RD.shape[0]], row_of_choice_KT))
        return _add_rows(rows_RD, row_of_choice_KT, kept_KT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None, None


def _token_of(choice_R: Tensor, choices_KT: Tensor) -> Tensor:
    """The token of each choice k * T + t, of the choices [K, T]."""
    K, T = choices_KT.shape
    return choice_R if K == 1 else choice_R % max(T, 1)


def _add_rows(rows_RD: Tensor, row_of_choice_KT: Tensor, kept_KT: Tensor | None) -> Tensor:
    """[T, D] the sum of each token's rows, in fp32 (fp64 for fp64 rows) and rounded once."""
    (K, T), (R, D) = row_of_choice_KT.shape, rows_RD.shape
    if R == 0:
        return rows_RD.new_zeros(T, D)
    total_TD = None
    for k, row_T in enumerate(row_of_choice_KT):
        part_TD = rows_RD.index_select(0, row_T)
        if kept_KT is not None:
            part_TD.mul_(kept_KT[k].unsqueeze(1))
        if total_TD is None:
            total_TD = part_TD.to(torch.promote_types(part_TD.dtype, torch.float32)) if K > 1 else part_TD
        else:
            total_TD.add_(part_TD)
    assert total_TD is not None
    return total_TD.to(rows_RD.dtype)
