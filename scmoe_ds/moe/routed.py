"""Routed tokens in flight: the state of a layer between its `begin` and its `finish`.

Shape suffixes: T tokens, D hidden, K top-k, L local experts, N chunks, P ranks, V senders, C capacity or choices,
R/S rows sent/received, X counts: of each local expert, and of rows where these are fewer; Y
numbers of the experts' own notice.
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
from scmoe_ds.moe.checks import check_dtype
from scmoe_ds.moe.early import EarlyRule
from scmoe_ds.moe.exchange import Exchange, row_counts, sizes_of
from scmoe_ds.moe.experts import OwnExperts, run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.identity import add_identity
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.per_rank import PerRankLayout
from scmoe_ds.moe.received import ReceivedCopies, ReceivedRows
from scmoe_ds.parallel.standing import reach


class RoutedTokens:
    """Routed tokens in flight. A layer's `begin` makes them, its `finish` uses them up, each once.

    Args:
        experts: this rank's experts.
        tokens_TD: the gate's input.
        routing: which expert takes which token, and with what weight.
        shape: of the layer's input, for the result.
        exchange: how rows are sent.
        early: decides before they are; None: the routing is final.
        gated: what the gate itself has chosen, before any rule; None: `routing`.

    Raises:
        ValueError: an early rule for tokens in chunks.
    """

    def __init__(
        self,
        experts: Experts | OwnExperts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        exchange: Exchange,
        early: EarlyRule | None = None,
        gated: Routing | None = None,
    ) -> None:
        if early is not None and exchange.num_chunks > 1:
            raise ValueError(
                f"num_chunks = {exchange.num_chunks}: load-aware thresholds and copies of experts decide for all rows "
                "at once; set scmoe.overlap.num_chunks to 1"
            )
        self.routing, self.exchange, self.shape = routing, exchange, torch.Size(shape)
        self.experts, self.gated = experts, gated or routing
        self._tokens_TD = None if routing.identity_weight_T is None else tokens_TD
        self._received: Sequence[ReceivedRows | ReceivedCopies] = []
        self._sizes: list[SplitSizes] = []  # of the dispatch, per chunk
        self._combines: list[InFlight] = []
        self._collected = False
        self._told = False  # the experts, of all ranks' notices
        self._counts: CountsInFlight | None = None
        self._undecided: _Undecided | None = None
        if early is None:
            self._lay_out(tokens_TD)
        else:
            self._undecided = _Undecided(early, tokens_TD, self._tell(early.notice(routing, exchange.slices)))
        if not exchange.deferred:
            self.send()

    def _tell(self, notice_PX: Tensor) -> CountsInFlight:
        """The notices of early rule and experts on their way to all ranks."""
        notice_PY = self._notice_of_experts()
        sent = notice_PX if notice_PY is None else torch.cat([notice_PX, notice_PY], dim=1)
        return start_counts(sent.flatten(), self.exchange.transport, self.exchange.recorder.watch("counts", 0))

    def _notice_of_experts(self) -> Tensor | None:
        if not (isinstance(self.experts, OwnExperts) and self.experts.notices):
            return None
        return self.experts.notice(self.routing, self.exchange.slices.group_size)

    def _lay_out(self, tokens_TD: Tensor, known: tuple[Tensor, Tensor] | None = None) -> None:
        """Encodes the tokens, while the counts of their rows are on their way.

        Args:
            known: the counts, if an early rule knows them; see `Decision`.
        """
        exchange, recorder, slices = self.exchange, self.exchange.recorder, self.exchange.slices
        (tokens_TD,) = recorder.open("encode", tokens_TD)
        self._layout = exchange.layout(self.routing)
        if not isinstance(self._layout, PaddedLayout) and known is None:
            # Behind an early rule the experts have been told already.
            notice_PY = None if self._told else self._notice_of_experts()
            sent, local = row_counts(self._layout.rows_NPVX, self._layout.checksum, slices, notice_PY)
            self._counts = start_counts(sent, exchange.transport, recorder.watch("counts", 0), local)
        self._prepare(tokens_TD)
        if isinstance(self._layout, PaddedLayout):
            per_sender = self._layout.rows_per_chunk // (slices.group_size * slices.senders)
            to_PV = [[per_sender] * slices.senders] * slices.group_size
            from_P = [per_sender if rank in slices.expert_parallel_ranks else 0 for rank in range(slices.group_size)]
            self._sizes = [slices.split_sizes(to_PV, from_P)] * exchange.num_chunks
            _send(self._dispatches, self._sizes)

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
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise. An early rule decides here.

        Raises:
            RuntimeError: tensor-parallel ranks that route the same tokens differently.
        """
        undecided, self._undecided = self._undecided, None
        if undecided is not None:
            self._decide(undecided)
        counts, self._counts = self._counts, None
        if counts is None:
            return
        slices = self.exchange.slices
        reach(f"the row counts of {self.exchange.layer}")
        local, told = self.counts_on_host(counts)
        from_PX = torch.tensor(told).view(slices.group_size, -1)
        if slices.tensor_parallel_size > 1:
            slices.check_alike(local.pop(), from_PX[:, -1].tolist())
            from_PX = from_PX[:, :-1]
        from_PX = self._tell_experts(from_PX)
        from_NPX = from_PX.reshape(slices.group_size, self.exchange.num_chunks, -1).transpose(0, 1)
        to_NPVX = torch.tensor(local).view(-1, slices.group_size, slices.senders, from_NPX.shape[-1])
        self._send_rows(to_NPVX, from_NPX)

    def _decide(self, undecided: _Undecided) -> None:
        """What the early rule says, now that all ranks have told this one their notices."""
        ranks = self.exchange.slices.group_size
        reach(f"the loads of all ranks of {self.exchange.layer}")
        own_PX, told_PX = (torch.tensor(each).view(ranks, -1) for each in self.counts_on_host(undecided.counts))
        own_PX = own_PX[:, : own_PX.shape[1] - self._notices]
        told_PX = self._tell_experts(told_PX)
        decision = undecided.rule.decide(self.routing, self.exchange.slices, own_PX, told_PX)
        self.routing = decision.routing
        self._lay_out(undecided.tokens_TD, decision.counts)
        if decision.counts is not None:
            sent_PX, received_PX = decision.counts
            self._send_rows(sent_PX.view(1, ranks, 1, -1), received_PX.unsqueeze(0))

    @property
    def _notices(self) -> int:
        return self.experts.notices if isinstance(self.experts, OwnExperts) else 0

    def _tell_experts(self, told_PX: Tensor) -> Tensor:
        """[P, X] int64 on the host without the experts' own notices, which end each row and are theirs now."""
        if self._told or not self._notices:
            return told_PX
        self._told = True
        assert isinstance(self.experts, OwnExperts)
        self.experts.told(told_PX[:, -self._notices :])
        return told_PX[:, : -self._notices]

    def _send_rows(self, to_NPVX: Tensor, from_NPX: Tensor) -> None:
        slices, layout = self.exchange.slices, self._layout
        kind = ReceivedRows if isinstance(layout, ExactLayout) else ReceivedCopies
        self._received = [kind.of(from_PX) for from_PX in from_NPX]
        if isinstance(layout, PerRankLayout):
            _send(self._descriptions, sizes_of(slices, to_NPVX[..., :-1], from_NPX[..., :-1]))
            to_NPVX, from_NPX = to_NPVX[..., -1:], from_NPX[..., -1:]
        self._sizes = sizes_of(slices, to_NPVX, from_NPX)
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
        if isinstance(self.experts, OwnExperts):
            output_TD = self.experts.collected(output_TD)
        return output_TD.view(self.shape)


def _send(dispatches: Sequence[InFlight], sizes: Sequence[SplitSizes]) -> None:
    first_row = 0
    for dispatch, of_chunk in zip(dispatches, sizes, strict=True):
        dispatch.send(of_chunk, first_row)
        first_row += of_chunk.rows


@dataclass(frozen=True)
class _Undecided:
    """Tokens that wait for an early rule.

    Attributes:
        counts: the notices of all ranks.
    """

    rule: EarlyRule
    tokens_TD: Tensor
    counts: CountsInFlight
