"""Which neurons of an expert matter, measured on text (reconstruction in DualSparse-MoE, arXiv 2508.18376).

A neuron's importance is a sum over the tokens that reach its expert. Of an expert W2 (act(W1 x) ⊙ W3 x):

    gate          act(W1 x)               abs-gate      |act(W1 x)|
    gate-up       act(W1 x) ⊙ W3 x        abs-gate-up   |act(W1 x) ⊙ W3 x|

An expert without W3 (GELU) has the first two. Neurons are sorted by importance. The first half is the major one. An
expert computes the same whatever the order of its neurons.

Shape suffixes: E experts, F neurons of an expert, N choices, S rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError

Measure = Literal["gate", "abs-gate", "gate-up", "abs-gate-up"]
WITHOUT_W3: tuple[Measure, ...] = ("gate", "abs-gate")
MEASURES: tuple[Measure, ...] = (*WITHOUT_W3, "gate-up", "abs-gate-up")


def check_measure(measure: Measure, has_w3: bool) -> None:
    """Raises an ArgumentError for a measure that the experts cannot have."""
    if measure not in WITHOUT_W3 and not has_w3:
        raise ArgumentError(
            f"--measure {measure}: multiplies with W3 x, but these experts have GELU and no W3; use abs-gate or gate"
        )


class LayerSums:
    """What calibration has seen of a MoE layer.

    Args:
        experts: E.
        neurons: F.
        device: of the experts.

    Attributes:
        importance: [E, F] float64 of each measure that was added.
        rows: [E] int64 rows of each expert.
    """

    def __init__(self, experts: int, neurons: int, device: torch.device) -> None:
        self._shape, self._device = (experts, neurons), device
        self.importance: dict[Measure, Tensor] = {}
        self.rows = [0] * experts
        self._criteria: list[Tensor] = []

    def add_rows(self, expert: int, gate_SF: Tensor, up_SF: Tensor | None) -> None:
        """
        Args:
            gate_SF: act(W1 x) of the rows of an expert.
            up_SF: W3 x; None: the expert has none.
        """
        self.rows[expert] += len(gate_SF)
        found: dict[Measure, Tensor] = {"gate": gate_SF, "abs-gate": gate_SF.abs()}
        if up_SF is not None:
            product_SF = gate_SF * up_SF
            found |= {"gate-up": product_SF, "abs-gate-up": product_SF.abs()}
        for measure, value_SF in found.items():
            if measure not in self.importance:
                self.importance[measure] = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
            self.importance[measure][expert] += value_SF.sum(0, dtype=torch.float64)

    def add_choices(self, criterion: Tensor) -> None:
        """Criteria of the choices of some tokens, of any shape; see scmoe_ds.moe.decisions.dropping.

        Raises:
            ArgumentError: one is not finite.
        """
        criterion_N = criterion.flatten().float().cpu()
        _check_finite("scores of a gate", float(criterion_N.sum()))
        self._criteria.append(criterion_N)

    @property
    def criterion_N(self) -> Tensor:
        """Of all choices, fp32."""
        return torch.cat(self._criteria) if self._criteria else torch.empty(0)

    def order_EF(self, measure: Measure) -> Tensor:
        """Each expert's neurons, the most important first; those of an expert without rows as they are."""
        return self.importance[measure].argsort(dim=1, descending=True, stable=True)

    def major_share(self, measure: Measure) -> float:
        """What the major halves hold of the importance of all neurons, each by its absolute value. One half where no
        neuron answers to the text.

        Raises:
            ArgumentError: a neuron's importance is not finite.
        """
        importance_EF = self.importance[measure]
        sorted_EF = importance_EF.gather(1, self.order_EF(measure)).abs()
        whole = float(sorted_EF.sum())
        _check_finite("importance of the neurons", whole)
        return float(sorted_EF[:, : sorted_EF.shape[1] // 2].sum()) / whole if whole else 0.5


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ArgumentError(
            f"{what} = {value}: must be finite, but the weights are damaged, or too large for this dtype; compare with "
            "--dtype fp32"
        )


def check_halves(neurons: int, source: str) -> None:
    """Raises an ArgumentError if experts cannot be halved."""
    if neurons % 2:
        raise ArgumentError(f"{source}: its experts have {neurons} neurons, which cannot be halved; an even number can")


def sorted_neurons(weight: Tensor, order_F: Tensor, dimension: int, projections: int = 1) -> Tensor:
    """Weights or biases of an expert with its neurons in another order.

    Args:
        weight: of any shape; its `dimension` has n·F entries, n = `projections` after each other (2 of a SwiGLU's first
            projection: gate and up).
        order_F: int64.
    """
    width = len(order_F)
    order = torch.cat([order_F.to(weight.device) + width * number for number in range(projections)])
    return weight.index_select(dimension, order)


def unseen(sums: Sequence[LayerSums]) -> int:
    """How many experts of all layers no token has reached."""
    return sum(rows == 0 for each in sums for rows in each.rows)
