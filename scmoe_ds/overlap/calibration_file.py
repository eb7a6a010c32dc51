"""Measured times on disk: rank 0 reads and writes them; they hold for the model and machine of their measurement."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from scmoe_ds.config import ScMoEConfigError
from scmoe_ds.overlap.times import OperatorTimes
from scmoe_ds.parallel.agreement import run_together

logger = logging.getLogger("scmoe_ds")

Description = Mapping[str, Any]
Saved = list[dict[str, Any]]
_PATH = "scmoe.overlap.calibration_file"


def read_calibration(file: str | None) -> Saved | None:
    """Rank 0's file, on every rank (the nodes need not share a file system); None if there is none.

    Raises:
        ScMoEConfigError: a file that cannot be read or is something else, on every rank.
    """
    if file is None:
        return None

    def read() -> Saved | None:
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ScMoEConfigError(f"{_PATH} = {file}: cannot be read ({error})") from None
        if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
            raise ScMoEConfigError(f"{_PATH} = {file}: is not a calibration (a JSON list of objects)")
        return saved

    holder = [run_together(read, on_rank_zero=True)]
    dist.broadcast_object_list(holder)
    return holder[0]


def check_writable(file: str | None) -> None:
    """Makes the file's directory and tries to write in it, now rather than after the measurement.

    Raises:
        ScMoEConfigError: on every rank.
    """
    if file is None:
        return

    def attempt() -> None:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=Path(file).parent):
                pass
        except OSError as error:
            raise ScMoEConfigError(f"{_PATH} = {file}: cannot be written ({error.strerror})") from None

    run_together(attempt, on_rank_zero=True)


def write_calibration(file: str | None, saved: Saved | None) -> None:
    """Writes the times on rank 0. A file that cannot be written any more is no reason to stop: it is logged."""
    if file is None or dist.get_rank() != 0:
        return
    part = Path(f"{file}.part")
    try:
        part.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        part.replace(file)  # another run may be reading it
    except OSError as error:
        logger.warning("%s = %s: not written (%s)", _PATH, file, error.strerror)


def find_times(
    saved: Sequence[Any], wanted: Sequence[Description], chunk_counts: Sequence[int], source: str
) -> list[OperatorTimes]:
    """The saved times of each wanted kind of pair.

    Args:
        saved: what `AdaptiveOverlap.state` gave.
        wanted: descriptions of this run's kinds.
        chunk_counts: the numbers of chunks that there must be times for.
        source: where they come from, for the message.

    Raises:
        ScMoEConfigError: there are none, with what differs from the nearest, or they are damaged.
    """
    remedy = "Remove it to measure again, or name another"
    found = []
    for description in wanted:
        nearest: tuple[list[str], dict[str, Any], Any] | None = None
        for entry in saved:
            other = entry.get("description") if isinstance(entry, dict) else None
            if not isinstance(other, dict):
                raise ScMoEConfigError(f"{source} is damaged: an entry has no description. {remedy}")
            keys = [key for key in {**description, **other} if description.get(key) != other.get(key)]
            if nearest is None or len(keys) < len(nearest[0]):
                nearest = keys, other, entry.get("times")
        if nearest is None or nearest[0]:
            keys, other, _ = nearest or ([], {}, None)
            listed = "; ".join(f"{key}: {other.get(key)!r} there, {description.get(key)!r} in this run" for key in keys)
            raise ScMoEConfigError(f"{source} is of another model or machine: {listed or 'it is empty'}. {remedy}")
        try:
            times = OperatorTimes.model_validate(nearest[2])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "times"
            raise ScMoEConfigError(f"{source} is damaged: {place}: {first['msg']}. {remedy}") from None
        if missing := set(chunk_counts) - set(times.chunks):
            raise ScMoEConfigError(f"{source} has times of {sorted(times.chunks)} chunks only, not of "
                                   f"{sorted(missing)}. {remedy}")  # fmt: skip
        found.append(times)
    return found
