"""Gates that send a given share of the tokens to each expert, in a model with random weights.

Shape suffixes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OFFSET, STEPS, TINY = 4.0, 200, 1e-3
"""Length of the direction that is added to what a gate reads, corrections of its weights, and the share that counts as
none."""


def skewed_shares(skew: float, experts: int) -> list[float]:
    """Expert 0 has `skew` times the mean, all others the same.

    Raises:
        ValueError: more than all tokens.
    """
    if skew > experts:
        raise ValueError(f"skew = {skew}: {experts} experts have at most {experts} times the mean")
    return [skew / experts] + [(1 - skew / experts) / (experts - 1)] * (experts - 1)


def read_by(layer: Any, step: Callable[[], object]) -> Tensor:
    """[T, D] what a layer's gate reads in a step."""
    seen: list[Tensor] = []
    begin = layer.begin

    def noting(shortcut: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(shortcut.detach().clone().flatten(0, -2))
        return begin(shortcut, *args, **kwargs)

    layer.begin = noting
    try:
        step()
    finally:
        del layer.begin
    return seen[-1]


def skew_gate(run: Any, step: Callable[[], object], share_E: Sequence[float]) -> Tensor:
    """Changes a pair's gate until the tokens of all ranks divide among the experts in these shares. Collective.

    A constant is added to what the gate reads, and weights along it shift an expert's logit for every token.

    Args:
        step: a forward pass of the model.

    Returns:
        [T, D] what the gate reads in such a pass.
    """
    block, layer = run.blocks[-1], run.blocks[-1].moe
    weight_ED = layer.deepspeed_moe.gate.wg.weight.data
    direction = torch.full((weight_ED.shape[1],), weight_ED.shape[1] ** -0.5)
    for norm in (block.mlp_norm, getattr(run, "shortcut_norm", None)):
        if norm is not None:
            norm.bias.data += OFFSET * direction
    tokens_TD = read_by(layer, step)
    aim_E = torch.tensor(share_E) + TINY
    spread = (tokens_TD @ weight_ED.T).std(0).mean()
    dist.all_reduce(spread)
    for step_number in range(STEPS):
        counts_E = torch.bincount((tokens_TD @ weight_ED.T).argmax(1), minlength=len(share_E)).float()
        dist.all_reduce(counts_E)
        error_E = torch.log(aim_E / (counts_E / counts_E.sum() + TINY)).clamp(-1, 1)
        step_E = error_E * spread / (4 * OFFSET * dist.get_world_size() * (1 + step_number / 20))
        weight_ED += torch.outer(step_E, direction)
    return tokens_TD
