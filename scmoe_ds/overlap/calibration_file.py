"""Measured times on disk: rank 0 reads and writes them; they hold for the model and machine of their measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from scmoe_ds.config import ScMoEConfigError
from scmoe_ds.overlap.times import OperatorTimes
from scmoe_ds.parallel.agreement import run_together

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


def write_calibration(file: str, saved: Saved | None) -> None:
    """Writes the times on rank 0; all ranks call it.

    Raises:
        ScMoEConfigError: a file that cannot be written, on every rank.
    """

    def write() -> None:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ScMoEConfigError(f"{_PATH} = {file}: cannot be written ({error.strerror})") from None

    run_together(write, on_rank_zero=True)


def find_times(saved: Sequence[Mapping[str, Any]], wanted: Sequence[Description], source: str) -> list[OperatorTimes]:
    """The saved times of each wanted kind of pair.

    Args:
        saved: what `AdaptiveOverlap.state` gave.
        wanted: descriptions of this run's kinds.
        source: where they come from, for the message.

    Raises:
        ScMoEConfigError: there are none, with what differs from the nearest.
    """
    found = []
    for description in wanted:
        candidates = []
        for entry in saved:
            other = entry.get("description", {})
            keys = [key for key in {**description, **other} if description.get(key) != other.get(key)]
            candidates.append((len(keys), keys, entry))
        if not candidates or min(candidate[0] for candidate in candidates):
            _, keys, entry = min(candidates, key=lambda candidate: candidate[0], default=(0, [], {}))
            other = entry.get("description", {})
            listed = "; ".join(f"{key}: {other.get(key)!r} there, {description.get(key)!r} in this run" for key in keys)
            raise ScMoEConfigError(f"{source} is of another model or machine: {listed or 'it is empty'}. "
                                   "Remove it to measure again, or name another")  # fmt: skip
        entry = next(candidate[2] for candidate in candidates if not candidate[0])
        try:
            found.append(OperatorTimes.model_validate(entry.get("times")))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ScMoEConfigError(
                f"{source} is damaged: {place}: {first['msg']}. Remove it to measure again"
            ) from None
    return found
