"""One timeout for every process group.

DeepSpeed's `new_group` takes none, so that its expert-parallel groups keep torch's default whatever was given to
`init_distributed`: a link that goes down would hold the job for half an hour without a word.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def limit_new_groups(timeout: timedelta) -> None:
    """Makes a timeout the default of all groups that are made from here on, by whatever package."""
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


def limit_world(timeout: timedelta) -> None:
    """Gives the world's group, which waited longer for the ranks to start, the same timeout."""
    distributed_c10d._set_pg_timeout(timeout, distributed_c10d._get_default_group())


def limit_s() -> float:
    """The limit in seconds."""
    return float(distributed_c10d.default_pg_timeout.total_seconds())
