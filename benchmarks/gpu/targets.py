"""The numbers to meet, each by the name under which a step notes it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RULES = {"at least": operator.ge, "at most": operator.le}


@dataclass(frozen=True)
class Target:
    """One number to meet.

    Attributes:
        number: its name among the numbers of the steps.
        rule: "at least" or "at most".
        unit: "%" shows a share of one as a percentage.
    """

    number: str
    rule: str
    limit: float
    unit: str = ""

    def judge(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """A row: target, measured, met ("yes", "no", or "not measured")."""
        value = numbers.get(self.number)
        met = "not measured" if value is None else "yes" if _RULES[self.rule](value, self.limit) else "no"
        measured = "–" if value is None else self._text(value)
        return {
            "number": self.number,
            "target": f"{self.rule} {self._text(self.limit)}",
            "measured": measured,
            "met": met,
        }

    def _text(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.unit == "%" else f"{value:.4g}{self.unit and ' ' + self.unit}"


ONE_GPU = [
    Target("fp32: largest difference from the CPU", "at most", 1e-3, "nats"),
    Target("cases on the device: wrong", "at most", 0),
    Target("cases on the device: right", "at least", 1),
    Target("tests/gpu: failed", "at most", 0),
    Target("tests/gpu: passed", "at least", 1),
    Target("bf16: last losses over those of fp32", "at most", 1.02),
    Target("bf16: last losses over the first", "at most", 0.7),
    Target("experts: share of the dense peak", "at least", 0.70, "%"),
    Target("encode: share of the copy bandwidth", "at least", 0.60, "%"),
    Target("gate and encode over the experts", "at most", 0.10, "%"),
    Target("layer: DeepSpeed's time over ours", "at least", 1.5, "×"),
    Target("hidden share of a transfer that fits into the window", "at least", 0.95, "%"),
    Target("copies beside kernels, from the trace", "at least", 0.90, "%"),
    Target("offloading: memory of resident", "at most", 0.50, "%"),
    Target("offloading: extra latency removed", "at least", 0.75, "%"),
    Target("offloading: texts that differ", "at most", 0),
]
TWO_GPUS = [
    Target("two ranks: wrong", "at most", 0),
    Target("two ranks: right", "at least", 1),
    Target("operations out of order", "at most", 0),
    Target("NCCL beside other kernels, from the trace", "at least", 0.90, "%"),
    Target("hidden share of the all-to-all", "at least", 0.95, "%"),
    Target("killed rank: the other one ends in time and says why", "at least", 1),
]


def budgets() -> list[Target]:
    """What the simulated device allows a pair: launches, and host waits of an MoE layer."""
    from lab import gpu_budgets as budget

    return [
        Target("launches per pair, forward", "at most", budget.LAUNCHES_FORWARD),
        Target("launches per pair, backward", "at most", budget.LAUNCHES_BACKWARD),
        Target("launches of the gate, forward", "at most", budget.GATE_LAUNCHES_FORWARD),
        Target("host waits per MoE layer, forward", "at most", budget.HOST_WAITS_FORWARD),
        Target("host waits per MoE layer, backward", "at most", budget.HOST_WAITS_BACKWARD),
    ]


def judge(numbers: Mapping[str, float], gpus: int) -> list[dict[str, Any]]:
    """The table of all targets of a run."""
    targets = [*ONE_GPU, *budgets()] if gpus == 1 else TWO_GPUS
    return [target.judge(numbers) for target in targets]
