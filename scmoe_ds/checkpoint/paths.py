"""File names that were read from a file: they stay in its directory."""

from __future__ import annotations

from pathlib import Path

from scmoe_ds.checkpoint.files import DamagedCheckpointError


def inside(directory: Path, name: object, source: str) -> Path:
    """The file of a directory that another file in it names.

    Args:
        source: that file, for the message.

    Raises:
        DamagedCheckpointError: a name that leads elsewhere: a path, or a link that leaves the directory. Links into
            Hugging Face's cache are allowed, because downloaded directories consist of them.
    """
    plain = isinstance(name, str) and name.isprintable() and name not in ("", "..") and name == Path(name).name
    if not plain:
        raise DamagedCheckpointError(
            f"{directory}: {source} names {str(name)[:100]!r}, which is no file of this "
            "directory; only files beside it are read"
        )
    path = directory / str(name)
    home = directory.resolve()
    if path.is_symlink() and path.resolve().parent not in (home, home.parent.parent / "blobs"):
        raise DamagedCheckpointError(
            f"{directory}: {name}, which {source} names, is a link that leads out of the "
            "directory; copy the file there in its place"
        )
    return path
