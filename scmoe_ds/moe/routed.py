"""Tokens on their way to their experts and back: the state between `begin` and `finish` of a layer.

Shape suffixes: T tokens, D hidden, N chunks, L local experts, P ranks of the travel group, V senders of one token's
rows (see shares.py), C capacity, R rows of this rank's tokens, S rows of one chunk that it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor

from scmoe_ds.comm.all_to_all import InFlight, Route, prepare, start
from scmoe_ds.comm.counts import CountsInFlight, start_counts
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.dispatch import ExactLayout, PaddedLayout, ReceivedRows, decode
from scmoe_ds.moe.experts import MovingExperts, run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.shares import Shares
from scmoe_ds.trace.recorder import SILENT, PairRecorder


@dataclass(frozen=True)
class Travel:
    """How the rows of one layer travel.

    Attributes:
        transport, wire_dtype, blocking: see scmoe_ds.comm.all_to_all.
        shares: which of the tokens this rank sends.
        num_chunks: pieces that are sent, computed and returned one after another.
        deferred: leave the launch of the dispatch to `send`. A GPU's counts reach the host only after the gate has
            run; launching later lets the backbone's first operator be enqueued in the meantime.
        recorder: who is told what happens when.
    """

    transport: Transport
    shares: Shares
    wire_dtype: str | None = None
    blocking: bool = False
    num_chunks: int = 1
    deferred: bool = False
    recorder: PairRecorder = SILENT


class RoutedTokens:
    """Routed tokens in flight; made by a layer's `begin`, used up by its `finish`.

    Args:
        experts: this rank's experts.
        tokens_TD: the gate's input.
        routing: who goes where, with what weight.
        shape: of the layer's input, for the result.
        exact: send routed tokens only; otherwise DeepSpeed's padded buffers.
        travel: how.
    """

    def __init__(
        self,
        experts: Experts | MovingExperts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        *,
        exact: bool,
        travel: Travel,
    ) -> None:
        self.routing = routing
        self._experts, self.travel, self.shape = experts, travel, torch.Size(shape)
        self._received: list[ReceivedRows] = []
        self._routes: list[Route] = []  # of the dispatch, per chunk
        self._combines: list[InFlight] = []
        self._collected = False
        self._layout: ExactLayout | PaddedLayout
        self._counts: CountsInFlight | None = None
        recorder, transport, shares = travel.recorder, travel.transport, travel.shares
        (tokens_TD,) = recorder.open("encode", tokens_TD)
        if exact:
            self._layout = ExactLayout.of(routing, shares, travel.num_chunks)
            told, local = self._numbers(self._layout)
            self._counts = start_counts(told, transport, recorder.watch("counts", 0), local)
        else:
            self._layout = PaddedLayout.of(routing, shares, travel.num_chunks)
        (rows_RD,) = recorder.close("encode", self._layout.encode(tokens_TD))  # while the counts travel
        watches = [recorder.watch("dispatch", chunk) for chunk in range(travel.num_chunks)]
        self._dispatches = prepare(rows_RD, transport, travel.blocking, travel.wire_dtype, watches)
        if isinstance(self._layout, PaddedLayout):
            per_sender = self._layout.rows_per_chunk // (shares.ranks * shares.senders)
            from_P = [per_sender if rank in shares.experts_from else 0 for rank in range(shares.ranks)]
            self._send([shares.route([[per_sender] * shares.senders] * shares.ranks, from_P)] * travel.num_chunks)
        elif not travel.deferred:
            self.send()

    def _numbers(self, layout: ExactLayout) -> tuple[Tensor, Tensor]:
        """What every rank is told ahead, [P * (N * L)], and what this host wants to know, [N * P * V].

        Where ranks hold the same tokens, both end in a checksum of the routing (for every rank): they must route alike.
        """
        shares = self.travel.shares
        sent_NPL = layout.rows_NPVL[:, :, shares.rank % shares.senders]
        local_NPV = layout.rows_NPVL.sum(3)
        if shares.holders == 1:
            return sent_NPL.transpose(0, 1).flatten(), local_NPV.flatten()
        places_P = torch.arange(shares.ranks, device=sent_NPL.device)
        first, last = shares.experts_from[0], shares.experts_from[-1]
        reached_P = (places_P >= first) & (places_P <= last)  # to the others, fellow holders send
        sent_PX = (sent_NPL * reached_P.view(1, -1, 1)).transpose(0, 1).flatten(1)
        checksum_P1 = layout.checksum.expand(shares.ranks, 1)
        return torch.cat([sent_PX, checksum_P1], dim=1).flatten(), torch.cat([local_NPV.flatten(), checksum_P1[0]])

    def send(self) -> None:
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise.

        Raises:
            RuntimeError: tensor-parallel ranks that route the same tokens differently.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return
        shares, local_experts = self.travel.shares, self._experts.num_local_experts
        local, theirs = counts.wait()
        theirs_PX = torch.tensor(theirs).view(shares.ranks, -1)
        if shares.holders > 1:
            shares.check_alike(local.pop(), theirs_PX[:, -1].tolist())
            theirs_PX = theirs_PX[:, :-1]
        from_PNL = theirs_PX.reshape(shares.ranks, -1, local_experts)
        to_NPV = torch.tensor(local).view(-1, shares.ranks, shares.senders).tolist()
        from_NP = from_PNL.sum(2).t().tolist()
        self._send([shares.route(*rows) for rows in zip(to_NPV, from_NP, strict=True)])  # first: the rest can be done
        device = self._layout.row_of_choice_KT.device  # while rows travel
        self._received = [ReceivedRows.of(rows_PL, device) for rows_PL in from_PNL.transpose(0, 1)]
        if isinstance(self._experts, MovingExperts):
            for received in self._received:
                self._experts.announce(received.rows_per_expert)

    def _send(self, routes: list[Route]) -> None:
        self._routes, first_row = routes, 0
        for flight, route in zip(self._dispatches, routes, strict=True):
            flight.send(route, first_row)
            first_row += route.rows

    def run_experts(self) -> None:
        """Waits for the dispatch of the next chunk, computes the local experts on it, and sends the results back.

        Raises:
            RuntimeError: the experts have run on every chunk already.
        """
        self.send()
        chunk = len(self._combines)
        if chunk == self.travel.num_chunks:
            raise RuntimeError(
                "run_experts was called once too often on the same routed tokens (it is called once "
                "per chunk); begin again for another use"
            )
        recorder, transport = self.travel.recorder, self.travel.transport
        (rows_SD,) = recorder.open("experts", self._dispatches[chunk].wait(), chunk=chunk)
        (output_SD,) = recorder.close("experts", self._compute(rows_SD, chunk), chunk=chunk)
        watch = recorder.watch("combine", chunk)
        self._combines.append(
            start(
                output_SD,
                transport,
                self._routes[chunk].reversed(),
                self.travel.blocking,
                self.travel.wire_dtype,
                watch,
            )
        )

    def _compute(self, rows_SD: Tensor, chunk: int) -> Tensor:
        if not self._received:
            assert not isinstance(self._experts, MovingExperts)  # they are given exact rows
            local_experts = self._experts.num_local_experts
            buffer_PLCD = rows_SD.view(self.travel.shares.expert_ranks, local_experts, -1, rows_SD.shape[-1])
            return self._experts(buffer_PLCD).reshape(rows_SD.shape)
        received = self._received[chunk]
        return received.ungroup(run_experts(self._experts, received.group(rows_SD), received.rows_per_expert))

    def collect(self) -> Tensor:
        """Waits for the combine and decodes: Σ G·E of eq. 1, in the shape of the shortcut.

        Raises:
            RuntimeError: the experts have not run on every chunk, or the result was taken before.
        """
        if self._collected:
            raise RuntimeError("these routed tokens were finished already; begin again for another use")
        if len(self._combines) < self.travel.num_chunks:
            raise RuntimeError("finish was called before run_experts (which is called once per chunk)")
        self._collected = True
        parts = [combine.wait() for combine in self._combines]
        rows_RD = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows_RD, weight_KT = self.travel.recorder.open("decode", rows_RD, self.routing.weight_KT)
        output_TD = decode(rows_RD, self._layout.row_of_choice_KT, weight_KT)
        (output_TD,) = self.travel.recorder.close("decode", output_TD)
        return output_TD.view(self.shape)
