"""The shared memory of DeepSpeed's collectives on CPUs, which it names and never gives back.

Every job leaves 66 MiB per rank in /dev/shm under the name of its port; some hundred of them fill a machine's memory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

logger = logging.getLogger("scmoe_ds")

DIRECTORY = Path("/dev/shm")
_BUFFER_BYTES = 67 << 20
"""A little more than that of one rank."""


def require_room() -> None:
    """Without room for the buffers of all ranks, DeepSpeed's collectives are torch's; it would not notice, and every
    rank would end by a segmentation fault. Collective, before DeepSpeed makes them."""
    ranks = int(os.environ.get("LOCAL_SIZE", "0"))
    if ranks != dist.get_world_size():  # DeepSpeed shares memory only where its launcher started all ranks on one host
        return
    has_room = torch.tensor(int(room_bytes() >= ranks * _BUFFER_BYTES))
    dist.all_reduce(has_room, dist.ReduceOp.MIN)  # a rank that looks late sees the buffers of others
    if not has_room:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if dist.get_rank() == 0:
            logger.warning(
                "%s has no room for DeepSpeed's shared memory (%d MiB): collectives go through torch, which "
                "is slower; enlarge it (docker run --shm-size 1g)",
                DIRECTORY,
                ranks * _BUFFER_BYTES >> 20,
            )


def room_bytes() -> int:
    """What may still be written to the shared memory; 0 where there is none."""
    try:
        found = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def forget_names() -> None:
    """Removes the name of this rank's buffer once all ranks have it mapped: the memory goes with the last of them, even
    if they are killed. Collective; does nothing where DeepSpeed shares no memory."""
    dist.barrier()
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    (DIRECTORY / "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place])).unlink(missing_ok=True)
