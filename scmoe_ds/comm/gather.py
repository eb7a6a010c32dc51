"""A gather along the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_last_dimension(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., N / ranks] of each rank → [..., N] on all of them. Blocking.

    All ranks have to use the result alike: the backward pass gives each rank the gradient of its own part, and sums
    nothing.
    """
    return _Gather.apply(part, group)


class _Gather(torch.autograd.Function):
    """As megatron-core's, which allocates on a GPU only."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, part = group, part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        return grads[0].chunk(ranks, dim=-1)[dist.get_rank(ctx.group)].contiguous(), None
