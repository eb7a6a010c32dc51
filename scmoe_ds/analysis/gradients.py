"""Norm and signal-to-noise ratio of gradients, by sub-layer and branch (paper appendix A.1).

For g_k the gradient of micro-batch k of K and m their mean, a group of parameters has

    norm = mean over k of ||g_k||,    SNR = ||m||² / mean over k of ||g_k - m||²

Independent gradients without a signal have an SNR of about 1 / (K - 1), the record's "noise_floor".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.errors import AnalysisError
from scmoe_ds.models.gpt import GPT

BRANCHES = ("attention", "MLP", "shared expert", "routed experts", "gate", "merge", "embedding and head")
_PLACE = re.compile(r"runs\.(\d+)\.(?:blocks\.(\d+)\.)?(.*)")
_PREFIXES = {
    "attention": "attention",  # with its norm, attention_norm
    "mlp.": "MLP",
    "moe.mlp.": "shared expert",
    "moe.deepspeed_moe.experts.": "routed experts",
    "moe.deepspeed_moe.gate.": "gate",
    "moe.coefficient.": "merge",
    "shortcut_norm.": "routed experts",
    "post_norm.": "merge",
}


@dataclass(frozen=True)
class Group:
    """Parameters whose gradients form one vector.

    Attributes:
        branch: one of `BRANCHES`.
        block: from 0; None outside of blocks.
    """

    branch: str
    block: int | None


def parameter_groups(model: GPT) -> dict[Group, list[nn.Parameter]]:
    """All parameters of a GPT of any architecture.

    A norm belongs to the sub-layer that reads it: `attention_norm` to the attention; `mlp_norm` to the MLP or, in an
    MoE block, to the shared expert or, without one, to the routed experts; the shortcut's norm to the routed experts.
    In a post-norm Transformer these are the norms after the same sub-layers.
    """
    found: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(_group(model, name), []).append(parameter)
    return found


def _group(model: GPT, name: str) -> Group:
    match = _PLACE.match(name)
    if match is None:
        return Group("embedding and head", None)
    pair, rest = model.get_submodule(f"runs.{match[1]}"), match[3]
    blocks: Any = pair.blocks
    index = len(blocks) - 1 if match[2] is None else int(match[2])
    branch = next((branch for prefix, branch in _PREFIXES.items() if rest.startswith(prefix)), None)
    if rest.startswith("mlp_norm."):
        block = blocks[index]
        branch = "MLP" if hasattr(block, "mlp") else "shared expert" if block.moe.use_residual else "routed experts"
    if branch is None:
        raise AnalysisError(f"parameter {name} belongs to no known branch ({', '.join(BRANCHES)})")
    return Group(branch, int(match[1]) * len(blocks) + index)


class GradientSums:
    """Running sums over micro-batches: a float64 sum of the gradients, and a number per group and micro-batch.

    Args:
        groups: of `parameter_groups`.
    """

    def __init__(self, groups: dict[Group, list[nn.Parameter]]) -> None:
        self.groups = groups
        self._sum = {
            group: [torch.zeros_like(each, dtype=torch.float64) for each in members]
            for group, members in groups.items()
        }
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Adds the parameters' gradients; None counts as zero. Raises an AnalysisError if a gradient is not finite."""
        squares = []
        for group, members in self.groups.items():
            square = torch.zeros((), dtype=torch.float64, device=members[0].device)
            for parameter, total in zip(members, self._sum[group], strict=True):
                if parameter.grad is not None:
                    gradient = parameter.grad.double()
                    total += gradient
                    square += gradient.square().sum()
            squares.append(square)
        row = torch.stack(squares).cpu()
        if not bool(torch.isfinite(row).all()):
            group = list(self.groups)[int((~torch.isfinite(row)).nonzero()[0])]
            where = group.branch if group.block is None else f"{group.branch} of block {group.block}"
            raise AnalysisError(
                f"the gradient of the {where} is not finite in micro-batch {len(self._squares)}; try --dtype fp32"
            )
        self._squares.append(row)

    def record(self) -> dict[str, Any]:
        """JSON values: "micro_batches", "noise_floor", and "sub_layers" and "branches", each with "norm" and "snr". The
        latter is null for a group without a gradient. Raises an AnalysisError if there are fewer than two
        micro-batches."""
        count = len(self._squares)
        if count < 2:
            raise AnalysisError(f"{count} micro-batch(es): a signal-to-noise ratio needs at least 2")
        square_KG = torch.stack(self._squares)
        squares = [torch.stack([total.square().sum() for total in totals]).sum().cpu() for totals in self._sum.values()]
        signal_G = torch.stack(squares) / count**2
        noise_G = (square_KG.mean(0) - signal_G).clamp(min=0)
        groups = list(self.groups)

        def summary(members: list[int]) -> dict[str, float | None]:
            noise, norm = float(noise_G[members].sum()), float(square_KG[:, members].sum(1).sqrt().mean())
            return {"norm": norm, "snr": float(signal_G[members].sum()) / noise if noise else None}

        branches = {name: [g for g, group in enumerate(groups) if group.branch == name] for name in BRANCHES}

        def place(g: int) -> tuple[bool, int, int]:
            return groups[g].block is None, groups[g].block or 0, BRANCHES.index(groups[g].branch)

        order = sorted(range(len(groups)), key=place)
        return {
            "micro_batches": count,
            "noise_floor": 1 / (count - 1),
            "branches": {name: summary(members) for name, members in branches.items() if members},
            "sub_layers": [{"block": groups[g].block, "branch": groups[g].branch, **summary([g])} for g in order],
        }


def measure(model: GPT, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The record of a model, from one backward pass of its training loss per micro-batch.

    In evaluation mode there are no dropout, gate noise and drops, so the data is the only source of noise.

    Args:
        model: its parameters will require gradients.
        batches: tokens and next tokens, [B, S] each.

    Raises:
        AnalysisError: there are fewer than two batches, or a gradient is not finite.
    """
    model.requires_grad_(True)
    sums, device = GradientSums(parameter_groups(model)), model.embedding.weight.device
    for tokens, labels in batches:
        model.zero_grad(set_to_none=True)
        loss = model(tokens.to(device), labels=labels.to(device)).loss
        loss.backward()
        sums.add()
    model.zero_grad(set_to_none=True)
    return sums.record()
