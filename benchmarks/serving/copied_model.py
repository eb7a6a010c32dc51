"""A model of which each row of a benchmark has other copies of hot experts (benchmarks.serving.copies)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.parts import CPU, KINDS, parts_of
from benchmarks.harness.skewed_gates import even_but_first, skew_gates
from benchmarks.harness.variants import AGAIN
from benchmarks.serving.inference import WARM_UP, Served, Server, shape_of
from scmoe_ds.inference.copies import Copies, copy_experts, measured_costs
from scmoe_ds.moe.decisions.copies import Copy, Costs
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.simulation import Mode
from scmoe_ds.trace.recorder import Recorder

NONE, ONE, LAYERS = "none", "1 copy per rank", 2
LEAST_PASSES = 2
"""In which copies are chosen."""
Rows = list[list[int]]


def even_split(rows_PE: Rows, copies: Sequence[Copy], costs: Costs) -> Rows:
    """A fixed one: all instances of an expert get the same share of every sender's rows."""
    instances = [1 + sum(copy.expert == other.expert for other in copies) for copy in copies]
    return [
        [rows_E[copy.expert] // number for rows_E in rows_PE] for copy, number in zip(copies, instances, strict=True)
    ]


def near_split(rows_PE: Rows, copies: Sequence[Copy], costs: Costs) -> Rows:
    """A fixed one: a sender's rows go to its own instance where it has one."""
    return [[rows_E[copy.expert] * (sender == copy.rank) for sender, rows_E in enumerate(rows_PE)] for copy in copies]


@dataclass(frozen=True)
class Row:
    """Copies of each rank and layer; how their rows are divided, None: by the counts of the step."""

    copies: int = 0
    split: Callable[[Rows, Sequence[Copy], Costs], Rows] | None = None


def rows(experts_per_rank: int) -> dict[str, Row]:
    """All rows; the first is what the others are compared with."""
    several = {f"{each} copies per rank": Row(each) for each in (2,) if each < experts_per_rank}
    return {
        NONE: Row(),
        NONE + AGAIN: Row(),
        ONE: Row(1),
        **several,
        "1 copy, fixed: even shares (EPLB)": Row(1, even_split),
        "1 copy, fixed: own copy first": Row(1, near_split),
    }


class Copied:
    """A model of which each row has other copies.

    Attributes:
        tokens_TD: what the first MoE layer's gate reads.
    """

    def __init__(self, served: Served, phase: Mode, settings: dict[str, Any]) -> None:
        shape = replace(shape_of(phase, settings), num_experts=settings["experts"])
        self.server, self.phase, self.served = Server(served, phase, shape, settings["method"], LAYERS), phase, served
        self._layers = [run.blocks[-1].moe for run in self.server.model.runs]
        self._copies: Copies | None = None
        self._settings = self.server.calibrator.settings
        self._rows: dict[str, tuple[Calibrator, Copies | None]] = {}
        self.tokens_TD = torch.zeros(0)
        self.server.warm_up(1)

    def skew(self, skew: float) -> None:
        """Sets all gates."""
        shares = even_but_first(skew, self._layers[0].num_experts)
        self.tokens_TD = skew_gates(self.server.model.scheduled_pairs(), self.server.step, shares)[0]

    def costs(self) -> Costs:
        """As `copy_experts` measures them."""
        return measured_costs(self._layers[0])

    def add(self, name: str, row: Row, costs: Costs) -> None:
        """Makes a row's copies and lets it choose its schedules."""
        self._take_off()
        self._copies = copy_experts(self.server.model, row.copies, None, costs) if row.copies else None
        if self._copies is not None and row.split is not None:
            for rule in self._copies.rules:
                rule.split = row.split
        calibrator = Calibrator(self.server.model.scheduled_pairs(), self._settings, CPU, self.phase)
        self._rows[name] = calibrator, self._copies
        self.use(name)
        self.server.warm_up(WARM_UP if calibrator.calibrating else LEAST_PASSES)

    def use(self, name: str) -> None:
        """From now on the model is this row's."""
        self._take_off()
        self.server.calibrator, self._copies = self._rows[name]
        if self._copies is not None:
            self._copies.attach()

    def _take_off(self) -> None:
        if self._copies is not None:
            self._copies.detach()

    def leave(self, share: float) -> None:
        """Only so many tokens of this rank, for the layer alone."""
        self.tokens_TD = self.tokens_TD[: round(share * len(self.tokens_TD))]

    def whole(self, name: str) -> None:
        """One pass."""
        self.use(name)
        self.server.step()

    @torch.inference_mode()
    def layer(self, name: str, recorder: Recorder | None = None) -> Tensor:
        """The first MoE layer's routed branch."""
        self.use(name)
        how = {} if recorder is None else {"recorder": recorder.pair(0)}
        routed = self._layers[0].begin(self.tokens_TD, **how)
        routed.run_experts()
        output: Tensor = routed.collect()
        return output

    def parts(self, name: str) -> list[dict[str, float]]:
        """Median milliseconds of the layer's parts, of each rank. Collective."""
        steps = []
        for _ in range(5):
            dist.barrier()
            recorder = Recorder(CPU)
            self.layer(name, recorder)
            steps.append(parts_of(recorder.spans()))
        return gather({kind: statistics.median(each[kind] for each in steps) for kind in KINDS})

    def loads(self, name: str) -> list[int]:
        """Rows of each rank in the first MoE layer. Collective."""
        self.use(name)
        computed, experts = [], self._layers[0].deepspeed_moe.experts.deepspeed_experts
        hooks = [each.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0]))) for each in experts]
        self.layer(name)
        for hook in hooks:
            hook.remove()
        return gather(sum(computed))
