"""Where the parameters of an export lie in its files, for readers that fetch single ones past the page cache."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from scmoe_ds.checkpoint.safetensors_files import is_export, shards_of
from scmoe_ds.errors import CheckpointError
from scmoe_ds.offload.files import ExpertFileError, Extent

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EXPORT_AGAIN = "Export the checkpoint again, into another directory"


def extents_of(path: Path, names: Sequence[str]) -> dict[str, Extent]:
    """Where parameters lie in the files of an export.

    Raises:
        CheckpointError: not an export, or one without one of the names.
        ExpertFileError: a file that is missing or not what it should be.
    """
    if not is_export(path):
        raise CheckpointError(
            f"--load {path}: experts can only be read from files of an export; make one with "
            f"scmoe convert export {path} OUT"
        )
    shards, found, sought = shards_of(path), {}, set(names)
    for file in sorted({shards[name] for name in names if name in shards}):
        try:
            with safe_open(file, framework="pt"):  # checks the header: sizes, types, and offsets that fill the file
                pass
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
        except (OSError, ValueError, SafetensorError, struct.error) as error:
            raise ExpertFileError(f"{file} is no readable safetensors file ({error}). {EXPORT_AGAIN}") from None
        for name in sought & header.keys():
            first, end = header[name]["data_offsets"]
            dtype = _DTYPES.get(header[name]["dtype"])
            if dtype is None:
                raise ExpertFileError(
                    f"{file}: {name} is of type {header[name]['dtype']}, not {', '.join(_DTYPES)}. {EXPORT_AGAIN}"
                )
            found[name] = Extent(file, 8 + length + first, end - first, dtype)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise CheckpointError(f"--load {path} has no {missing[0]} (and {len(missing) - 1} other experts' parameters)")
    return found
