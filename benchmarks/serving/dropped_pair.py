"""One pair whose rows drop, each in its own way (benchmarks.serving.drop).

Shape suffixes: P ranks, X counts of rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.parts import CPU, RecordedPair, parts_of
from benchmarks.harness.skewed_gates import Shares, skew_gates
from benchmarks.harness.variants import Shape, Variant, build
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.inference.droppable import digests_of
from scmoe_ds.inference.dropping import Dropped, attach_dropping
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.exchange import Exchange
from scmoe_ds.moe.gate import Routing
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.sparse.calibration import default_spread
from scmoe_ds.sparse.sparsity_file import Method, Sparsity, curve_of

BACKBONE = ("attention", "MLP", "shared expert")
STEPS_TO_SCHEDULE, WARM_UP = 8, 2
TRAINED = 2.6
"""Times a new gate's weights: its logits then differ by 1.5 (standard deviation), as a trained gate's about do."""


@dataclass(frozen=True)
class Drops:
    """What a row leaves out.

    Attributes:
        method: "1t" or "2t".
        load_aware: thresholds follow the ranks' loads.
        spread: of 2T-Drop, for K choices of a token.
        ready: the routing is decided beforehand.
    """

    method: Method
    load_aware: bool = False
    spread: Callable[[int], float] = default_spread
    ready: bool = False


class Listener:
    """A routing rule that changes nothing and hears all criteria."""

    in_training = False

    def __init__(self) -> None:
        self.heard = torch.zeros(0)

    def apply(self, routing: Routing) -> Routing:
        """Listens."""
        self.heard = criterion(routing).flatten()
        return routing


@dataclass
class Ready:
    """A routing rule that has decided."""

    routing: Routing
    in_training = False

    def apply(self, routing: Routing) -> Routing:
        """The routing of the same tokens, as it was decided."""
        return self.routing


@dataclass(kw_only=True)
class Row(RecordedPair):
    """One way to compute the pair.

    Attributes:
        dropped: None: nothing.
        routed: the routing of the last step, and of it what this rank sends to each: [P, X] choices of each place, and
            where a token has one row per rank, these.
    """

    dropped: Dropped | None = None
    routed: list[tuple[Routing, Tensor]] = field(default_factory=list)

    def look(self, hidden: Tensor) -> None:
        """A step of which `routed` is kept."""
        make = Exchange.layout

        def watched(exchange: Exchange, routing: Routing) -> Any:
            layout: Any = make(exchange, routing)  # dispatch is exact
            self.routed = [(routing, layout.rows_NPVX[0, :, 0])]
            return layout

        with mock.patch.object(Exchange, "layout", watched):
            self.step(hidden)

    def most(self, local_experts: int) -> tuple[float, float]:
        """Of the last step that was looked at, what the busier rank computes, in rows of whole experts, and the rows
        that go the busier way between two ranks. Collective."""
        routing, sent_PX = self.routed[-1]
        rows_P = sent_PX[:, -1] if len(routing.weight_KT) > 1 else sent_PX.sum(1)
        whole_P, places_P = sent_PX[:, :local_experts].sum(1), len(routing.choices.rows_E) // len(sent_PX)
        major_P = sent_PX[:, local_experts:places_P].sum(1)
        work_PP = torch.tensor(gather((whole_P + major_P / 2).tolist()))
        rows_PP = torch.tensor(gather(rows_P.tolist())).fill_diagonal_(0)
        return float(work_PP.sum(0).max()), float(rows_PP.max())


class Bench:
    """Rows of one pair on this rank. Collective.

    Args:
        shares: of the gate; None: as it is, nearly even.
    """

    def __init__(self, variant: Variant, shape: Shape, shares: Shares | None, method: str) -> None:
        torch.manual_seed(dist.get_rank())
        self.hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size)
        self._variant, self._shape, self._method = variant, shape, method
        self.first = Row(pair=self._built())
        self.first.pair.layer.deepspeed_moe.gate.wg.weight.mul_(TRAINED)
        if shares is not None:
            skew_gates([self.first.pair], partial(self.first.pair, self.hidden), shares)
        self.rows: dict[str, Row] = {}
        self._layer = self.first.pair.layer
        calibrator = Calibrator([self.first.pair], OverlapConfig(num_chunks=1), CPU, "prefill")
        for _ in range(STEPS_TO_SCHEDULE):
            dist.barrier()
            calibrator.begin()
            self.first.step(self.hidden)
        self._layer.routing_rule = listener = Listener()
        self.first.look(self.hidden)
        self._layer.routing_rule = None
        self._criterion = torch.cat(gather(listener.heard.clone()))
        self._local_experts = self._layer.num_experts // self._layer.ep_size

    def add(self, name: str, drops: Drops | None, rate: float) -> None:
        """A row. The first one drops nothing."""
        if not self.rows:
            self.rows[name] = self.first
            return
        row = self.rows[name] = Row(pair=self._built())
        row.pair.load_state_dict(self.first.pair.state_dict())
        row.pair.schedule = self.first.pair.schedule
        if drops is not None:
            sparsity = self._sparsity(drops)
            row.dropped = attach_dropping(row.pair, sparsity, rate, drops.method, drops.load_aware)
        row.look(self.hidden)
        if drops is not None and drops.ready:
            row.pair.layer.early_rule, row.pair.layer.routing_rule = None, Ready(row.routed[-1][0])

    def measure(self, rounds: int) -> dict[str, Any]:
        """Times of all rows, what they left out, and what that could gain at most. Collective."""
        for row in self.rows.values():
            row.spans = []
        steps = {name: partial(row.step, self.hidden) for name, row in self.rows.items()}
        own = interleave(steps, rounds, WARM_UP, dist.barrier)
        layers = {}
        for name, row in self.rows.items():
            spans = (row.spans or [])[WARM_UP:]
            without = [1e-3 * sum(parts_of(each)[kind] for kind in BACKBONE) for each in spans]
            layers[name] = over_ranks([step - part for step, part in zip(own[name], without, strict=True)])
        slower = {name: over_ranks(seconds) for name, seconds in own.items()}
        whole = self.first.most(self._local_experts)
        found = []
        for name, row in self.rows.items():
            left = row.most(self._local_experts)
            found.append(
                {
                    "row": name,
                    **_numbers("step", slower[name], slower),
                    **_numbers("layer", layers[name], layers),
                    "shares": None if row.dropped is None else row.dropped.shares().record(),
                    "limit": {
                        kind: of / by for kind, of, by in zip(("computation", "bytes"), whole, left, strict=True)
                    },
                }
            )
        return {**self._loads(), "rows": found}

    def _loads(self) -> dict[str, Any]:
        """Of the gate, before drops."""
        rows_E = torch.tensor(gather(self.first.routed[-1][0].choices.rows_E.tolist())).double().sum(0)
        ranks_P = rows_E.view(dist.get_world_size(), -1).sum(1)
        return {
            "spread": default_spread(self._layer.top_k),
            "busiest_expert_over_mean": float(rows_E.max() / rows_E.mean()),
            "rank_load_over_mean": (ranks_P / ranks_P.mean()).tolist(),
        }

    def _built(self) -> Any:
        return build(self._variant, self._shape, 0.0, self._method).eval().requires_grad_(False)

    def _sparsity(self, drops: Drops) -> Sparsity:
        """Thresholds of the tokens of all ranks; neurons stay as they are, which takes as long as sorted ones."""
        top_k = self._layer.top_k
        spread = drops.spread(top_k)
        curve = curve_of("moe", self._criterion, spread)
        known = {"top_k": top_k, "spread": spread, "tokens": self._shape.tokens * dist.get_world_size()}
        gates, neurons = digests_of([self._layer])
        return Sparsity(gates=gates, neurons=neurons or "", measure="abs-gate", layers=(curve,), **known)


def _numbers(part: str, seconds: Sequence[float], of_rows: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A row's, over the first row."""
    first = next(iter(of_rows.values()))
    return {f"{part}_ms": 1e3 * statistics.median(seconds), f"{part}_speedup": vars(Spread.of_ratios(first, seconds))}
