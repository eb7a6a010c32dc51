"""Measured times on disk. Rank 0 reads and writes them. They hold for one model on one machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from scmoe_ds.data.durable_files import try_to_write, write_whole
from scmoe_ds.errors import ScMoEConfigError, reason_of
from scmoe_ds.parallel.agreement import from_rank_zero, run_on_rank_zero
from scmoe_ds.planner.comparison import Measured
from scmoe_ds.planner.times import KINDS, OperatorTimes, kind_of

logger = logging.getLogger("scmoe_ds")

Description = Mapping[str, Any]
Saved = list[dict[str, Any]]
_PATH = "scmoe.overlap.calibration_file"
_REMEDY = "Remove it to measure again, or name another"


def read_calibration(file: str | None) -> Saved | None:
    """Rank 0's file, on every rank; None if there is none. The nodes need not share a file system.

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
        except (OSError, ValueError, RecursionError) as error:
            raise ScMoEConfigError(f"{_PATH} = {file}: cannot be read ({reason_of(error)}). {_REMEDY}") from None
        if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
            raise ScMoEConfigError(f"{_PATH} = {file}: is not a calibration (a JSON list of objects). {_REMEDY}")
        return saved

    return from_rank_zero(read)


def check_writable(file: str | None) -> None:
    """Makes the file's directory and tries to write in it, before anything is measured.

    Raises:
        ScMoEConfigError: on every rank.
    """
    if file is None:
        return

    def attempt() -> None:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            try_to_write(Path(file).parent)
        except OSError as error:
            raise ScMoEConfigError(f"{_PATH} = {file}: cannot be written ({error.strerror})") from None

    run_on_rank_zero(attempt)


def write_calibration(file: str | None, saved: Saved | None) -> None:
    """Writes the times on rank 0. If the file cannot be written any more, the log says so and the run goes on."""
    if file is None or dist.get_rank() != 0:
        return
    try:
        write_whole(Path(file), json.dumps(saved, indent=1) + "\n")  # another run may be reading it
    except OSError as error:
        logger.warning("%s = %s: not written (%s)", _PATH, file, error.strerror)


def find_times(
    saved: Any, descriptions: Sequence[Description], chunk_counts: Sequence[int], source: str
) -> list[OperatorTimes]:
    """The saved times of each kind of pair.

    Args:
        saved: what `Calibrator.state` gave, or whatever else a file holds.
        descriptions: of this run's kinds.
        chunk_counts: the numbers of chunks that must have times.
        source: where the times come from, for the message.

    Raises:
        ScMoEConfigError: no times of a kind (the message says what differs from the nearest), or damaged ones.
    """
    if not isinstance(saved, list):
        raise ScMoEConfigError(f"{source} is damaged: it is no list. {_REMEDY}")
    found = []
    for description in descriptions:
        differences = [_difference(entry, description, source) for entry in saved]
        nearest = min(range(len(saved)), key=lambda number: len(differences[number]), default=None)
        if nearest is None or differences[nearest]:
            listed = "it is empty" if nearest is None else "; ".join(differences[nearest][:20])
            raise ScMoEConfigError(f"{source} is of another model or machine: {listed}. {_REMEDY}")
        times = _checked(saved[nearest].get("times"), description, source)
        if missing := set(chunk_counts) - set(times.chunks):
            raise ScMoEConfigError(
                f"{source} has times of {sorted(times.chunks)} chunks only, not of {sorted(missing)}. {_REMEDY}"
            )
        found.append(times)
    return found


def find_measured(saved: Saved, source: str) -> Measured | None:
    """The saved comparison of training with and without overlap; None: it was not over, or not known yet.

    Raises:
        ScMoEConfigError: a damaged one.
    """
    found = saved[0].get("measured") if isinstance(saved[0], dict) else None
    try:
        return None if found is None else Measured.model_validate(found)
    except ValidationError:
        raise ScMoEConfigError(f"{source} is damaged: measured = {_short(repr(found))}. {_REMEDY}") from None


def _difference(entry: Any, description: Description, source: str) -> list[str]:
    other = entry.get("description") if isinstance(entry, dict) else None
    if not isinstance(other, dict):
        raise ScMoEConfigError(f"{source} is damaged: an entry has no description. {_REMEDY}")
    return [
        f"{_short(key)}: {_short(repr(other.get(key)))} there, {_short(repr(description.get(key)))} in this run"
        for key in {**description, **other}
        if description.get(key) != other.get(key)
    ]


def _checked(times: Any, description: Description, source: str) -> OperatorTimes:
    """The limits of the JSON hold for files too: the planner tries every slot of every chunk."""
    try:
        checked = OperatorTimes.model_validate(times)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(_short(part) for part in first["loc"]) or "times"
        raise ScMoEConfigError(
            f"{source} is damaged: {place} = {_short(repr(first['input']))}: {first['msg']}. {_REMEDY}"
        ) from None
    names = [each.name for each in checked.backbone]
    described = [str(name) for name in description.get("operators") or []]
    ours = all(kind_of(name) in KINDS for name in described)  # a replaced layer's description has modules
    if described and ours and described != names:
        raise ScMoEConfigError(
            f"{source} is damaged: times of the operators {_short(names)}, which are not those of "
            f"its description. {_REMEDY}"
        )
    one = checked.chunks[1]
    parts = (*checked.backbone, one.dispatch, one.experts, one.combine)
    if not any(part.forward_ms + part.backward_ms for part in parts):
        raise ScMoEConfigError(f"{source} is damaged: all times are 0. {_REMEDY}")
    return checked


def _short(value: object) -> str:
    """On one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "…"
