"""A cache of arrays on disk. Files are written whole and checked when they are read; damaged entries are made again.

An entry is one .npy file per array and `<name>-description.txt`, a JSON object with the arrays' source and the size and
CRC-32 of each file. The description is written last. Concurrent jobs write the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scmoe_ds.data.durable_files import file_entry, replaced, try_to_write, write_whole
from scmoe_ds.errors import DataError

logger = logging.getLogger("scmoe_ds")

Arrays = tuple[np.ndarray, ...]


class IndexCache:
    """One entry.

    Args:
        directory: shared by all nodes; made when an entry is written.
        name: of the entry; the start of its files' names.
        array_names: the ends of the arrays' file names, without .npy.
        description: the arrays' source. An entry with another description is not used.
    """

    def __init__(self, directory: str, name: str, array_names: tuple[str, ...], description: str) -> None:
        self.directory, self.name, self.description = Path(directory), name, description
        self._files = [self.directory / f"{name}-{each}.npy" for each in array_names]
        self._record = self.directory / f"{name}-description.txt"

    def load(self) -> Arrays | None:
        """The arrays, memory-mapped; None if there is no entry, or if it is damaged or incomplete."""
        return self._load()[0]

    def load_or_build(self, build: Callable[[], Arrays]) -> Arrays:
        """The arrays of the entry. If there is none, ``build`` makes the arrays, and they become the entry. Raises a
        DataError if the directory cannot be written, or is full."""
        found, damage = self._load()
        if found is not None:
            return found
        if damage is not None:
            logger.warning(f"sample index {self._record}: {damage}; made anew")
        with self._explained():  # before the work, not after it
            self.directory.mkdir(parents=True, exist_ok=True)
            try_to_write(self.directory)
        built = build()
        with self._explained():
            self._save(built)
        return built

    def _load(self) -> tuple[Arrays | None, str | None]:
        """The arrays, or what is wrong with the files."""
        if not any(path.exists() for path in (self._record, *self._files)):
            return None, None
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if record["description"] != self.description:
                return None, "it is of other data or settings"
            for path in self._files:
                if record["files"][path.name] != file_entry(path):
                    return None, f"{path.name} is not what was written"
            return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in self._files), None
        except FileNotFoundError as error:
            return None, f"{os.path.basename(error.filename)} is missing"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            return None, f"damaged ({type(error).__name__})"

    def _save(self, arrays: Arrays) -> None:
        files = {}
        for path, array in zip(self._files, arrays, strict=True):
            with replaced(path) as staged:
                with staged.open("wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                files[path.name] = file_entry(staged)
        write_whole(self._record, json.dumps({"description": self.description, "files": files}, indent=1) + "\n")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            no_room = f"there is no room ({error})"  # NumPy's message gives no reason
            raise DataError(
                f"cannot write the index cache in {self.directory}: {error.strerror or no_room}. Set --data-cache-path "
                "to a writable directory that has room and that all nodes share."
            ) from error
