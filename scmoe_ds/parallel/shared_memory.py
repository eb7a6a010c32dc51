"""Removes the shared memory of DeepSpeed's collectives on CPUs, which DeepSpeed itself never removes.

Every job leaves 66 MiB per rank in /dev/shm under the name of its port. A few hundred jobs fill a machine's memory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from scmoe_ds.compat import disable_shared_memory

logger = logging.getLogger("scmoe_ds")

DIRECTORY = Path("/dev/shm")
_BUFFER_BYTES = 67 << 20
"""A little more than one rank's buffer."""


def require_room() -> None:
    """Makes DeepSpeed use torch's collectives when the buffers of all ranks do not fit. DeepSpeed does not check this,
    and every rank would end by a segmentation fault. Collective, before DeepSpeed makes the buffers."""
    ranks = int(os.environ.get("LOCAL_SIZE", "0"))
    if ranks != dist.get_world_size():  # DeepSpeed shares memory only when its launcher started all ranks on one host
        return
    has_room = torch.tensor(int(room_bytes() >= ranks * _BUFFER_BYTES))
    dist.all_reduce(has_room, dist.ReduceOp.MIN)  # a late rank may already see other ranks' buffers
    if not has_room:
        disable_shared_memory()
        if dist.get_rank() == 0:
            logger.warning(
                f"{DIRECTORY} has no room for DeepSpeed's shared memory ({ranks * _BUFFER_BYTES >> 20} MiB): "
                "collectives go through torch, which is slower; enlarge it (docker run --shm-size 1g)"
            )


def room_bytes() -> int:
    """Free bytes of the shared memory; 0 if there is none."""
    try:
        found = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def forget_names() -> None:
    """Removes the name of this rank's buffer when all ranks have mapped it. The memory is freed with the last of them,
    even when they are killed. Collective; does nothing when DeepSpeed shares no memory."""
    dist.barrier()
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    (DIRECTORY / "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place])).unlink(missing_ok=True)
