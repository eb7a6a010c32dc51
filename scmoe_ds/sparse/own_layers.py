"""MoE layers of this package's GPT under calibration, and their weights with sorted neurons.

Shape suffixes: E experts, D hidden, F neurons of an expert, T tokens, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import MLP
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.placement import expert_of, layer_of
from scmoe_ds.sparse.importance import LayerSums, sorted_neurons


class OwnLayer:
    """A layer on one rank; see `CalibratedLayer`.

    Args:
        name: in the model.
        layer: whose experts are MLPs of this package.
    """

    def __init__(self, name: str, layer: StagedMoE) -> None:
        self.name, self._layer = name, layer
        self._experts: list[MLP] = list(layer.deepspeed_moe.experts.deepspeed_experts)
        self.gate_ED: Tensor = layer.deepspeed_moe.gate.wg.weight
        self.input_FD: Tensor = self._experts[0].input.weight
        self.top_k, self.has_w3 = layer.top_k, self._experts[0].swiglu
        self.neurons = int(self._experts[0].output.weight.shape[1])

    def sums(self) -> LayerSums:
        """See `CalibratedLayer`."""
        return LayerSums(len(self._experts), self.neurons, self.gate_ED.device)

    @contextmanager
    def watched(self, sums: LayerSums) -> Iterator[None]:
        """See `CalibratedLayer`."""
        before, self._layer.routing_rule = self._layer.routing_rule, _Listener(sums)
        with ExitStack() as hooks:
            hooks.callback(setattr, self._layer, "routing_rule", before)
            for number, expert in enumerate(self._experts):
                inner: Any = expert.input
                hooks.callback(inner.register_forward_hook(partial(self._add, sums, number)).remove)
            yield

    def _add(self, sums: LayerSums, expert: int, module: Any, args: Any, inner: Tensor) -> None:
        if self.has_w3:
            gate_SF, up_SF = inner.chunk(2, dim=-1)
            sums.add_rows(expert, F.silu(gate_SF), up_SF)
        else:
            sums.add_rows(expert, self._experts[expert].activate(inner), None)


class _Listener:
    """A routing rule that changes nothing."""

    in_training = False

    def __init__(self, sums: LayerSums) -> None:
        self._sums = sums

    def apply(self, routing: Routing) -> Routing:
        """Hands over the criteria of the choices that have a row."""
        criterion_KT, kept_KT = criterion(routing), routing.choices.kept_KT
        self._sums.add_choices(criterion_KT if kept_KT is None else criterion_KT[kept_KT])
        return routing


def own_layers(model: GPT) -> list[OwnLayer]:
    """All MoE layers with two or more experts, in the model's order."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, StagedMoE)]
    return [OwnLayer(name, module) for name, module in found if module.deepspeed_moe.gate.wg.out_features > 1]


class SortedWeights:
    """The whole parameters of a GPT with the neurons of its experts in another order; a `reshard.Weights`.

    Args:
        weights: as trained.
        order_EF: int64 of each MoE layer by its name.
        swiglu: whether experts are SwiGLU.
    """

    def __init__(self, weights: Weights, order_EF: Mapping[str, Tensor], swiglu: bool) -> None:
        self.path, self._weights, self._order_EF, self._swiglu = weights.path, weights, order_EF, swiglu

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> Sequence[int]:
        return self._weights.shape(name)

    def read(self, name: str) -> Tensor:
        value, layer = self._weights.read(name), layer_of(name)
        if layer is None or layer not in self._order_EF:
            return value
        order_F = self._order_EF[layer][expert_of(name)]
        if ".input." in name:
            return sorted_neurons(value, order_F, 0, 2 if self._swiglu else 1)
        return sorted_neurons(value, order_F, 1) if name.endswith(".output.weight") else value
