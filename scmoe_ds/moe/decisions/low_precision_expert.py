"""One expert that can compute in low precision: its projections, and what is kept of a conversion of their weights.

A conversion needs the largest magnitude of each neuron's weights. These scales, one number per neuron, are kept while
the weights stay the same: the next conversion then reads the weights once. The converted weights are not kept.

Shape suffixes: D hidden, F feed-forward, S rows received, I/O in/out of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.moe.decisions.low_precision_formats import Format, Scaled
from scmoe_ds.moe.experts import TwoProjections


@dataclass(frozen=True)
class Projection:
    """A linear layer: weight [O, I], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Expert:
    """output(activate(*inputs)), where each input projection reads the expert's rows.

    Attributes:
        activate: [S, ·] of each input projection → [S, F], element by element.
    """

    inputs: Sequence[Projection]
    activate: Callable[..., Tensor]
    output: Projection
    _scaled: list[Any] = field(default_factory=list, init=False)  # in what, and which weights
    _scales: list[Tensor] = field(default_factory=list, init=False)

    @property
    def projections(self) -> list[Projection]:
        """The input projections, then the output one."""
        return [*self.inputs, self.output]

    def compute(self, rows_SD: Tensor) -> Tensor:
        """As the weights are: for so few rows that low precision would gain nothing."""
        inner = [F.linear(rows_SD, each.weight, each.bias) for each in self.inputs]
        return F.linear(self.activate(*inner), self.output.weight, self.output.bias)

    def convert(self, format: Format) -> list[Scaled]:
        """The weights of `projections`, as they are now. Their scales are kept."""
        weights = [each.weight for each in self.projections]
        scaled = [format, *map(_state_of, weights)]
        known = self._scales if scaled == self._scaled else [None] * len(weights)
        converted = [format.scaled(weight, scale) for weight, scale in zip(weights, known, strict=True)]
        self._scaled, self._scales = scaled, [each.scale_R1 for each in converted]
        return converted

    def forget_scales(self) -> None:
        """The next conversion finds them again, as it must where weights change unseen: through `data`, as ZeRO's."""
        self._scaled, self._scales = [], []

    def compute_in(self, format: Format, weights: Sequence[Scaled], rows_SD: Tensor) -> Tensor:
        """With the weights of `convert`; in the dtype of the rows."""
        rows = format.scaled(rows_SD)
        of_inputs = zip(weights[:-1], self.inputs, strict=True)
        inner = [format.product(rows, weight, each.bias) for weight, each in of_inputs]
        activated = format.scaled(self.activate(*inner))
        return format.product(activated, weights[-1], self.output.bias).to(rows_SD.dtype)


def of_grouped(grouped: Any) -> list[Expert]:
    """AutoEP's `GroupedExperts`, whose weights of all experts lie in one tensor for each projection."""
    from deepspeed.moe.ep_experts import apply_expert_activation

    def activate(gate_SF: Tensor, up_SF: Tensor) -> Tensor:
        name, alpha, limit = grouped.activation, grouped.activation_alpha, grouped.activation_limit
        return cast(Tensor, apply_expert_activation(gate_SF, up_SF, name, alpha, limit, fused=gate_SF.is_cuda))

    weights = zip(grouped.w1, grouped.w3, grouped.w2, strict=True)
    return [
        Expert((Projection(gate, None), Projection(up, None)), activate, Projection(down, None))
        for gate, up, down in weights
    ]


def of_two_projections(expert: TwoProjections) -> Expert:
    """An MLP of this package."""
    inner, output = (Projection(each.weight, each.bias) for each in (expert.input, expert.output))
    return Expert((inner,), expert.activate, output)


def _state_of(weight: Tensor) -> tuple[int, object]:
    """Another one after a change in place, which torch counts. It does not for tensors that were made in inference
    mode: theirs is never the same."""
    return weight.data_ptr(), object() if weight.is_inference() else weight._version
