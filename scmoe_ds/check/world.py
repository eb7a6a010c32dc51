"""A process group of one process: the other ranks do as this one does, and nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from scmoe_ds.compat import forget_process_groups, start_fake_process_group


@contextmanager
def world(rank: int, ranks: int, per_node: int, device: str) -> Iterator[None]:
    """Inside the block, this process is a rank of a world that does not exist.

    Args:
        rank, ranks: of the world.
        per_node: ranks of each node.
        device: "cuda" or "cpu", DeepSpeed's accelerator.
    """
    before, make_group = real_accelerator.ds_accelerator, dist.new_group
    accelerator = CUDA_Accelerator() if device == "cuda" else CPU_Accelerator()
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": str(min(per_node, ranks)),
        "CROSS_RANK": f"node {rank // per_node}",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }

    def all_gather_object(values: list[Any], value: Any, group: Any = None) -> None:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        is_node = value == environment["CROSS_RANK"]
        values[:] = [f"node {member // per_node}" if is_node else value for member in members]

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **_: Any) -> Any:
        return make_group(ranks, timeout, "fake")  # whatever backend is asked for: megatron-core names gloo and NCCL

    with (
        patch.dict(os.environ, environment),
        patch.object(dist, "all_gather_object", all_gather_object),
        patch.object(dist, "new_group", new_group),
    ):
        start_fake_process_group(rank, ranks)
        real_accelerator.set_accelerator(accelerator)
        try:
            yield
        finally:
            forget_process_groups()
            dist.destroy_process_group()
            real_accelerator.ds_accelerator = before
