"""A dense MLP cut along its neurons into narrower experts, for `moe_from_dense` with `moe_ffn_hidden_size`.

An MLP of width F is a sum over its neurons. The mean of its P = F / width slices, each times P, is the dense MLP:

    MLP(x) = W2 act(W1 x) + b2 = 1/P Σ_s (P · W2_s act(W1_s x) + b2)

Shape suffixes: D hidden, F neurons.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scmoe_ds.config.messages import fail
from scmoe_ds.moe.placement import own_first_expert


class NeuronSlices:
    """The slices of a dense MLP.

    Args:
        name: of the MLP, for messages.
        mlp: linear layers from D to F and from F to D (nn.Linear or GPT-2's Conv1D), and functions of single neurons.
        hidden_size: D.
        width: neurons of a slice.

    Raises:
        ScMoEConfigError: another form, or a width that does not divide F.
    """

    def __init__(self, name: str, mlp: nn.Module, hidden_size: int, width: int) -> None:
        self.mlp, self.width = mlp, width
        sizes = {path: _sizes(each) for path, each in mlp.named_modules() if isinstance(each, (nn.Linear, Conv1D))}
        neurons = {size for pair in sizes.values() for size in pair if size != hidden_size}
        parts = {id(each) for path in sizes for each in mlp.get_submodule(path).parameters()}
        whole = all(id(each) in parts for each in mlp.parameters())
        enters = all(hidden_size in pair and pair != (hidden_size, hidden_size) for pair in sizes.values())
        field = "scmoe.moe_ffn_hidden_size"
        if len(neurons) != 1 or not whole or not enters:
            rule = (
                f"{name} ({type(mlp).__name__}) is no MLP of linear layers from and to {hidden_size}; remove the field"
            )
            raise fail(field, width, rule)
        (self.neurons,) = neurons
        if self.neurons % width:
            rule = f"must divide the {self.neurons} neurons of {name}, of which each expert gets a slice"
            raise fail(field, width, rule)
        self.incoming = [path for path, (_, out) in sizes.items() if out == self.neurons]
        self.outgoing = [path for path, (_, out) in sizes.items() if out == hidden_size]

    def slice(self, number: int) -> nn.Module:
        """A copy of slice `number` modulo P."""
        expert, parts = copy.deepcopy(self.mlp), self.neurons // self.width
        first = number % parts * self.width
        with torch.no_grad():
            for path in self.incoming:
                _narrow(expert.get_submodule(path), first, self.width, outputs=True)
            for path in self.outgoing:
                layer: Any = expert.get_submodule(path)
                _narrow(layer, first, self.width, outputs=False)
                layer.weight.mul_(parts)
        return expert

    def put_into(self, moe: MoE) -> None:
        """Gives each of this rank's experts its slice. A shared expert is the whole MLP."""
        if moe.use_residual:
            moe.mlp = self.mlp
        for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts, own_first_expert(moe)):
            expert.load_state_dict(self.slice(number).state_dict())


def _sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def _narrow(layer: Any, first: int, width: int, outputs: bool) -> None:
    dim = int(outputs) if isinstance(layer, Conv1D) else int(not outputs)
    layer.weight = _part(layer.weight, dim, first, width)
    if outputs and layer.bias is not None:
        layer.bias = _part(layer.bias, 0, first, width)
    inputs, found = _sizes(layer)
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = inputs, found
    else:
        layer.in_features, layer.out_features = inputs, found


def _part(parameter: Tensor, dim: int, first: int, width: int) -> nn.Parameter:
    part = parameter.detach().narrow(dim, first, width).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)
