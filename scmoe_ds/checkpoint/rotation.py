"""Publishes a finished checkpoint and removes old ones. At every moment one whole checkpoint is there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from scmoe_ds.checkpoint.directories import read_latest
from scmoe_ds.checkpoint.files import (
    DESCRIPTION_FILE,
    MANIFEST_FILE,
    PART,
    iteration_of,
    newest_first,
    read_json,
)
from scmoe_ds.data.durable_files import FileEntry, flush, write_whole
from scmoe_ds.errors import CheckpointError

logger = logging.getLogger("scmoe_ds")

VALIDATED = "last validation that passed"
"""In a description: an iteration, or null."""
_REMOVING = "removing-"


def publish(part: Path, final: Path, manifest: dict[str, FileEntry]) -> None:
    """Makes a finished directory, whose files are on the disk, the latest checkpoint.

    Order: manifest, name, `latest`. Whenever the machine stops, `latest` names a whole checkpoint.
    """
    write_whole(part / MANIFEST_FILE, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    replaced = _set_aside(final) if final.exists() else None  # when the run was started again from an earlier one
    part.rename(final)
    flush(final.parent)
    write_whole(final.parent / "latest", final.name)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Removes the remains of an interrupted save or an interrupted removal."""
    for pattern in (f"global_step*{PART}", f"{_REMOVING}global_step*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def remove_old(root: Path, keep_last: int) -> None:
    """Removes old checkpoints. Keeps the `keep_last` newest up to the one that `latest` names, and the newest that a
    validation has passed.

    A checkpoint is renamed before its files are removed, so that a half-removed one never looks whole. Directories
    without a manifest and checkpoints newer than `latest` stay. A failure is logged and does not stop the run.
    """
    latest = read_latest(root, "--save")
    last = iteration_of(latest) if latest else None
    if last is None:
        return
    older = _whole_up_to(root, last)
    validated = last_validated(root, last)
    good = next((tag for tag in older if validated is not None and (iteration_of(tag) or 0) <= validated), None)
    for tag in older[keep_last:]:
        if tag == good:
            continue
        try:
            shutil.rmtree(_set_aside(root / tag))
        except OSError as error:
            logger.warning("--keep-last: %s was not removed (%s)", root / tag, error.strerror)


def last_validated(root: Path, iteration: int, validated: int | None = None) -> int | None:
    """The last iteration, up to `iteration`, at which a validation of the run that saves in `root` had a finite loss.

    Args:
        validated: that iteration, if this process has validated. If None, the newest checkpoint knows it: each
            checkpoint records it.
    """
    for tag in [] if validated is not None else _whole_up_to(root, iteration):
        try:
            description = read_json(root / tag / DESCRIPTION_FILE, "--save")
        except CheckpointError:  # a damaged checkpoint
            continue
        if VALIDATED in description:
            recorded = description[VALIDATED]
            return recorded if isinstance(recorded, int) else None
    return validated


def _whole_up_to(root: Path, iteration: int) -> list[str]:
    return [
        tag
        for tag in newest_first(root)
        if (iteration_of(tag) or 0) <= iteration
        and all((root / tag / name).is_file() for name in (DESCRIPTION_FILE, MANIFEST_FILE))
    ]


def _set_aside(directory: Path) -> Path:
    aside = directory.with_name(_REMOVING + directory.name)
    shutil.rmtree(aside, ignore_errors=True)
    return directory.rename(aside)
