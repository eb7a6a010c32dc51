"""Says which checkpoint a directory means, and whether a run may write there."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from scmoe_ds.checkpoint import files
from scmoe_ds.checkpoint.safetensors_files import is_export
from scmoe_ds.errors import CheckpointError

logger = logging.getLogger("scmoe_ds")


def locate(path: Path, flag: str = "", remedy: str = "name one that a training run has saved") -> Path:
    """The directory of tensors that a path means: a checkpoint, the latest checkpoint of a directory, or an export.

    Args:
        flag: stands before the path in a message.
        remedy: what a user does when there is no checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    name = f"{flag}{path}"
    try:
        is_file = path.exists() and not path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{flag}{str(path)[:200]}: cannot be read ({error.strerror}); {remedy}") from None
    if is_file:
        raise CheckpointError(f"{name}: is a file, not a directory of checkpoints; name the directory")
    if is_export(path) or (path / files.DESCRIPTION_FILE).is_file():
        return path
    tags, latest = files.newest_first(path), read_latest(path)
    if latest in tags:
        return path / latest
    if tags:
        state = "has no file latest" if latest is None else f"latest names {latest}, but there is no such directory"
        others = f"; the others are {', '.join(tags[1:])}" if tags[1:] else ""
        raise CheckpointError(f"{name}: {state}; name one of its checkpoints, e.g. {flag}{path / tags[0]}{others}")
    raise CheckpointError(
        f"{name} is neither a checkpoint nor a directory of them nor an export{_looks(path)}; {remedy}"
    )


def _looks(path: Path) -> str:
    """What a directory seems to be instead, in parentheses."""
    if not path.exists():
        return " (no such directory)"
    if not any(path.iterdir()):
        return " (it is empty)"
    if (path / "latest_checkpointed_iteration.txt").exists():
        return " (it looks like a checkpoint of Megatron, which is not read)"
    if (path / "config.json").exists():
        return " (it looks like a Hugging Face model: docs/from_hugging_face.md says how to use one)"
    return ""


def read_latest(root: Path, flag: str = "--load") -> str | None:
    """The tag that `latest` names; None if there is no such file. Raises a CheckpointError if the file does not hold
    the name of a checkpoint in this directory."""
    latest = root / "latest"
    try:
        if not latest.is_symlink() and not latest.exists():
            return None
        if not latest.is_file():
            raise OSError(errno.EINVAL, "not a file")
        tag = latest.read_text(encoding="utf-8").strip()
        wrong = None if files.iteration_of(tag) is not None else "no checkpoint's name (global_step<iteration>)"
        if wrong is None and files.leads_out(root, tag):
            wrong = "a link that leads out of the directory"
        state = f"names {tag[:100]!r}, which is {wrong}" if tag else "is empty"
    except (OSError, ValueError) as error:
        tag, wrong = "", getattr(error, "strerror", None) or "not UTF-8"
        state = f"cannot be read ({wrong})"
    if wrong is not None:
        other = next(
            (f"a checkpoint itself: {root / found}" for found in files.newest_first(root)), "another directory"
        )
        raise CheckpointError(f"{flag} {root}: latest {state}; name {other}")
    return tag


def check_save(save: Path, start: Path | None, auto_resume: bool) -> None:
    """Refuses to overwrite the checkpoints of a run that this one does not continue. One rank calls it.

    Args:
        start: the checkpoint that the run starts from.

    Raises:
        CheckpointError: `save` has checkpoints of another run.
    """
    tags = files.newest_first(save)
    if not tags or auto_resume:
        return
    if start is None or start.resolve().parent != save.resolve():
        some = tags[0] + ", …" * bool(tags[1:])
        raise CheckpointError(
            f"--save {save}: holds checkpoints of another run ({some}), which this one would write over; go on from "
            "them with --auto-resume, or choose another directory"
        )
    if newer := tags[: tags.index(start.name)] if start.name in tags else []:
        logger.warning(
            "--load %s: %s also holds newer checkpoints (%s), from which --auto-resume would go on; move "
            "them elsewhere unless you need them",
            start,
            save,
            ", ".join(newer),
        )
