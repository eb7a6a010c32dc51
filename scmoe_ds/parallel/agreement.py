"""Checks that all ranks pass or fail together, before the first collective that a disagreement would hang."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch.distributed as dist

from scmoe_ds.errors import RankDisagreementError
from scmoe_ds.parallel import watch

T = TypeVar("T")


def run_together(step: Callable[[], T], on_rank_zero: bool = False) -> T | None:
    """Runs a step that may fail on some ranks and, if it does, fails on all of them with the same error.

    A step may take longer than the timeout of collectives: the other ranks wait for it as long as its rank lives.

    Args:
        step: reads files, checks settings, …; must not communicate.
        on_rank_zero: run it on rank 0 only; the others return None.

    Raises:
        whatever `step` raised on the lowest failing rank, if it is a ValueError or OSError. Its class, errno and
            strerror are the same on every rank.
    """
    result, failure = None, None
    if not on_rank_zero or not _distributed() or dist.get_rank() == 0:
        try:
            result = step()
        except (ValueError, OSError) as error:
            failure = error
    wait_for_all()
    for rank, found in enumerate(_gather(None if failure is None else _that_travels(failure))):
        if found is not None:
            raise found if rank == 0 else _found_by(rank, found)
    return result


def _that_travels(error: ValueError | OSError) -> ValueError | OSError:
    """The error itself, if the other ranks can build it from what pickle sends; otherwise its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class whose constructor takes something else than its `args`
        words = f"{type(error).__name__}: {error}"
        return OSError(error.errno, words) if isinstance(error, OSError) else ValueError(words)
    return error


def _found_by(rank: int, error: ValueError | OSError) -> ValueError | OSError:
    """The error with the rank in its message; an OSError keeps its message, which is the operating system's."""
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

    Where no guardian would end a job whose rank is dead, the next collective has to: then this does not wait.
    """
    if _distributed() and watch.active is not None:
        watch.active.wait_for_all()


def require_agreement(
    name: str,
    value: Any,
    group: dist.ProcessGroup | None = None,
    remedy: str = "start all of them from the same files",
) -> None:
    """Compares a small picklable value over all ranks of a group, by default of the world.

    Raises:
        RankDisagreementError: on every rank, with what each rank holds.
    """
    values = _gather(value, group)
    if any(other != values[0] for other in values):
        ranks = dist.get_process_group_ranks(group)
        held = "; ".join(f"rank {rank}: {other!r}" for rank, other in zip(ranks, values, strict=True))
        raise RankDisagreementError(f"{name} differs between ranks ({held}); {remedy}")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    if not _distributed():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def fingerprint(value: Any) -> str:
    """Short hash of a JSON value, for comparison between ranks."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
