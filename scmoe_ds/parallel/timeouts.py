"""One timeout for every process group.

DeepSpeed's `new_group` takes no timeout, so its expert-parallel groups keep torch's default whatever `init_distributed`
got. When a link goes down, the job would silently hang for half an hour.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def limit_new_groups(timeout: timedelta) -> None:
    """Makes a timeout the default of all groups that any package makes from here on."""
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


def limit_world(timeout: timedelta) -> None:
    """Gives the world's group, which had a longer timeout for the start, the same timeout."""
    distributed_c10d._set_pg_timeout(timeout, distributed_c10d._get_default_group())


def limit_s() -> float:
    """The limit in seconds."""
    return float(distributed_c10d.default_pg_timeout.total_seconds())
