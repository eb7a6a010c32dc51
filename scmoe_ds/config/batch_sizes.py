"""DeepSpeed's three keys for the batch size, any two of which give the third."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scmoe_ds.errors import ScMoEConfigError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_sizes(whole: Mapping[str, Any], data_parallel_size: int) -> tuple[int, int]:
    """(micro-batch size per rank, gradient accumulation steps).

    Raises:
        ScMoEConfigError: none of the keys, a value below 1, or a product that does not come out.
    """
    total, micro, steps = (whole.get(key) for key in KEYS)
    for key, value in zip(KEYS, (total, micro, steps), strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ScMoEConfigError(f"{key} = {json.dumps(value)}: must be an integer of at least 1")
    if micro is None:
        if total is None:
            raise ScMoEConfigError(f"{KEYS[1]} is missing: set it, or {KEYS[0]}")
        steps = steps or 1
        micro = max(total // (steps * data_parallel_size), 1)
    elif steps is None:
        steps = max(total // (micro * data_parallel_size), 1) if total else 1
    product = micro * steps * data_parallel_size
    if total is not None and total != product:
        raise ScMoEConfigError(
            f"{KEYS[0]} = {total}: must equal {KEYS[1]} ({micro}) * {KEYS[2]} ({steps}) * data-parallel ranks "
            f"({data_parallel_size}) = {product}; leave one of the three out"
        )
    return micro, steps
