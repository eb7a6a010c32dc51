"""Tensors of safetensors files that are read when they are asked for, whole or some rows of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe_ds.checkpoint.files import inside
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.errors import CheckpointError, reason_of

SINGLE_FILE = "model.safetensors"


class LazyTensor:
    """A tensor of a file, as transformers' loader takes it: `[...]` reads it.

    Args:
        rows: which rows of dimension 0; None: all.
    """

    def __init__(self, file: Path, name: str, rows: slice | None = None) -> None:
        self.file, self.name, self.rows = file, name, rows

    def __getitem__(self, index: Any) -> Tensor:
        try:
            found = _opened(self.file).get_slice(self.name)
            # A copy: a view would keep the whole file mapped.
            tensor: Tensor = (found[:] if self.rows is None else found[self.rows])[index].clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.file}: {self.name} cannot be read ({reason_of(error)}); copy the file again"
            ) from None
        return tensor

    def get_shape(self) -> list[int]:
        shape: list[int] = _opened(self.file).get_slice(self.name).get_shape()
        return shape if self.rows is None else [len(range(*self.rows.indices(shape[0]))), *shape[1:]]

    def get_dtype(self) -> str:
        return str(_opened(self.file).get_slice(self.name).get_dtype())


@lru_cache(maxsize=1)
def _opened(file: Path) -> Any:
    """One at a time: pages of a mapped file count as the process's memory."""
    return safe_open(file, framework="pt")


def close() -> None:
    """Unmaps the files."""
    _opened.cache_clear()


def tensors_in(directory: Path) -> dict[str, LazyTensor]:
    """All tensors of a Hugging Face directory by their names in the files.

    Raises:
        CheckpointError: no safetensors, an index that names missing files, or a file that cannot be read.
    """
    found = {}
    for file in _files_of(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                found.update({name: LazyTensor(file, name) for name in opened.keys()})  # noqa: SIM118  # not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({reason_of(error)}); copy the file again") from None
    return found


def _files_of(directory: Path) -> list[Path]:
    if (directory / INDEX_FILE).is_file():
        try:
            names = set(json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{directory / INDEX_FILE} is damaged ({type(error).__name__}); copy it again"
            ) from None
        return [inside(directory, name, INDEX_FILE) for name in sorted(names, key=str)]
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{directory}: its weights are pickles ({pickles[0]}), of which no part can be read alone; save them as "
            "safetensors by transformers' from_pretrained and save_pretrained"
        )
    raise CheckpointError(f"{directory}: holds no {SINGLE_FILE} and no {INDEX_FILE}; name a directory of weights")
