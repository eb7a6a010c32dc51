"""Routed tokens in flight: the state of a layer between its `begin` and its `finish`.

Shape suffixes: T tokens, D hidden, L local experts, N chunks, P ranks, V senders, C capacity, R/S rows sent/received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from scmoe_ds.comm.all_to_all import InFlight, SplitSizes, prepare, start
from scmoe_ds.comm.counts import CountsInFlight, start_counts
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.checks import check_dtype
from scmoe_ds.moe.decode import decode
from scmoe_ds.moe.experts import OwnExperts, run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.identity import add_identity
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.received import ReceivedRows
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


class RoutedTokens:
    """Routed tokens in flight. A layer's `begin` makes them, its `finish` uses them up, each once.

    Args:
        experts: this rank's experts.
        tokens_TD: the gate's input.
        routing: which expert takes which token, and with what weight.
        shape: of the layer's input, for the result.
        exchange: how rows are sent.
        weigh_rows: the weights multiply what the experts read, not what they return (exact rows only).
    """

    def __init__(
        self,
        experts: Experts | OwnExperts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        exchange: Exchange,
        weigh_rows: bool = False,
    ) -> None:
        self.routing, self.exchange, self.shape = routing, exchange, torch.Size(shape)
        self.experts = experts
        self._tokens_TD = None if routing.identity_weight_T is None else tokens_TD
        self._received: list[ReceivedRows] = []
        self._sizes: list[SplitSizes] = []  # of the dispatch, per chunk
        self._combines: list[InFlight] = []
        self._collected = False
        self._layout: ExactLayout | PaddedLayout
        self._counts: CountsInFlight | None = None
        recorder, transport, slices = exchange.recorder, exchange.transport, exchange.slices
        (tokens_TD,) = recorder.open("encode", tokens_TD)
        if exchange.exact:
            self._layout = ExactLayout.of(routing, slices, exchange.num_chunks)
            sent, local = row_counts(self._layout.rows_NPVL, self._layout.checksum, slices)
            self._counts = start_counts(sent, transport, recorder.watch("counts", 0), local)
        else:
            self._layout = PaddedLayout.of(routing, slices, exchange.num_chunks)
        rows_RD = self._layout.encode(tokens_TD)  # while the counts are on their way
        if weigh_rows:
            weight_X = routing.weight_KT.flatten()
            rows_RD = (rows_RD * weight_X[self._layout.choice_of_row_R].unsqueeze(1)).to(rows_RD.dtype)
            self.routing = replace(routing, weight_KT=torch.ones_like(routing.weight_KT))
        (rows_RD,) = recorder.close("encode", rows_RD)
        watches = [recorder.watch("dispatch", chunk) for chunk in range(exchange.num_chunks)]
        how = exchange.blocking, exchange.wire_dtype, watches, exchange.deferred and exchange.exact
        self._dispatches = prepare(rows_RD, transport, *how)
        if isinstance(self._layout, PaddedLayout):
            per_sender = self._layout.rows_per_chunk // (slices.group_size * slices.senders)
            to_PV = [[per_sender] * slices.senders] * slices.group_size
            from_P = [per_sender if rank in slices.expert_parallel_ranks else 0 for rank in range(slices.group_size)]
            self._send([slices.split_sizes(to_PV, from_P)] * exchange.num_chunks)
        elif not exchange.deferred:
            self.send()

    def send(self) -> None:
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise.

        Raises:
            RuntimeError: tensor-parallel ranks that route the same tokens differently.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return
        slices, local_experts = self.exchange.slices, self.experts.num_local_experts
        reach(f"the row counts of {self.exchange.layer}")
        local, received = self.counts_on_host(counts)
        from_PX = torch.tensor(received).view(slices.group_size, -1)
        if slices.tensor_parallel_size > 1:
            slices.check_alike(local.pop(), from_PX[:, -1].tolist())
            from_PX = from_PX[:, :-1]
        from_PNL = from_PX.reshape(slices.group_size, -1, local_experts)
        rows_NPVL = torch.tensor(local).view(-1, slices.group_size, slices.senders, local_experts)
        to_NPV = rows_NPVL.sum(3).tolist()
        from_NP = from_PNL.sum(2).t().tolist()
        self._send([slices.split_sizes(*rows) for rows in zip(to_NPV, from_NP, strict=True)])
        self._received = [ReceivedRows.of(rows_PL) for rows_PL in from_PNL.transpose(0, 1)]
        if isinstance(self.experts, OwnExperts):
            for rows in self._received:
                self.experts.announce(rows.rows_per_expert)

    def counts_on_host(self, counts: CountsInFlight) -> tuple[list[int], list[int]]:
        """Waits for the counts of `row_counts`: this rank's, and what every rank tells this one, [P * X].

        They are the one thing that the host has to know of the data. scmoe_ds.check, which has no data, answers here.
        """
        return counts.wait()

    def _send(self, sizes: list[SplitSizes]) -> None:
        self._sizes, first_row = sizes, 0
        for dispatch, of_chunk in zip(self._dispatches, sizes, strict=True):
            dispatch.send(of_chunk, first_row)
            first_row += of_chunk.rows

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
        (rows_SD,) = recorder.open("experts", self._dispatches[chunk].wait(), chunk=chunk)
        try:
            output_SD = self._compute(rows_SD, chunk)
        except RuntimeError:
            if isinstance(self.experts, nn.Module):
                check_dtype(rows_SD, self.experts)
            raise
        (output_SD,) = recorder.close("experts", output_SD, chunk=chunk)
        back, watch = self._sizes[chunk].reversed(), recorder.watch("combine", chunk)
        self._combines.append(start(output_SD, exchange.transport, back, exchange.blocking, exchange.wire_dtype, watch))

    def _compute(self, rows_SD: Tensor, chunk: int) -> Tensor:
        if not self._received:
            ranks, local_experts = self.exchange.slices.expert_parallel_size, self.experts.num_local_experts
            buffer_PLCD = rows_SD.view(ranks, local_experts, -1, rows_SD.shape[-1])
            return cast(Experts, self.experts)(buffer_PLCD).reshape(rows_SD.shape)
        received = self._received[chunk]
        return received.ungroup(run_experts(self.experts, received.group(rows_SD), received.rows_per_expert))

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
        rows_RD, weight_KT = self.exchange.recorder.open("decode", rows_RD, self.routing.weight_KT)
        maps = self._layout.row_of_choice_KT, self._layout.choice_of_row_R
        if isinstance(self._layout, ExactLayout):
            output_TD = decode(rows_RD, *maps, weight_KT, self._layout.kept_KT)
        else:
            output_TD = decode(rows_RD, *maps, weight_KT, padded=True)
        if self._tokens_TD is not None and self.routing.identity_weight_T is not None:
            output_TD = add_identity(output_TD, self._tokens_TD, self.routing.identity_weight_T)
        (output_TD,) = self.exchange.recorder.close("decode", output_TD)
        return output_TD.view(self.shape)


def row_counts(rows_NPVL: Tensor, checksum: Tensor, slices: TokenSlices) -> tuple[Tensor, Tensor]:
    """What every rank is told ahead, [P * (N * L)], and what this host has to know, [N * P * V * L].

    Where ranks hold the same tokens, both end in a checksum of the routing (for every rank): they must route alike.
    """
    sent_NPL = rows_NPVL[:, :, slices.rank % slices.senders]
    local = rows_NPVL.flatten()
    if slices.tensor_parallel_size == 1:
        return sent_NPL.transpose(0, 1).flatten(), local
    rank_P = torch.arange(slices.group_size, device=sent_NPL.device)
    reached = slices.expert_parallel_ranks  # to the others, other ranks send
    reached_P = (rank_P >= reached.start) & (rank_P < reached.stop)
    sent_PX = (sent_NPL * reached_P.view(1, -1, 1)).transpose(0, 1).flatten(1)
    checksum_P1 = checksum.expand(slices.group_size, 1)
    return torch.cat([sent_PX, checksum_P1], dim=1).flatten(), torch.cat([local, checksum_P1[0]])
