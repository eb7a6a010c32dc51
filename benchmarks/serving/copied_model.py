"""A model of which each row of a benchmark has other copies of hot experts (benchmarks.serving.copies)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness.no_link import LocalCopy
from benchmarks.harness.parts import CPU, KINDS, parts_of
from benchmarks.harness.skewed_gates import even_but_first, skew_gates
from benchmarks.harness.variants import AGAIN
from benchmarks.serving.inference import WARM_UP, Served, Server, shape_of
from scmoe_ds.inference.attachment import Attachment, Place
from scmoe_ds.inference.copies import copy_experts, measured_costs
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
    """
    Attributes:
        copies: of each rank and layer.
        split: how their rows are divided, None: by the counts of the step.
        is_even: the gate sends all experts the same number of rows, as if balance cost nothing.
        travels: False: rows stay on their rank.
        computes: False: experts take no time.
    """

    copies: int = 0
    split: Callable[[Rows, Sequence[Copy], Costs], Rows] | None = None
    is_even: bool = False
    travels: bool = True
    computes: bool = True


LIMITS = {
    "even gate": Row(is_even=True),
    "even gate, no row travels": Row(is_even=True, travels=False),
    "the same, experts take no time": Row(is_even=True, travels=False, computes=False),
}
"""Of what balance can give, of what it can give when senders have all experts themselves, and of everything about
experts. Copies can be faster than the first: their rows do not travel."""


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
        self._gates = [layer.deepspeed_moe.gate.wg for layer in self._layers]
        self._even: list[nn.Parameter] = []
        self._attached: Attachment | None = None
        self._settings = self.server.calibrator.settings
        self._rows: dict[str, tuple[Calibrator, Attachment | None]] = {}
        self.tokens_TD = torch.zeros(0)
        self.server.warm_up(1)

    def skew(self, skew: float) -> None:
        """Sets all gates; an even one is kept for `LIMITS`."""
        if skew != 1:
            self.skew(1.0)
        shares = even_but_first(skew, self._layers[0].num_experts)
        self.tokens_TD = skew_gates(self.server.model.scheduled_pairs(), self.server.step, shares)[0]
        if skew == 1:
            self._even = [nn.Parameter(gate.weight.clone(), requires_grad=False) for gate in self._gates]

    def costs(self) -> Costs:
        """As `copy_experts` measures them."""
        return measured_costs(self._layers[0])

    def add(self, name: str, row: Row, costs: Costs) -> None:
        """Makes a row's copies and lets it choose its schedules."""
        self._take_off()
        if row.copies:
            self._attached = copies = copy_experts(self.server.model, row.copies, None, costs)
            for rule in copies.rules if row.split is not None else ():
                rule.split = row.split
        else:
            self._attached = Attachment(self._places(row))
        calibrator = Calibrator(self.server.model.scheduled_pairs(), self._settings, CPU, self.phase)
        self._rows[name] = calibrator, self._attached
        self.use(name)
        self.server.warm_up(WARM_UP if calibrator.calibrating else LEAST_PASSES)

    def use(self, name: str) -> None:
        """From now on the model is this row's."""
        self._take_off()
        self.server.calibrator, self._attached = self._rows[name]
        if self._attached is not None:
            self._attached.attach()

    def _take_off(self) -> None:
        if self._attached is not None:
            self._attached.detach()

    def _places(self, row: Row) -> list[Place]:
        places: list[Place] = []
        for number, layer in enumerate(self._layers):
            transport, experts = layer.transport, layer.deepspeed_moe.experts
            if row.is_even:
                places.append((self._gates[number], "weight", self._even[number]))
            if not row.travels:
                places.append((layer, "transport", LocalCopy(transport.group, transport.method)))
            if not row.computes:
                free = nn.ModuleList(nn.Identity() for _ in experts.deepspeed_experts)
                places.append((experts, "deepspeed_experts", free))
        return places

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
