"""Load balancing without a loss: a bias on the choice, which each optimizer step moves towards even loads.

    Δb_i = μ sign(1/E - T_i / ΣT)      DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)
    Δb_i = μ (1/E - T_i / ΣT)          LongCat-Flash (arXiv 2509.01322): μ (K_e/K · 1/N - T_i / (K · T_all))

T_i counts the tokens that chose expert i since the last optimizer step, on all ranks, and ΣT = K · T_all. LongCat's N
experts and Z identity experts make E = N + Z. K_e, the routed experts among a token's K choices, is K · N/E for even
loads: then both targets are 1/E. The bias of an identity expert stays.

Shape suffix: E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class BiasBalance:
    """The correction bias of one router, and the tokens that its experts have got since its last step.

    Args:
        owner: has the buffer `e_score_correction_bias` [E], fp32.
        coefficient: μ.
        rule: "sign" or "proportional".
        num_experts: that a step moves: the first ones, without identity experts.
    """

    def __init__(
        self, owner: nn.Module, coefficient: float, rule: Literal["sign", "proportional"], num_experts: int
    ) -> None:
        self.owner, self.coefficient, self.rule, self.num_experts = owner, coefficient, rule, num_experts
        self._counts_E: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> BiasBalance:
        """A copied gate counts its own tokens."""
        owner = memo.get(id(self.owner), self.owner)
        assert isinstance(owner, nn.Module)
        return BiasBalance(owner, self.coefficient, self.rule, self.num_experts)

    def count(self, counts_E: Tensor) -> None:
        """Adds a training pass's tokens per expert, [E] integers. A pass that is recomputed counts twice everywhere,
        which changes no share."""
        counts_E = counts_E.detach().long()
        self._counts_E = counts_E.clone() if self._counts_E is None else self._counts_E + counts_E

    def take(self) -> Tensor:
        """[E] int64 tokens since the last call, on the bias's device; zeros if there was no pass."""
        counts_E, self._counts_E = self._counts_E, None
        bias_E = self.owner.get_buffer("e_score_correction_bias")
        return torch.zeros_like(bias_E, dtype=torch.int64) if counts_E is None else counts_E.to(bias_E.device)

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        """Moves the bias. From equal counts every rank computes equal bits: what is compared are integers.

        Args:
            counts_E: int64 tokens of all ranks.
        """
        E, total = len(counts_E), counts_E.sum()
        missing_E = total - counts_E * E
        if self.rule == "sign":
            step_E = missing_E.sign().float()
        else:
            step_E = (missing_E.double() / (total.clamp(min=1) * E)).float()
        step_E[self.num_experts :] = 0
        self.owner.get_buffer("e_score_correction_bias").add_(step_E, alpha=self.coefficient)
