"""Checks that all ranks pass or fail together, before a disagreement can make a collective hang."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch.distributed as dist

from scmoe_ds.errors import RankDisagreementError
from scmoe_ds.parallel import watch

T = TypeVar("T")


def run_together(step: Callable[[], T]) -> T:
    """Runs a step. When it fails on a rank, all ranks raise the same error. Collective.

    A step may take longer than the timeout of collectives: the other ranks wait for it as long as its rank lives.

    Args:
        step: reads files, checks settings, …; must not communicate.

    Raises:
        ValueError, OSError: the error of the lowest failing rank. Class, errno and strerror are the same on every rank.
    """
    result, failure = None, None
    try:
        result = step()
    except (ValueError, OSError) as error:
        failure = error
    wait_for_all()
    for rank, found in enumerate(gather(None if failure is None else _that_travels(failure))):
        if found is not None:
            raise found if rank == 0 else _found_by(rank, found)
    return cast(T, result)


def run_on_rank_zero(step: Callable[[], T]) -> T | None:
    """As `run_together`, but only rank 0 runs the step; the others return None."""
    return run_together(lambda: step() if is_rank_zero() else None)


def from_rank_zero(step: Callable[[], T]) -> T:
    """As `run_together`, but only rank 0 runs the step, and every rank returns its result, which must be picklable."""
    return cast(T, gather(run_on_rank_zero(step))[0])


def _that_travels(error: ValueError | OSError) -> ValueError | OSError:
    """The error itself if other ranks can unpickle it, otherwise an error with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class whose constructor takes something else than its `args`
        words = f"{type(error).__name__}: {error}"
        return OSError(error.errno, words) if isinstance(error, OSError) else ValueError(words)
    return error


def _found_by(rank: int, error: ValueError | OSError) -> ValueError | OSError:
    """The error with the rank in its message. An OSError keeps the operating system's message."""
    words = f" (found by rank {rank})"
    if isinstance(error, UnicodeDecodeError):
        return type(error)(error.encoding, error.object, error.start, error.end, error.reason + words)
    if isinstance(error, json.JSONDecodeError):
        return type(error)(error.msg + words, error.doc, error.pos)
    if not isinstance(error, OSError) or error.errno is None:
        with suppress(TypeError):  # built from something else than one string
            return type(error)(f"{error}{words}")
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(words.strip(" ()"))
    return error


def wait_for_all() -> None:
    """Returns when all ranks have called it, however long that takes. Collective.

    Without a guardian, which would end the job when a rank dies, this does not wait; the next collective does.
    """
    if _distributed() and watch.active is not None:
        watch.active.wait_for_all()


def require_agreement(
    name: str, value: Any, group: dist.ProcessGroup | None = None, remedy: str = "start all of them from the same files"
) -> None:
    """Compares a small picklable value over all ranks of a group, by default of the world. Raises a
    RankDisagreementError on every rank, with all values, if they differ"""
    values = gather(value, group)
    if any(other != values[0] for other in values):
        ranks = dist.get_process_group_ranks(group)
        held = "; ".join(f"rank {rank}: {other!r}" for rank, other in zip(ranks, values, strict=True))
        raise RankDisagreementError(f"{name} differs between ranks ({held}); {remedy}")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """A small picklable value of each rank of a group, in order of the ranks. Collective."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def fingerprint(value: Any) -> str:
    """Short hash of a JSON value, for comparison between ranks."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_rank_zero() -> bool:
    """Whether this is the first rank, or a process without a process group."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
