"""Experts whose major half can compute alone: 2T-Drop of DualSparse-MoE.

The neurons of an expert lie with the major half first (scmoe_ds.sparse). An expert is a sum over its neurons, so that
the major half is slices of its weights. No weight is copied.

Shape suffixes: D hidden, F feed-forward, L local experts, S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from scmoe_ds.moe.experts import OwnExperts, grouped_experts, has_two_projections, product_for, run_experts
from scmoe_ds.moe.grouped import GroupedRows


class Halves(OwnExperts):
    """2L places: the L whole experts, then their L major halves.

    Whole experts compute as they do without halves, with the same kernels and the same result.
    """

    local_experts: int

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """As `run_experts`, for 2L places."""
        whole, major = rows_per_expert[: self.local_experts], rows_per_expert[self.local_experts :]
        whole_SD, major_SD = rows_SD.split([sum(whole), sum(major)])
        if not sum(major):
            return self.run_whole(whole_SD, whole)
        output_SD = self.run_major(major_SD, major)
        return torch.cat([self.run_whole(whole_SD, whole), output_SD]) if sum(whole) else output_SD

    def run_whole(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of whole experts."""
        raise NotImplementedError

    def run_major(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of major halves."""
        raise NotImplementedError


class HalvedExperts(nn.Module, Halves):
    """In the place of DeepSpeed's container, with the same parameters under the same names.

    Args:
        experts: of the form of `TwoProjections`, GELU or SwiGLU (the gate's neurons first), of linear layers.

    Raises:
        ValueError: experts of another form, or an odd number of neurons.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for expert in experts.deepspeed_experts:
            check_halves(expert)
        self.deepspeed_experts, self.local_experts = experts.deepspeed_experts, experts.num_local_experts
        self.num_local_experts = 2 * self.local_experts
        self.whole = [experts]  # in a list: its parameters are those of `deepspeed_experts`

    def run_whole(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of whole experts."""
        return run_experts(self.whole[0], rows_SD, rows_per_expert)

    def run_major(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of major halves: one grouped product per projection where whole experts have that, too."""
        members = list(self.deepspeed_experts)
        product = product_for(self.whole[0], rows_SD)
        if product is not None and half_of(members[0]) % 8 == 0:
            majors = _Majors([_Major.of(expert) for expert in members])
            return grouped_experts(majors, rows_SD, rows_per_expert, product)
        parts = zip(members, rows_SD.split(list(rows_per_expert)), strict=True)
        return torch.cat([major_half(expert, part) for expert, part in parts if len(part)])


class HalvedGroups(Halves):
    """The same for AutoEP's experts.

    Args:
        experts: DeepSpeed's `GroupedExperts`, whose parameters are whole: not those of ZeRO-3.

    Raises:
        ValueError: divided parameters, or neurons whose half the grouped product does not compute.
    """

    def __init__(self, experts: Any) -> None:
        self.whole, self.local_experts = GroupedRows(experts), experts.num_experts
        self.num_local_experts = 2 * self.local_experts
        if hasattr(experts.w1, "ds_id"):
            raise ValueError("the halves of experts under ZeRO-3 cannot be told apart; use 1T-Drop")
        neurons, size = experts.w1.shape[1], experts.w1.element_size()
        _check_even(neurons)
        if experts.use_grouped_mm and neurons // 2 * size % 16:
            raise ValueError(
                f"half of {neurons} neurons is not a multiple of 16 bytes, which the grouped product needs; use 1T-Drop"
            )

    def run_whole(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of whole experts."""
        return self.whole.run(rows_SD, rows_per_expert)

    def run_major(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows of major halves, by AutoEP's own kernels on slices of the weights."""
        return self.whole.run(rows_SD, rows_per_expert, self._major)

    def _major(self, rows_SD: Tensor, counts_L: Tensor) -> Tensor:
        module = self.whole.module
        half = module.w1.shape[1] // 2
        weights = {"w1": module.w1[:, :half], "w3": module.w3[:, :half], "w2": module.w2[:, :, :half]}
        if module.use_triton_grouped_mm:  # its kernel reads contiguous weights only
            weights = {name: weight.contiguous() for name, weight in weights.items()}
        return cast(Tensor, torch.func.functional_call(module, weights, (rows_SD, counts_L)))


class _Majors(NamedTuple):
    """A container of them."""

    deepspeed_experts: Sequence[_Major]


class _Part(NamedTuple):
    """Weights of a linear layer."""

    weight: Tensor
    bias: Tensor | None


class _Major(NamedTuple):
    """The major half of an expert, of the form of `TwoProjections`."""

    input: _Part
    output: _Part
    activate: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, expert: Any) -> _Major:
        """Slices of the weights. Of a SwiGLU's first projection it is a copy: the halves of gate and up do not lie side
        by side. The grouped product copies all weights into one tensor anyway."""
        half, width = half_of(expert), expert.output.in_features
        weight, bias = (
            None if each is None else each.unflatten(0, (-1, width))[:, :half].flatten(0, 1)
            for each in (expert.input.weight, expert.input.bias)
        )
        assert weight is not None
        return cls(_Part(weight, bias), _Part(expert.output.weight[:, :half], expert.output.bias), expert.activate)


def major_half(expert: Any, rows_SD: Tensor) -> Tensor:
    """[S, D] → [S, D] by the first half of an expert's neurons, on slices of its weights; the output's bias is whole.

    Args:
        expert: of the form that `check_halves` wants.
    """
    half, width = half_of(expert), expert.output.in_features
    parts = range(0, expert.input.out_features, width)  # GELU: one; SwiGLU: gate and up
    bias = expert.input.bias
    inner = [
        F.linear(rows_SD, expert.input.weight[at : at + half], None if bias is None else bias[at : at + half])
        for at in parts
    ]
    inner_SF = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
    return F.linear(expert.activate(inner_SF), expert.output.weight[:, :half], expert.output.bias)


def half_of(expert: Any) -> int:
    """Neurons of the major half."""
    return int(expert.output.in_features) // 2


def check_halves(expert: nn.Module) -> None:
    """
    Raises:
        ValueError: an expert of another form than two linear layers, or an odd number of neurons.
    """
    layers = [getattr(expert, name, None) for name in ("input", "output")]
    if not (has_two_projections(expert) and all(type(each) is nn.Linear for each in layers)):
        raise ValueError(
            f"an expert of {type(expert).__name__} has no halves (it is divided among ranks, or is not two "
            "linear layers); use 1T-Drop"
        )
    _check_even(layers[1].in_features)  # type: ignore[union-attr]


def _check_even(neurons: int) -> None:
    if neurons % 2:
        raise ValueError(f"an expert of {neurons} neurons cannot be halved; use 1T-Drop")
