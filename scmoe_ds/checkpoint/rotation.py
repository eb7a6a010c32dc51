"""How a finished checkpoint comes into use, and how old ones go: at no moment is there none that is whole."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from scmoe_ds.checkpoint.files import (
    DESCRIPTION_FILE,
    MANIFEST_FILE,
    PART,
    flush,
    iteration_of,
    newest_first,
    read_json,
    read_latest,
    write_whole,
)
from scmoe_ds.data.checksums import FileEntry
from scmoe_ds.errors import CheckpointError

logger = logging.getLogger("scmoe_ds")

VALIDATED = "last validation that passed"
"""In a description: an iteration, or null."""
_REMOVING = "removing-"


def publish(part: Path, final: Path, manifest: dict[str, FileEntry]) -> None:
    """Makes a finished directory the latest checkpoint; its files are on the disk already.

    Order: manifest, name, `latest`. Wherever the machine stops, `latest` names a whole checkpoint.
    """
    write_whole(part / MANIFEST_FILE, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    replaced = _set_aside(final) if final.exists() else None  # of a run that was started again from before it
    part.rename(final)
    flush(final.parent)
    write_whole(final.parent / "latest", final.name)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Clears away what an interrupted save or an interrupted removal left."""
    for pattern in (f"global_step*{PART}", f"{_REMOVING}global_step*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def remove_old(root: Path, keep_last: int) -> None:
    """Removes all but the `keep_last` newest whole checkpoints up to the one that `latest` names, and the newest that a
    validation has passed since.

    A checkpoint is renamed before its files go: no half-removed one is ever taken for a whole one. Directories without
    a manifest and checkpoints newer than `latest` are not touched. A failure is logged; it is no reason to stop.
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
    """The last iteration at which a validation of a run that saves in `root` gave a finite loss, up to `iteration`.

    Args:
        validated: of this run since its start. Else the newest checkpoint knows: each records it, and passes it on.
    """
    for tag in [] if validated is not None else _whole_up_to(root, iteration):
        try:
            description = read_json(root / tag / DESCRIPTION_FILE, "--save")
        except CheckpointError:  # a damaged one knows nothing
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
