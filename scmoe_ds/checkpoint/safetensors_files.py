"""Reads and writes model weights as safetensors, as Hugging Face does: shards, an index, a config.json, no pickle."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe_ds.checkpoint import files
from scmoe_ds.checkpoint.files import DamagedCheckpointError, inside
from scmoe_ds.data.durable_files import file_entry, write_whole
from scmoe_ds.errors import CheckpointError, reason_of
from scmoe_ds.moe.router import CORRECTION_BIAS
from scmoe_ds.offload.pages import PAGE_BYTES, whole_pages

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"


def is_export(path: Path) -> bool:
    """Whether a directory holds what `write_weights` writes."""
    return os.path.isfile(path / INDEX_FILE)  # not Path's: that raises where a directory may not be read


class SafetensorsWeights:
    """The whole parameters of an export, read one at a time.

    Raises:
        DamagedCheckpointError: the index or a shard cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._shards = path, shards_of(path)

    def names(self) -> list[str]:
        return sorted(self._shards)

    def shape(self, name: str) -> list[int]:
        return list(self._from_shard(name, lambda file: file.get_slice(name).get_shape()))

    def read(self, name: str) -> Tensor:
        return self._from_shard(name, lambda file: file.get_tensor(name))

    def _from_shard(self, name: str, read: Callable[[Any], Any]) -> Any:
        shard = self._shards[name]
        try:
            with safe_open(shard, framework="pt") as file:
                return read(file)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(
                f"--load {self.path}: {name} cannot be read from {shard.name} ({reason_of(error)}); export it again"
            ) from None


def shards_of(path: Path) -> dict[str, Path]:
    """Each parameter of an export to the file that holds it. Raises a DamagedCheckpointError if the index is damaged,
    or names files that lie elsewhere or are not in the manifest."""
    found = files.read_json(path / INDEX_FILE, "--load").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DamagedCheckpointError(
            f'--load {path}: {INDEX_FILE} has no "weight_map", an object of names and files; export it again'
        )
    manifest, places = files.read_manifest(path, "--load"), {}
    for shard in {str(shard): shard for shard in found.values()}.values():
        places[shard] = inside(path, shard, INDEX_FILE)
        files.require_named(shard, path, manifest, "--load")
    return {name: places[shard] for name, shard in found.items()}


def write_weights(
    out: Path,
    weights: Iterable[tuple[str, Callable[[], Tensor]]],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    shard_bytes: int,
    carried: Mapping[str, bytes] | None = None,
) -> int:
    """Writes a directory that `--load` accepts, with one shard in memory at a time.

    Args:
        out: a directory that is empty or does not exist.
        weights: global name and reader of each parameter.
        config: "model", "gpt" and "scmoe" of `describe`.
        shard_bytes: most bytes of a shard; a larger parameter gets its own.
        carried: names and contents of further files, such as the tokenizer's.

    Returns:
        the number of shards.

    Raises:
        CheckpointError: `out` is not empty or cannot be written.
    """
    written = [f"shard_*{files.PART}", "model-*-of-*.safetensors", CONFIG_FILE, INDEX_FILE, *(carried or {})]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise CheckpointError(f"{out} is not empty; name another directory for the export")
        with _removed_on_failure(out, written):
            return _write_directory(out, weights, config, dtype, shard_bytes, carried or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out}: the export was not written ({reason_of(error)}); make room or choose another directory"
        ) from error


@contextmanager
def _removed_on_failure(directory: Path, patterns: Sequence[str]) -> Iterator[None]:
    """The next try finds an empty directory, also after Ctrl-C."""
    try:
        yield
    except BaseException:
        for file in [file for pattern in patterns for file in directory.glob(pattern)]:
            with suppress(OSError):  # the disk's own failure is told
                file.unlink()
        raise


def _write_directory(
    out: Path,
    weights: Iterable[tuple[str, Callable[[], Tensor]]],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    shard_bytes: int,
    carried: Mapping[str, bytes],
) -> int:
    shards, total_bytes = _write_shards(out, weights, dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part.rename(out / final)
        weight_map |= dict.fromkeys(names, final)
    whole = {**config, "format": "scmoe_ds", "torch_dtype": str(dtype).removeprefix("torch.")}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    for name, content in ((CONFIG_FILE, whole), (INDEX_FILE, index)):
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, octets in carried.items():
        (out / name).write_bytes(octets)
    manifest = {file.name: file_entry(file) for file in sorted(out.iterdir())}
    write_whole(out / files.MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    return len(shards)


def _write_shards(
    out: Path, weights: Iterable[tuple[str, Callable[[], Tensor]]], dtype: torch.dtype, shard_bytes: int
) -> tuple[list[tuple[Path, list[str]]], int]:
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        if held:
            part = out / f"shard_{len(shards):05d}{files.PART}"
            _save_from_pages(held, part)
            shards.append((part, list(held)))
            held.clear()

    for name, read in weights:
        # A router's bias moves in small steps, which bf16 would lose.
        tensor = read().to(torch.float32 if name.endswith(f".{CORRECTION_BIAS}") else dtype).contiguous()
        if sum(each.nbytes for each in held.values()) + tensor.nbytes > shard_bytes:
            close()
        held[name] = tensor
        total += tensor.nbytes
    close()
    return shards, total


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _save_from_pages(tensors: Mapping[str, Tensor], out: Path) -> None:
    """A safetensors file whose data begin at a page, and so do all tensors of whole pages: these come first, by name,
    so that an expert lies in one run and is read straight into its memory. safetensors' own writer orders by dtype."""
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % PAGE_BYTES > 0, -tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text = text.ljust(whole_pages(8 + len(text)) - 8)  # the format allows spaces here, and no gap between tensors
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
