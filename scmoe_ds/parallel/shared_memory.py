"""The shared memory of DeepSpeed's collectives on CPUs, which it names and never gives back.

Every job leaves 66 MiB per rank in /dev/shm under the name of its port; some hundred of them fill a machine's memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

DIRECTORY = Path("/dev/shm")


def forget_names() -> None:
    """Removes the name of this rank's buffer once all ranks have it mapped: the memory goes with the last of them, even
    if they are killed. Collective; does nothing where DeepSpeed shares no memory."""
    dist.barrier()
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    (DIRECTORY / "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place])).unlink(missing_ok=True)
