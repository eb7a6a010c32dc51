"""Tokens on their way to their experts and back: the state between `begin` and `finish` of a layer.

Shape suffixes: T tokens, D hidden, N choices (K * T), L local experts, P expert-parallel ranks, C capacity,
R rows that this rank sends, S rows that it receives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor

from scmoe_ds.moe.dispatch import ExactLayout, PaddedLayout, ReceivedRows, decode
from scmoe_ds.moe.experts import run_experts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.overlap.all_to_all import InFlight, prepare, start
from scmoe_ds.overlap.counts import start_counts
from scmoe_ds.overlap.transport import Transport


class RoutedTokens:
    """Routed tokens in flight; made by a layer's `begin`, used up by its `finish`.

    Args:
        experts: this rank's experts.
        tokens_TD: the gate's input.
        routing: who goes where, with what weight.
        shape: of the layer's input, for the result.
        exact: send routed tokens only; otherwise DeepSpeed's padded buffers.
        transport, wire_dtype, blocking: how rows travel, see scmoe_ds.overlap.all_to_all.
        deferred: leave the launch of the dispatch to `send`. A GPU's counts reach the host only after the gate has
            run; launching later lets the backbone's first operator be enqueued in the meantime.
    """

    def __init__(
        self,
        experts: Experts,
        tokens_TD: Tensor,
        routing: Routing,
        shape: Sequence[int],
        *,
        exact: bool,
        transport: Transport,
        wire_dtype: str | None,
        blocking: bool,
        deferred: bool,
    ) -> None:
        self.routing = routing
        self._experts, self.shape = experts, torch.Size(shape)
        self._travel = (transport, blocking, wire_dtype)
        self._ranks_and_experts = (transport.size, experts.num_local_experts)
        self._received: ReceivedRows | None = None
        self._sizes: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None)
        self._combine: InFlight | None = None
        self._counts = None
        self._dispatch: InFlight | None
        if not exact:
            self._layout: ExactLayout | PaddedLayout = PaddedLayout.of(routing)
            self._dispatch = start(self._layout.encode(tokens_TD), transport, None, None, blocking, wire_dtype)
            return
        self._layout = ExactLayout.of(routing)
        self._counts = start_counts(self._layout.rows_per_expert_E, transport)
        self._dispatch = prepare(self._layout.encode(tokens_TD), *self._travel)  # while the counts travel
        if not deferred:
            self.send()

    def send(self) -> None:
        """Launches the dispatch if `begin` left it to a later moment; harmless otherwise."""
        counts, self._counts = self._counts, None
        if counts is None or self._dispatch is None:
            return
        rows_to_PL, rows_from_PL = (_by_rank(numbers, *self._ranks_and_experts) for numbers in counts.wait())
        self._received = ReceivedRows.of(rows_from_PL, self._layout.row_of_choice_KT.device)
        self._sizes = ([sum(rows) for rows in rows_to_PL], [sum(rows) for rows in rows_from_PL])
        self._dispatch.send(*self._sizes)

    def run_experts(self) -> None:
        """Waits for the dispatch, computes the local experts, and sends the results back.

        Raises:
            RuntimeError: the experts have run already.
        """
        self.send()
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            raise RuntimeError("run_experts was called twice on the same routed tokens; begin again for another use")
        rows_SD = dispatch.wait()
        if self._received is None:
            buffer_PLCD = rows_SD.view(*self._ranks_and_experts, -1, rows_SD.shape[-1])
            output_SD = self._experts(buffer_PLCD).reshape(rows_SD.shape)
        else:
            grouped_SD = self._received.group(rows_SD)
            output_SD = self._received.ungroup(run_experts(self._experts, grouped_SD, self._received.rows_per_expert))
        transport, blocking, wire_dtype = self._travel
        self._combine = start(output_SD, transport, self._sizes[1], self._sizes[0], blocking, wire_dtype)

    def collect(self) -> Tensor:
        """Waits for the combine and decodes: Σ G·E of eq. 1, in the shape of the shortcut.

        Raises:
            RuntimeError: the experts have not run, or the result was taken before.
        """
        if self._dispatch is not None:
            raise RuntimeError("finish was called before run_experts")
        combine, self._combine = self._combine, None
        if combine is None:
            raise RuntimeError("these routed tokens were finished already; begin again for another use")
        return decode(combine.wait(), self._layout.row_of_choice_KT, self.routing.weight_KT).view(self.shape)


def _by_rank(counts: list[int], ranks: int, experts: int) -> list[list[int]]:
    return [counts[rank * experts : (rank + 1) * experts] for rank in range(ranks)]
