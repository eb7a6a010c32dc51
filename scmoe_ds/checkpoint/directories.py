"""Which checkpoint the directory of a flag stands for, and whether a run may write there."""

from __future__ import annotations

import logging
from pathlib import Path

from scmoe_ds.checkpoint import files
from scmoe_ds.checkpoint.safetensors_files import is_export
from scmoe_ds.errors import CheckpointError

logger = logging.getLogger("scmoe_ds")


def locate(path: Path, flag: str = "", remedy: str = "name one that a training run has saved") -> Path:
    """The directory of tensors that a path stands for: a checkpoint, the latest of a directory, or an export.

    Args:
        flag: before the path in a message.
        remedy: what a user does who meant to have a checkpoint there.

    Raises:
        CheckpointError: it stands for none.
    """
    name = f"{flag}{path}"
    try:
        is_file = path.exists() and not path.is_dir()
    except OSError as error:  # a name that is too long, for one
        raise CheckpointError(f"{flag}{str(path)[:200]}: cannot be read ({error.strerror}); {remedy}") from None
    if is_file:
        raise CheckpointError(f"{name}: is a file, not a directory of checkpoints; name the directory")
    if is_export(path) or (path / files.DESCRIPTION_FILE).is_file():
        return path
    tags, latest = files.newest_first(path), files.read_latest(path)
    if latest in tags:
        return path / latest
    if tags:
        state = "has no file latest" if latest is None else f"latest names {latest}, but there is no such directory"
        others = f"; the others are {', '.join(tags[1:])}" if tags[1:] else ""
        raise CheckpointError(f"{name}: {state}; name one of its checkpoints, e.g. {flag}{path / tags[0]}{others}")
    reason = " (no such directory)" if not path.exists() else "" if any(path.iterdir()) else " (it is empty)"
    raise CheckpointError(f"{name} is neither a checkpoint nor a directory of them nor an export{reason}; {remedy}")


def check_save(save: Path, start: Path | None, auto_resume: bool) -> None:
    """A run writes over checkpoints only of the run that it goes on from. One rank calls it.

    Args:
        start: the checkpoint that the run starts from.

    Raises:
        CheckpointError: `save` has others.
    """
    tags = files.newest_first(save)
    if not tags or auto_resume:
        return
    if start is None or start.resolve().parent != save.resolve():
        some = tags[0] + ", …" * bool(tags[1:])
        raise CheckpointError(
            f"--save {save}: holds checkpoints of another run ({some}), "
            "which this one would write over; go on from them with --auto-resume, or choose another "
            "directory"
        )
    if newer := tags[: tags.index(start.name)] if start.name in tags else []:
        logger.warning(
            "--load %s: %s also holds newer checkpoints (%s), from which --auto-resume would go on; move "
            "them elsewhere if they are not wanted any more",
            start,
            save,
            ", ".join(newer),
        )
