"""The files of a checkpoint: are they all there and as they were written, which is the newest, which can go.

A checkpoint is a directory `global_step<iteration>` with a manifest. It is written under another name and renamed when
all of it is on the disk, so a directory of that name is whole, whenever the machine stopped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TypedDict

import torch.distributed as dist

from scmoe_ds.parallel.agreement import run_together

logger = logging.getLogger("scmoe_ds")

DESCRIPTION_FILE = "scmoe.json"
MANIFEST_FILE = "scmoe_files.json"
PART = ".part"
"""Ends the name of what is still being written."""
_REMOVING = "removing-"
_BLOCK_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used, and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was written; an older one may still serve."""


class FileEntry(TypedDict):
    """What the manifest knows of a file."""

    bytes: int
    crc32: str


def checksum(path: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits; finds every flipped bit and runs at the speed of memory."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def entry(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def flush(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that, whenever the machine stops, it has its old content or its new one."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    flush(part)
    part.replace(path)
    flush(path.parent)


def read_json(path: Path, flag: str) -> dict:
    """A small JSON file of a checkpoint.

    Raises:
        DamagedCheckpointError: missing, unreadable or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedCheckpointError(
            f"{flag} {path.parent}: {path.name} cannot be read ({error.strerror}); the save was interrupted, or "
            f"this is no checkpoint of pretrain_gpt_scmoe.py. {remedy(path.parent, flag)}"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DamagedCheckpointError(
            f"{flag} {path.parent}: {path.name} is damaged (not JSON). {remedy(path.parent, flag)}"
        )
    return found


def remedy(directory: Path, flag: str = "--load") -> str:
    """What happens next, or what a user does, about a damaged checkpoint."""
    if flag == "--auto-resume":
        return "An earlier one is looked for"
    return f"Name an earlier checkpoint in {directory.parent}/latest, or resume with --auto-resume, which looks for one"


def read_manifest(directory: Path, flag: str) -> dict[str, FileEntry]:
    """Size and checksum of each file.

    Raises:
        DamagedCheckpointError: missing, unreadable, or of an earlier version, which knew sizes only.
    """
    manifest = read_json(directory / MANIFEST_FILE, flag)
    if not all(isinstance(expected, dict) for expected in manifest.values()):
        raise DamagedCheckpointError(f"{flag} {directory}: {MANIFEST_FILE} has no checksums; an earlier version of "
                                     f"scmoe_ds wrote it, or it is damaged. {remedy(directory, flag)}")  # fmt: skip
    return manifest


def read_description(directory: Path, name: str, flag: str) -> dict:
    """The checked content of a description; a directory without a manifest has none.

    Raises:
        DamagedCheckpointError: not all there, or not what was written.
    """
    manifest = read_manifest(directory, flag)
    description = read_json(directory / name, flag)
    _check_size(directory, name, manifest.get(name), flag)
    _check_content(directory, name, manifest[name], flag)
    return description


def verify(directory: Path, flag: str, contents: bool = True) -> None:
    """Compares the files with the manifest: sizes on every rank, checksums in shares. Collective.

    Args:
        contents: read all of them; otherwise only the sizes are compared.

    Raises:
        DamagedCheckpointError: on every rank, with the first damaged file that any of them found.
    """

    def verify_share() -> None:
        manifest = read_manifest(directory, flag)
        for name, expected in manifest.items():
            _check_size(directory, name, expected, flag)
        if not contents:
            return
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        by_size = sorted(manifest, key=lambda name: (-manifest[name]["bytes"], name))
        for name in by_size[rank::ranks]:
            _check_content(directory, name, manifest[name], flag)

    run_together(verify_share)


def _check_size(directory: Path, name: str, expected: FileEntry | None, flag: str) -> None:
    file = directory / name
    found = file.stat().st_size if file.is_file() else None
    if expected is None or found != expected["bytes"]:
        wanted = "no file of that name" if expected is None else expected["bytes"]
        state = "is missing" if found is None else f"has {found} bytes instead of {wanted}"
        raise DamagedCheckpointError(
            f"{flag} {directory}: {name} {state}; the checkpoint is damaged or incomplete. {remedy(directory, flag)}"
        )


def _check_content(directory: Path, name: str, expected: FileEntry, flag: str) -> None:
    try:
        found = checksum(directory / name)
    except OSError as error:
        raise DamagedCheckpointError(
            f"{flag} {directory}: {name} cannot be read ({error.strerror}). {remedy(directory, flag)}"
        ) from None
    if found != expected["crc32"]:
        raise DamagedCheckpointError(
            f"{flag} {directory}: {name} is damaged: its checksum is {found} instead of {expected['crc32']}. "
            f"{remedy(directory, flag)}"
        )


def iteration_of(tag: str) -> int | None:
    """The iteration of a checkpoint's directory name; None if it is not one."""
    match = re.fullmatch(r"global_step(\d+)", tag)
    return int(match[1]) if match else None


def newest_first(root: Path) -> list[str]:
    """All directories with the name of a checkpoint."""
    found = [child.name for child in root.iterdir() if child.is_dir()] if root.is_dir() else []
    return sorted((tag for tag in found if iteration_of(tag) is not None), key=iteration_of, reverse=True)  # type: ignore[arg-type]


def read_latest(root: Path) -> str | None:
    """The tag that `latest` names."""
    latest = root / "latest"
    return latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


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
    """Removes all but the `keep_last` newest whole checkpoints up to the one that `latest` names.

    A checkpoint is renamed before its files go: no half-removed one is ever taken for a whole one. Directories without
    a manifest and checkpoints newer than `latest` are not touched. A failure is logged; it is no reason to stop.
    """
    latest = read_latest(root)
    last = iteration_of(latest) if latest else None
    if last is None:
        return
    whole = [tag for tag in newest_first(root) if all((root / tag / name).is_file() for name in
                                                      (DESCRIPTION_FILE, MANIFEST_FILE))]  # fmt: skip
    older = [tag for tag in whole if (iteration_of(tag) or 0) <= last]
    for tag in older[keep_last:]:
        try:
            shutil.rmtree(_set_aside(root / tag))
        except OSError as error:
            logger.warning("--keep-last: %s was not removed (%s)", root / tag, error.strerror)


def _set_aside(directory: Path) -> Path:
    aside = directory.with_name(_REMOVING + directory.name)
    shutil.rmtree(aside, ignore_errors=True)
    return directory.rename(aside)
