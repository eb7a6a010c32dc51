"""What NCCL and torch's allocator read from the environment, as far as the overlap depends on it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's name of its allocator's options, and its former one, which every version reads."""


def prefer_communication(environment: MutableMapping[str, str]) -> bool:
    """Has NCCL launch its kernels at high priority, unless the user has decided; call it before groups are made.

    A kernel of normal priority that arrives beside a matrix product gets a multiprocessor only when a block of the
    product ends, and the product's remaining blocks go first. torch reads the variable when a group first communicates.

    Returns:
        whether it was set here.
    """
    if PRIORITY in environment:
        return False
    environment[PRIORITY] = "1"
    return True


def allocator_advice(environment: Mapping[str, str]) -> str | None:
    """A sentence for users of GPUs who have not set the allocator's segments."""
    if any("expandable_segments" in environment.get(name, "") for name in _ALLOCATOR):
        return None
    return (
        f"{_ALLOCATOR[1]}=expandable_segments:True is recommended: the numbers of routed rows differ from step to "
        "step, and with fixed segments torch's free memory falls into pieces that fit none of them"
    )
