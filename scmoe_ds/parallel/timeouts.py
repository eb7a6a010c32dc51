"""One timeout for every process group.

DeepSpeed's `new_group` takes none, so that its expert-parallel groups keep torch's default whatever was given to
`init_distributed`: a link that goes down would hold the job for half an hour without a word.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_timeouts(timeout: timedelta) -> int:
    """Gives all groups that exist and that this rank is in the same timeout; call it when all groups are made.

    Returns:
        the number of groups.
    """
    groups = [group for group in distributed_c10d._world.pg_map if isinstance(group, distributed_c10d.ProcessGroup)]
    for group in groups:
        distributed_c10d._set_pg_timeout(timeout, group)
    return len(groups)
