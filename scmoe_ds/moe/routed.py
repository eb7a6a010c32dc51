"""Tokens on their way to their experts and back: the state between `begin` and `finish` of a layer.

Shape suffixes: T tokens, D hidden, N chunks, E experts, L local experts, P expert-parallel ranks, C capacity,
R rows that this rank sends, S rows of one chunk that it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor

from scmoe_ds.moe.dispatch import ExactLayout, PaddedLayout, ReceivedRows, decode
from scmoe_ds.moe.experts import run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.overlap.all_to_all import InFlight, prepare, start
from scmoe_ds.overlap.counts import CountsInFlight, start_counts
from scmoe_ds.overlap.recorder import SILENT, PairRecorder
from scmoe_ds.overlap.transport import Transport


@dataclass(frozen=True)
class Travel:
    """How the rows of one layer travel.

    Attributes:
        transport, wire_dtype, blocking: see scmoe_ds.overlap.all_to_all.
        num_chunks: pieces that are sent, computed and returned one after another.
        deferred: leave the launch of the dispatch to `send`. A GPU's counts reach the host only after the gate has
            run; launching later lets the backbone's first operator be enqueued in the meantime.
        recorder: who is told what happens when.
    """

    transport: Transport
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
        experts: Experts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        *,
        exact: bool,
        travel: Travel,
    ) -> None:
        self.routing = routing
        self._experts, self.travel, self.shape = experts, travel, torch.Size(shape)
        self._ranks_and_experts = (travel.transport.size, experts.num_local_experts)
        self._received: list[ReceivedRows] = []
        self._sizes: list[tuple[list[int], list[int]]] = []  # rows to and from each rank, per chunk
        self._combines: list[InFlight] = []
        self._collected = False
        self._layout: ExactLayout | PaddedLayout
        self._counts: CountsInFlight | None = None
        recorder, transport, ranks = travel.recorder, travel.transport, travel.transport.size
        (tokens_TD,) = recorder.open("encode", tokens_TD)
        if exact:
            self._layout = ExactLayout.of(routing, travel.num_chunks)
            rows_PNL = self._layout.rows_per_expert_NE.view(-1, *self._ranks_and_experts).transpose(0, 1)
            self._counts = start_counts(rows_PNL.flatten(), transport, recorder.watch("counts", 0))
        else:
            self._layout = PaddedLayout.of(routing, travel.num_chunks)
        (rows_RD,) = recorder.close("encode", self._layout.encode(tokens_TD))  # while the counts travel
        watches = [recorder.watch("dispatch", chunk) for chunk in range(travel.num_chunks)]
        self._dispatches = prepare(rows_RD, transport, travel.blocking, travel.wire_dtype, watches)
        if isinstance(self._layout, PaddedLayout):
            equal = [self._layout.rows_per_chunk // ranks] * ranks
            self._send([(equal, equal)] * travel.num_chunks)
        elif not travel.deferred:
            self.send()

    def send(self) -> None:
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise."""
        counts, self._counts = self._counts, None
        if counts is None:
            return
        P, L = self._ranks_and_experts
        rows_to_PNL, rows_from_PNL = (torch.tensor(numbers).view(P, -1, L) for numbers in counts.wait())
        to_NP, from_NP = (rows_PNL.sum(2).t().tolist() for rows_PNL in (rows_to_PNL, rows_from_PNL))
        self._send(list(zip(to_NP, from_NP, strict=True)))  # first: the rest can be done while rows travel
        device = self._layout.row_of_choice_KT.device
        self._received = [ReceivedRows.of(rows_PL, device) for rows_PL in rows_from_PNL.transpose(0, 1)]

    def _send(self, sizes: list[tuple[list[int], list[int]]]) -> None:
        self._sizes, first_row = sizes, 0
        for flight, (rows_to_P, rows_from_P) in zip(self._dispatches, sizes, strict=True):
            flight.send(rows_to_P, rows_from_P, first_row)
            first_row += sum(rows_to_P)

    def run_experts(self) -> None:
        """Waits for the dispatch of the next chunk, computes the local experts on it, and sends the results back.

        Raises:
            RuntimeError: the experts have run on every chunk already.
        """
        self.send()
        chunk = len(self._combines)
        if chunk == self.travel.num_chunks:
            raise RuntimeError("run_experts was called once too often on the same routed tokens (it is called once "
                               "per chunk); begin again for another use")  # fmt: skip
        recorder, transport = self.travel.recorder, self.travel.transport
        (rows_SD,) = recorder.open("experts", self._dispatches[chunk].wait(), chunk=chunk)
        (output_SD,) = recorder.close("experts", self._compute(rows_SD, chunk), chunk=chunk)
        rows_to_P, rows_from_P = self._sizes[chunk]
        watch = recorder.watch("combine", chunk)
        self._combines.append(start(output_SD, transport, rows_from_P, rows_to_P, self.travel.blocking,
                                    self.travel.wire_dtype, watch))  # fmt: skip

    def _compute(self, rows_SD: Tensor, chunk: int) -> Tensor:
        if not self._received:
            buffer_PLCD = rows_SD.view(*self._ranks_and_experts, -1, rows_SD.shape[-1])
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
