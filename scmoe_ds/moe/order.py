"""Choices in the order of their experts, by one stable sort.

A sort takes the same few kernels for any number of experts. To walk down the columns of a [T, E] mask, a GPU would use
one thread per expert.

Shape suffixes: T tokens, E experts, K routed experts per token, X all K * T choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SPAN = 2**32
"""Between the keys of two experts where a priority, of 32 bits, lies in between."""


@dataclass(frozen=True)
class Order:
    """All choices in a row.

    Attributes:
        choice_X: int64 choice k * T + t at each place.
        place_KT: int64 place of each choice.
    """

    choice_X: Tensor
    place_KT: Tensor


@dataclass(frozen=True)
class ByExpert(Order):
    """All choices, sorted by expert.

    Attributes:
        number_X: int64 0, 1, … as many as there are choices.
        key_X: int64 sorted keys. Those of expert e start at first + e * step.
    """

    number_X: Tensor
    key_X: Tensor
    first: int
    step: int

    @classmethod
    def of(cls, expert_KT: Tensor, priority_KT: Tensor | None = None) -> ByExpert:
        """
        Args:
            expert_KT: int64 expert of each choice, or other numbers.
            priority_KT: fp32, not negative; an expert's choices are in descending order of it, equal ones by k, then
                by token. None: as in DeepSpeed, for k = 2 first choices before second ones, otherwise by token.
        """
        K, T = expert_KT.shape
        number_X = torch.arange(K * T, device=expert_KT.device)
        first, step = 0, {1: 1, 2: 2}.get(K, max(T, 1))
        if priority_KT is not None:
            # The bits of floats that are not negative, read as integers, have the order of the floats.
            first, step = -_SPAN // 2, _SPAN
            key_KT = expert_KT * step - priority_KT.view(torch.int32)
        elif K == 1 or T == 0:
            key_KT = expert_KT
        else:
            minor = number_X[:step]
            key_KT = expert_KT * step + (minor.unsqueeze(1) if K == 2 else minor)
        key_X, choice_X = torch.sort(key_KT.flatten(), stable=True)
        place_X = torch.empty_like(choice_X).scatter_(0, choice_X, number_X)
        return cls(choice_X, place_X.view(K, T), number_X, key_X, first, step)

    def moved(self, place_KT: Tensor) -> Order:
        """The same choices at other places, a permutation."""
        return Order(torch.empty_like(self.choice_X).scatter_(0, place_KT.flatten(), self.number_X), place_KT)

    def starts(self, experts: int, parts: int = 1) -> Tensor:
        """[E * parts + 1] int64 the place where each expert's choices start, and one behind the last expert's.

        Args:
            parts: of an expert's keys; for k = 2 without priority, 2 parts are first and second choices.
        """
        end = self.first + self.step * experts
        bounds = torch.arange(self.first, end + 1, self.step // parts, device=self.key_X.device)
        return torch.searchsorted(self.key_X, bounds)
