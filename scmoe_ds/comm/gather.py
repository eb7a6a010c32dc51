"""A gather along the last dimension."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_last_dimension(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., N / ranks] of each rank → [..., N] on all of them. Blocking.

    All ranks have to use the result alike: the backward pass gives each rank the gradient of its own part, and sums
    nothing.
    """
    own = part.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    parts[dist.get_rank(group)] = part
    return torch.cat(parts, dim=-1)
