"""Routed tokens in flight: the state of a layer between its `begin` and its `finish`.

Shape suffixes: T tokens, D hidden, K top-k, L local experts, N chunks, P ranks, V senders, C capacity or choices,
R/S rows sent/received, X counts: of each local expert, and of rows where these are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from scmoe_ds.comm.all_to_all import InFlight, SplitSizes, prepare, start
from scmoe_ds.comm.counts import CountsInFlight, start_counts
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.checks import check_dtype
from scmoe_ds.moe.experts import OwnExperts, run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.identity import add_identity
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.per_rank import PerRankLayout
from scmoe_ds.moe.received import ReceivedCopies, ReceivedRows
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.parallel.standing import reach
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


class RoutedTokens:
    """Routed tokens in flight. A layer's `begin` makes them, its `finish` uses them up, each once.

    Args:
        experts: this rank's experts.
        tokens_TD: the gate's input.
        routing: which expert takes which token, and with what weight.
        shape: of the layer's input, for the result.
        exchange: how rows are sent.
    """

    def __init__(
        self,
        experts: Experts | OwnExperts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        exchange: Exchange,
    ) -> None:
        self.routing, self.exchange, self.shape = routing, exchange, torch.Size(shape)
        self.experts = experts
        self._tokens_TD = None if routing.identity_weight_T is None else tokens_TD
        self._received: Sequence[ReceivedRows | ReceivedCopies] = []
        self._sizes: list[SplitSizes] = []  # of the dispatch, per chunk
        self._combines: list[InFlight] = []
        self._collected = False
        self._counts: CountsInFlight | None = None
        recorder, slices = exchange.recorder, exchange.slices
        (tokens_TD,) = recorder.open("encode", tokens_TD)
        self._layout = exchange.layout(routing)
        if not isinstance(self._layout, PaddedLayout):
            sent, local = row_counts(self._layout.rows_NPVX, self._layout.checksum, slices)
            self._counts = start_counts(sent, exchange.transport, recorder.watch("counts", 0), local)
        self._prepare(tokens_TD)  # while the counts are on their way
        if isinstance(self._layout, PaddedLayout):
            per_sender = self._layout.rows_per_chunk // (slices.group_size * slices.senders)
            to_PV = [[per_sender] * slices.senders] * slices.group_size
            from_P = [per_sender if rank in slices.expert_parallel_ranks else 0 for rank in range(slices.group_size)]
            self._sizes = [slices.split_sizes(to_PV, from_P)] * exchange.num_chunks
            _send(self._dispatches, self._sizes)
        elif not exchange.deferred:
            self.send()

    def _prepare(self, tokens_TD: Tensor) -> None:
        exchange, layout, weight_KT = self.exchange, self._layout, self.routing.weight_KT
        chunks, deferred = range(exchange.num_chunks), exchange.deferred and exchange.exact
        rows_RD = layout.encode(tokens_TD)
        described_C2 = None
        if isinstance(layout, PerRankLayout):
            described_C2 = layout.describe(weight_KT)
        elif exchange.weigh_rows:
            rows_RD = layout.weigh(rows_RD, weight_KT)
        (rows_RD,) = exchange.recorder.close("encode", rows_RD)
        watches = [exchange.recorder.watch("dispatch", chunk) for chunk in chunks]
        how = exchange.transport, exchange.blocking
        self._dispatches = prepare(rows_RD, *how, exchange.wire_dtype, watches, deferred)
        self._descriptions: list[InFlight] = []
        if described_C2 is not None:  # a few bytes per choice, which keep their number format
            self._descriptions = prepare(described_C2, *how, None, [None for _ in chunks], deferred)

    def send(self) -> None:
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise.

        Raises:
            RuntimeError: tensor-parallel ranks that route the same tokens differently.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return
        slices, layout = self.exchange.slices, self._layout
        reach(f"the row counts of {self.exchange.layer}")
        local, told = self.counts_on_host(counts)
        from_PX = torch.tensor(told).view(slices.group_size, -1)
        if slices.tensor_parallel_size > 1:
            slices.check_alike(local.pop(), from_PX[:, -1].tolist())
            from_PX = from_PX[:, :-1]
        from_NPX = from_PX.reshape(slices.group_size, self.exchange.num_chunks, -1).transpose(0, 1)
        to_NPVX = torch.tensor(local).view(-1, slices.group_size, slices.senders, from_NPX.shape[-1])
        kind = ReceivedRows if isinstance(layout, ExactLayout) else ReceivedCopies
        self._received = [kind.of(from_PX) for from_PX in from_NPX]
        if isinstance(layout, PerRankLayout):
            _send(self._descriptions, _sizes(slices, to_NPVX[..., :-1], from_NPX[..., :-1]))
            to_NPVX, from_NPX = to_NPVX[..., -1:], from_NPX[..., -1:]
        self._sizes = _sizes(slices, to_NPVX, from_NPX)
        _send(self._dispatches, self._sizes)
        if isinstance(self.experts, OwnExperts):
            for each in self._received:
                self.experts.announce(each.rows_per_expert)

    def counts_on_host(self, counts: CountsInFlight) -> tuple[list[int], list[int]]:
        """Waits for the counts of `row_counts`: this rank's, and what every rank tells this one, [P * X].

        They are the one thing that the host has to know of the data. scmoe_ds.check, which has no data, answers here.
        """
        return counts.wait()

    def run_experts(self) -> None:
        """Waits for the dispatch of the next chunk, computes the local experts on it, and sends the results back.

        Raises:
            RuntimeError: the experts have run on every chunk already.
        """
        self.send()
        chunk, exchange, recorder = len(self._combines), self.exchange, self.exchange.recorder
        if chunk == exchange.num_chunks:
            raise RuntimeError(
                "run_experts was called once too often on the same routed tokens (it is called once "
                "per chunk); begin again for another use"
            )
        rows_SD = self._dispatches[chunk].wait()
        described_C2 = self._descriptions[chunk].wait() if self._descriptions else None
        (rows_SD,) = recorder.open("experts", rows_SD, chunk=chunk)
        try:
            output_SD = self._compute(rows_SD, described_C2, chunk)
        except RuntimeError:
            if isinstance(self.experts, nn.Module):
                check_dtype(rows_SD, self.experts)
            raise
        (output_SD,) = recorder.close("experts", output_SD, chunk=chunk)
        back, watch = self._sizes[chunk].reversed(), recorder.watch("combine", chunk)
        self._combines.append(start(output_SD, exchange.transport, back, exchange.blocking, exchange.wire_dtype, watch))

    def _compute(self, rows_SD: Tensor, described_C2: Tensor | None, chunk: int) -> Tensor:
        if not self._received:
            ranks, local_experts = self.exchange.slices.expert_parallel_size, self.experts.num_local_experts
            buffer_PLCD = rows_SD.view(ranks, local_experts, -1, rows_SD.shape[-1])
            return cast(Experts, self.experts)(buffer_PLCD).reshape(rows_SD.shape)
        received = self._received[chunk]
        run = partial(run_experts, self.experts, rows_per_expert=received.rows_per_expert)
        if isinstance(received, ReceivedRows):
            return received.ungroup(run(received.group(rows_SD)))
        assert described_C2 is not None
        choices, weight_C = received.choices_of(described_C2)
        if self.exchange.weigh_rows:
            return choices.total(run(choices.expand(rows_SD, weight_C)))
        return choices.total(run(choices.expand(rows_SD)), weight_C)

    def collect(self) -> Tensor:
        """Waits for the combine and decodes: Σ G·E of eq. 1, in the shape of the layer's input.

        Raises:
            RuntimeError: the experts have not run on every chunk, or the result was taken before.
        """
        if self._collected:
            raise RuntimeError("these routed tokens were finished already; begin again for another use")
        if len(self._combines) < self.exchange.num_chunks:
            raise RuntimeError("finish was called before run_experts (which is called once per chunk)")
        self._collected = True
        parts = [combine.wait() for combine in self._combines]
        rows_RD = parts[0] if len(parts) == 1 else torch.cat(parts)
        weighted = not (self.exchange.weigh_rows or isinstance(self._layout, PerRankLayout))
        weight_KT = self.routing.weight_KT if weighted else None
        rows_RD, weight_KT = self.exchange.recorder.open("decode", rows_RD, weight_KT)
        output_TD = self._layout.decode(rows_RD, weight_KT)
        if self._tokens_TD is not None and self.routing.identity_weight_T is not None:
            output_TD = add_identity(output_TD, self._tokens_TD, self.routing.identity_weight_T)
        (output_TD,) = self.exchange.recorder.close("decode", output_TD)
        return output_TD.view(self.shape)


def one_row_per_rank(k: int, slices: TokenSlices) -> bool:
    """Whether exact rows are tokens, one for each rank with any of their k experts, and not choices.

    Tensor-parallel ranks divide the choices of the tokens that they all hold, and each sends rows of its own.
    """
    return k > 1 and slices.group_size > 1 and slices.tensor_parallel_size == 1


def _sizes(slices: TokenSlices, to_NPVX: Tensor, from_NPX: Tensor) -> list[SplitSizes]:
    """Of each chunk's exchange."""
    return [slices.split_sizes(*rows) for rows in zip(to_NPVX.sum(3).tolist(), from_NPX.sum(2).tolist(), strict=True)]


def _send(dispatches: Sequence[InFlight], sizes: Sequence[SplitSizes]) -> None:
    first_row = 0
    for dispatch, of_chunk in zip(dispatches, sizes, strict=True):
        dispatch.send(of_chunk, first_row)
        first_row += of_chunk.rows


def row_counts(rows_NPVX: Tensor, checksum: Tensor, slices: TokenSlices) -> tuple[Tensor, Tensor]:
    """What every rank is told ahead, [P * (N * X)], and what this host has to know, [N * P * V * X].

    Where ranks hold the same tokens, both end in a checksum of the routing (for every rank): they must route alike.
    """
    sent_NPX = rows_NPVX[:, :, slices.rank % slices.senders]
    local = rows_NPVX.flatten()
    if slices.tensor_parallel_size == 1:
        return sent_NPX.transpose(0, 1).flatten(), local
    rank_P = torch.arange(slices.group_size, device=sent_NPX.device)
    reached = slices.expert_parallel_ranks  # to the others, other ranks send
    reached_P = (rank_P >= reached.start) & (rank_P < reached.stop)
    sent_PX = (sent_NPX * reached_P.view(1, -1, 1)).transpose(0, 1).flatten(1)
    checksum_P1 = checksum.expand(slices.group_size, 1)
    return torch.cat([sent_PX, checksum_P1], dim=1).flatten(), torch.cat([local, checksum_P1[0]])
