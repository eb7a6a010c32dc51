"""Checks that all ranks pass or fail together, before the first collective that a disagreement would hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankDisagreementError(ValueError):
    """Ranks of one run hold different settings or data."""


def run_together(step: Callable[[], T], on_rank_zero: bool = False) -> T | None:
    """Runs a step that may fail on some ranks and, if it does, fails on all of them with the same error.

    Args:
        step: reads files, checks settings, …; must not communicate.
        on_rank_zero: run it on rank 0 only; the others return None.

    Raises:
        whatever `step` raised on the lowest failing rank, if it is a ValueError or OSError.
    """
    result, failure = None, None
    if not on_rank_zero or not _distributed() or dist.get_rank() == 0:
        try:
            result = step()
        except (ValueError, OSError) as error:
            failure = error
    for rank, found in enumerate(_gather(failure)):
        if found is not None:
            raise found if rank == 0 else type(found)(f"{found} (found by rank {rank})")
    return result


def require_agreement(name: str, value: Any) -> None:
    """Compares a small picklable value over all ranks.

    Raises:
        RankDisagreementError: on every rank, with what each rank holds.
    """
    values = _gather(value)
    if any(other != values[0] for other in values):
        held = "; ".join(f"rank {rank}: {other!r}" for rank, other in enumerate(values))
        raise RankDisagreementError(f"{name} differs between ranks ({held}); start all of them from the same files")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(value: Any) -> list[Any]:
    if not _distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
