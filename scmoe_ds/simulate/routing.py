"""How uneven the experts' loads are: a draw of a fair gate, a skew, or counts of a training run.

Even a fair gate is uneven by chance. Of rows that each choose one of n ranks, a rank gets μ on average, and the busiest
one μ + √μ·m(n), with m(n) the expected largest of n standard normals: n ranks' numbers are near to Poisson's with their
common deviation taken out, which leaves the mean of the largest as it is. (David and Nagaraja, Order Statistics, 3.1.)
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from scmoe_ds.errors import ArgumentError


@dataclass(frozen=True)
class Loads:
    """Of the ranks of an expert-parallel group, over the mean.

    Attributes:
        shares: of all ranks, by class: the busiest, all others. One class where all are alike.
        factors: received rows over the mean, by class.
        busiest: the largest of `factors`.
        busiest_node: rows that the busiest node receives, over the mean of nodes.
    """

    shares: tuple[float, ...] = (1.0,)
    factors: tuple[float, ...] = (1.0,)
    busiest_node: float = 1.0

    @property
    def busiest(self) -> float:
        return max(self.factors)


EVEN = Loads()


@functools.cache
def expected_largest(count: int) -> float:
    """Of `count` independent standard normal numbers: ∫ x·n·φ(x)·Φ(x)^(n-1) dx, to ten digits; 0 for one."""
    normal, per_unit = NormalDist(), 16
    points = [place / per_unit for place in range(-10 * per_unit, 10 * per_unit + 1)]
    return sum(x * count * normal.pdf(x) * normal.cdf(x) ** (count - 1) for x in points) / per_unit


@dataclass(frozen=True)
class Routing:
    """How rows spread over the experts. Without values: a fair gate, whose draws are uneven by chance alone.

    Attributes:
        skew: rows of the busiest rank over the mean, whatever the number of ranks; 1 is even to the last row.
        counts: rows of every expert, for each MoE layer; the last one stands for layers beyond.
    """

    skew: float | None = None
    counts: tuple[tuple[float, ...], ...] = ()

    def loads(
        self, rows: float, ranks: int, per_node: int, num_experts: int, layers: range = range(1), parts: int = 1
    ) -> Loads:
        """Of an MoE layer, or the mean of several.

        Args:
            rows: that a rank sends, which is the mean that one receives.
            ranks, per_node: of the expert-parallel group, and of these on one node.
            layers: numbers of the MoE layers, from 0.
            parts: of an expert. Those on one rank get the same rows, and so are one draw of the gate.

        Raises:
            ArgumentError: counts of another number of experts.
        """
        if ranks == 1:
            return EVEN
        if self.counts:
            known = [self.counts[min(layer, len(self.counts) - 1)] for layer in layers]
            pairs = [_busiest(counts, ranks, per_node, num_experts, parts) for counts in known]
            return _two_classes(fmean(rank for rank, _ in pairs), fmean(node for _, node in pairs), ranks)
        if self.skew is not None:
            busiest, node = self.skew, 1 + (self.skew - 1) * _among_others(ranks, per_node)
        else:
            rows /= min(parts, max(num_experts * parts // ranks, 1))
            busiest = 1 + _deviation(rows, ranks)
            node = 1 + _deviation(rows * per_node, max(1, round(ranks / per_node)))
        return _two_classes(min(busiest, ranks), min(node, ranks / per_node), ranks)


def _among_others(ranks: int, per_node: int) -> float:
    """Excess of a node with the busiest rank, over that of the rank: the node's others have less than the mean."""
    return (ranks - per_node) / (per_node * (ranks - 1))


def _deviation(rows: float, draws: int) -> float:
    """Of the expected busiest of as many, over the mean of `rows`."""
    return expected_largest(draws) / math.sqrt(rows) if rows else 0.0


def _two_classes(busiest: float, node: float, ranks: int) -> Loads:
    return Loads((1 / ranks, 1 - 1 / ranks), (busiest, (ranks - busiest) / (ranks - 1)), max(1.0, node))


def _busiest(
    counts: Sequence[float], ranks: int, per_node: int, num_experts: int, parts: int = 1
) -> tuple[float, float]:
    """Rows of the busiest rank and of the busiest node, over their means; experts lie on the ranks in order."""
    if len(counts) != num_experts or num_experts * parts % ranks:
        raise ArgumentError(
            f"routing = counts of {len(counts)} experts: the model's MoE layer has {num_experts} on {ranks} ranks; "
            f"give counts of a model with as many experts, or a skew"
        )
    counts = [rows for rows in counts for _ in range(parts)]
    held, mean = len(counts) // ranks, sum(counts) / ranks
    of_rank = [sum(counts[first : first + held]) / mean for first in range(0, len(counts), held)]
    of_node = [fmean(of_rank[first : first + per_node]) for first in range(0, ranks, per_node)]
    return max(of_rank), max(of_node)


@functools.cache
def distinct(groups: int, experts: int, choices: int, parts: int = 1) -> float:
    """Of `groups` with as many experts each, how many a token needs that chooses different experts, all alike.

    A group with n experts is left out with probability C(E - n, k) / C(E, k).

    Args:
        parts: of each expert; a group has as many parts, and a token needs all parts of its experts.
    """

    def reached(held: int) -> float:
        rest = experts - held
        missed = math.prod((rest - chosen) / (experts - chosen) for chosen in range(min(choices, experts)))
        return 1 - max(0.0, missed)

    if parts == 1:
        return groups * reached(experts // groups)
    of_group = experts * parts // groups
    firsts = range(0, of_group * groups, of_group)
    return sum(reached((first + of_group - 1) // parts - first // parts + 1) for first in firsts)


def routing_of(text: str) -> Routing:
    """What a user writes: "uniform", a skew such as "1.5", or a file.

    The file is a training run's log.jsonl, whose last step with "expert_load" counts, or a JSON list: rows of every
    expert, or one such list per MoE layer.

    Raises:
        ArgumentError: none of these.
    """
    if text == "uniform":
        return Routing()
    try:
        skew = float(text)
    except ValueError:
        return Routing(counts=_read_counts(Path(text)))
    if not 1 <= skew <= 1e6:
        raise ArgumentError(f"routing = {text}: the busiest rank has at least the mean; give a number from 1 on")
    return Routing(skew=skew)


def _read_counts(path: Path) -> tuple[tuple[float, ...], ...]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise ArgumentError(f'routing = {path}: must be "uniform", a number, or a file that can be read') from None
    values = _of_log(text) if path.suffix == ".jsonl" else _json(text)
    layers = [values] if isinstance(values, list) and values and not isinstance(values[0], list) else values
    if not (isinstance(layers, list) and layers and all(map(_is_layer, layers))):
        raise ArgumentError(
            f"routing = {path}: has no rows of experts; give a log.jsonl with steps, or a JSON list such as [120, 80]"
        )
    return tuple(tuple(map(float, layer)) for layer in layers)


def _of_log(text: str) -> Any:
    entries = [_json(line) for line in text.splitlines() if '"expert_load"' in line]
    loads = [entry["expert_load"] for entry in entries if isinstance(entry, dict) and entry.get("expert_load")]
    return loads[-1] if loads else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_layer(counts: Any) -> bool:
    numbers = isinstance(counts, list) and all(type(each) in (int, float) and 0 <= each < math.inf for each in counts)
    return bool(numbers and sum(counts))
