"""How the rows of one layer are exchanged, and what ranks tell each other of them beforehand.

A rank tells every other one how many rows it will send: for each local expert (or place) there, and, where a token has
one row for all of its experts on a rank, how many rows that makes. These numbers are the row counts, X of them.

Shape suffixes: K top-k, L local experts, N chunks, P ranks, V senders (tensor-parallel ranks that share their tokens),
X row counts, Y numbers of the experts' own notice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scmoe_ds.comm.all_to_all import SplitSizes
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.per_rank import PerRankLayout
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.trace.recorder import SILENT, PairRecorder


@dataclass(frozen=True)
class Exchange:
    """How the rows of one layer are exchanged.

    Attributes:
        transport, wire_dtype, blocking: see scmoe_ds.comm.all_to_all.
        slices: which of the tokens this rank sends.
        exact: send rows of routed tokens only; otherwise DeepSpeed's padded buffers.
        num_chunks: pieces that are sent, computed and returned one after another.
        deferred: leave the launch of the dispatch to `RoutedTokens.send`. A GPU's row counts reach the host only after
            the gate has run. With a later launch the host can enqueue the backbone's first operator in the meantime.
        recorder: is told what happens when.
        layer: its name, for messages.
        weigh_rows: the weights multiply what the experts read, not what they return.
    """

    transport: Transport
    slices: TokenSlices
    exact: bool = True
    wire_dtype: str | None = None
    blocking: bool = False
    num_chunks: int = 1
    deferred: bool = False
    recorder: PairRecorder = SILENT
    layer: str = "a MoE layer"
    weigh_rows: bool = False

    def layout(self, routing: Routing) -> PaddedLayout | ExactLayout | PerRankLayout:
        """Of the routed tokens' rows."""
        if not self.exact:
            return PaddedLayout.of(routing, self.slices, self.num_chunks)
        kind = PerRankLayout if one_row_per_rank(len(routing.weight_KT), self.slices) else ExactLayout
        return kind.of(routing, self.slices, self.num_chunks)


def one_row_per_rank(k: int, slices: TokenSlices) -> bool:
    """Whether a token is sent to a rank once, for all of its k experts there, and not once for each choice.

    Not with tensor parallelism: its ranks hold the same tokens and divide the choices, and each sends rows of its own.
    """
    return k > 1 and slices.group_size > 1 and slices.tensor_parallel_size == 1


def sizes_of(slices: TokenSlices, to_NPVX: Tensor, from_NPX: Tensor) -> list[SplitSizes]:
    """Of each chunk's exchange."""
    return [slices.split_sizes(*rows) for rows in zip(to_NPVX.sum(3).tolist(), from_NPX.sum(2).tolist(), strict=True)]


def row_counts(
    rows_NPVX: Tensor, checksum: Tensor, slices: TokenSlices, notice_PY: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The row counts on their way: what every rank is told, and what this rank's host has to know of its own rows.

    Where tensor-parallel ranks hold the same tokens, both end in a checksum of the routing: these ranks must route
    alike.

    Args:
        rows_NPVX: int64, the row counts of each chunk, to each rank, by sender.
        checksum: [1] int64 of the routing.
        slices: who sends what to whom.
        notice_PY: int64, what the experts tell each rank beside; None: nothing.

    Returns:
        told: [P * (N * X + Y)] int64, with a checksum [P * (N * X + Y + 1)]; and own: [N * P * V * X], with one more.
    """
    sent_NPX = rows_NPVX[:, :, slices.rank % slices.senders]
    local = rows_NPVX.flatten()
    notices = [] if notice_PY is None else [notice_PY]  # a kernel less without
    if slices.tensor_parallel_size == 1:
        sent_PX = sent_NPX.transpose(0, 1).flatten(1)
        return torch.cat([sent_PX, *notices], dim=1).flatten() if notices else sent_PX.flatten(), local
    rank_P = torch.arange(slices.group_size, device=sent_NPX.device)
    reached = slices.expert_parallel_ranks  # to the others, other ranks send
    reached_P = (rank_P >= reached.start) & (rank_P < reached.stop)
    sent_PX = (sent_NPX * reached_P.view(1, -1, 1)).transpose(0, 1).flatten(1)
    checksum_P1 = checksum.expand(slices.group_size, 1)
    return torch.cat([sent_PX, *notices, checksum_P1], dim=1).flatten(), torch.cat([local, checksum_P1[0]])
