"""The files of a checkpoint: whether they are complete and as they were written, and which checkpoint is the newest.

A checkpoint is a directory `global_step<iteration>` with a manifest. It is written under another name and renamed when
all of it is on the disk (`rotation`), so a directory of that name is whole, whenever the machine stopped. Anybody may
have damaged or forged the files that are read here: a wrong file is a `CheckpointError` that names it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from scmoe_ds.data.durable_files import FileEntry, checksum
from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.agreement import run_together

logger = logging.getLogger("scmoe_ds")

DESCRIPTION_FILE = "scmoe.json"
MANIFEST_FILE = "scmoe_files.json"
PART = ".part"
"""Ends the name of a file or directory that is still being written."""
_TAG = re.compile("global_step(0|[1-9][0-9]{0,17})")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not as it was written; an older one may still serve."""


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Reads a small JSON file of a checkpoint strictly: no NaN, no key twice. Raises a DamagedCheckpointError if it is
    missing, unreadable or not such a JSON object."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        other = "the save was interrupted, or this is no checkpoint of pretrain_gpt_scmoe.py"
        raise damaged(path.parent, f"{path.name} cannot be read ({error.strerror}); {other}", flag) from None
    except ValueError:
        text = ""
    try:
        found = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path.parent, f"{path.name} is damaged (not JSON)", flag)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def remedy(directory: Path, flag: str = "--load") -> str:
    """What happens next, or what a user can do, when a checkpoint (or export) is damaged."""
    if flag == "--auto-resume":
        return "An earlier one is looked for"
    root, own = directory.parent, iteration_of(directory.name)
    if own is None:
        return "Copy it again, or make it anew"
    earlier = next((tag for tag in newest_first(root) if (iteration_of(tag) or 0) < own), None)
    if earlier is None:
        return "There is no earlier one beside it"
    if flag != "--load":
        return f"Name an earlier one: {root / earlier}"
    return (
        f"Name an earlier one: --load {root / earlier}, or go on with --save {root} --auto-resume, which looks for one"
    )


def damaged(directory: Path, what: str, flag: str) -> DamagedCheckpointError:
    """The error for a damaged checkpoint, with its remedy."""
    return DamagedCheckpointError(f"{flag} {directory}: {what}. {remedy(directory, flag)}")


def read_manifest(directory: Path, flag: str) -> dict[str, FileEntry]:
    """Size and checksum of each file. Raises a DamagedCheckpointError if the manifest is missing, unreadable, or has
    other entries."""
    manifest = read_json(directory / MANIFEST_FILE, flag)
    wrong = next((name for name, found in manifest.items() if not _is_entry(name, found)), None)
    if wrong is not None or not manifest:
        entry = "" if wrong is None else f": its entry {wrong[:100]!r} is no file's name with a size and a checksum"
        raise damaged(directory, f"{MANIFEST_FILE} is damaged or of an earlier version{entry}", flag)
    return manifest


def _is_entry(name: str, found: Any) -> bool:
    return (
        Path(name).name == name != ".."
        and name.isprintable()
        and isinstance(found, dict)
        and found.keys() == FileEntry.__annotations__.keys()
        and type(found["bytes"]) is int
        and found["bytes"] >= 0
        and isinstance(found["crc32"], str)
        and re.fullmatch("[0-9a-f]{8}", found["crc32"]) is not None
    )


def read_description(directory: Path, name: str, flag: str) -> dict[str, Any]:
    """The content of a description whose checksum is right. Raises a DamagedCheckpointError if it or the manifest is
    missing, or it is not as it was written."""
    manifest = read_manifest(directory, flag)
    description = read_json(directory / name, flag)
    require_named(name, directory, manifest, flag)
    _check_size(directory, name, manifest[name], flag)
    _check_content(directory, name, manifest[name], flag)
    return description


def verify(directory: Path, flag: str, contents: bool = True) -> None:
    """Compares the files with the manifest. Every rank compares all sizes and a share of the checksums. Collective.

    Args:
        contents: whether to compare checksums too, which reads all files.

    Raises:
        DamagedCheckpointError: on every rank, with the first damaged file that any rank found.
    """

    def verify_share() -> None:
        manifest = read_manifest(directory, flag)
        with _readable(directory, "", flag):
            tensor_files = sorted(path.name for path in directory.iterdir() if path.suffix == ".pt")
        for name in tensor_files:
            require_named(name, directory, manifest, flag)
        for name, expected in manifest.items():
            _check_size(directory, name, expected, flag)
        if contents:
            for name in own_share(sorted(manifest, key=lambda name: (-manifest[name]["bytes"], name))):
                _check_content(directory, name, manifest[name], flag)

    run_together(verify_share)


def own_share(names: Sequence[str]) -> Sequence[str]:
    """The names that this rank looks at."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return names[rank::ranks]


@contextmanager
def _readable(directory: Path, name: str, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise damaged(directory, f"{name} cannot be read ({error.strerror})".strip(), flag) from None


def require_named(name: str, directory: Path, manifest: dict[str, FileEntry], flag: str) -> None:
    """Raises a DamagedCheckpointError if the manifest does not name the file."""
    if name not in manifest:
        raise damaged(
            directory, f"{name} is not named in {MANIFEST_FILE}, so nobody knows whether it is as it was written", flag
        )


def _check_size(directory: Path, name: str, expected: FileEntry, flag: str) -> None:
    file = directory / name
    with _readable(directory, name, flag):
        found = file.stat().st_size if file.is_file() else None
        # Hugging Face's cache links exports to a store. Nothing but mischief links .pt files elsewhere.
        outside = file.suffix == ".pt" and leads_out(directory, name)
    if found != expected["bytes"] or outside:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected['bytes']}"
        state = "is a link that leads out of the directory" if outside else state
        raise damaged(directory, f"{name} {state}; the checkpoint is damaged or incomplete", flag)


def _check_content(directory: Path, name: str, expected: FileEntry, flag: str) -> None:
    with _readable(directory, name, flag):
        found = checksum(directory / name)
    if found != expected["crc32"]:
        raise damaged(directory, f"{name} is damaged: its checksum is {found} instead of {expected['crc32']}", flag)


def iteration_of(tag: str) -> int | None:
    """The iteration of a checkpoint's directory name; None if it is not one."""
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None


def newest_first(root: Path) -> list[str]:
    """All directories with the name of a checkpoint, without links that lead elsewhere. Raises a CheckpointError if the
    directory cannot be read."""
    try:
        names = [child.name for child in root.iterdir() if child.is_dir()] if root.is_dir() else []
        found = [name for name in names if iteration_of(name) is not None]
        elsewhere = {name for name in found if leads_out(root, name)}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror}); correct its permissions") from None
    for name in sorted(elsewhere):
        logger.warning(
            "passed over: %s is a link that leads out of the directory; --load %s uses it",
            root / name,
            (root / name).resolve(),
        )
    # None is not among the keys: `found` leaves such names out.
    return sorted(set(found) - elsewhere, key=iteration_of, reverse=True)  # type: ignore[arg-type]


def inside(directory: Path, name: object, source: str) -> Path:
    """The path of a file that another file of the same directory names.

    Args:
        source: the file that names it, for the message.

    Raises:
        DamagedCheckpointError: the name is a path, or a link that leaves the directory. Links into Hugging Face's cache
            are allowed, because downloaded directories consist of them.
    """
    plain = isinstance(name, str) and name.isprintable() and name not in ("", "..") and name == Path(name).name
    if not plain:
        raise DamagedCheckpointError(
            f"{directory}: {source} names {str(name)[:100]!r}, which is no file of this directory; only files beside "
            "it are read"
        )
    path = directory / str(name)
    home = directory.resolve()
    if path.is_symlink() and path.resolve().parent not in (home, home.parent.parent / "blobs"):
        raise DamagedCheckpointError(
            f"{directory}: {name}, which {source} names, is a link that leads out of the directory; copy the file "
            "there in its place"
        )
    return path


def leads_out(root: Path, name: str) -> bool:
    """Whether a name in a directory is a link to somewhere else."""
    # Not Path.resolve, which raises a RuntimeError for a link to itself.
    return os.path.dirname(os.path.realpath(root / name)) != os.path.realpath(root)
