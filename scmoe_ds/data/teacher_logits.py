"""A directory of what a teacher says of training samples: for every token its best next tokens, and the rest's mass.

    manifest.json                     what was taught by whom: fingerprints that a later run compares, one by one
    samples-000000064.safetensors     of 64 samples from number 64 on
        ids [64, S, N] int32, log_p [64, S, N] fp16, log_rest [64, S] fp32, checksum [64] int64 of the sample's tokens

A file appears whole, under its name, or not at all. A job that was stopped therefore goes on with the files that are
missing, on any number of ranks. Samples have the numbers of the run that trains on them (data/sampler.py).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scmoe_ds.data.durable_files import flush, replaced, write_whole
from scmoe_ds.errors import DataError, reason_of

MANIFEST_FILE = "manifest.json"
FORMAT = "scmoe_ds teacher logits, 1"
LEAST_SAMPLES_OF_FILE = 64
NAMES = ("ids", "log_p", "log_rest")


class TeacherLogits:
    """One directory.

    Args:
        directory: exists and has a manifest, see `open_directory`.
        flag: who names it, for errors.
        samples_of_file: as the manifest says.
    """

    def __init__(self, directory: Path, flag: str, samples_of_file: int) -> None:
        self.directory, self.flag, self.samples_of_file = directory, flag, samples_of_file

    def missing(self, samples: int) -> list[range]:
        """The numbers of the samples of each file that is still to be written, for samples 0 … `samples` - 1."""
        size = self.samples_of_file
        files = [range(first, min(first + size, samples)) for first in range(0, samples, size)]
        return [numbers for numbers in files if self._count(numbers[0]) < len(numbers)]

    def _count(self, first: int) -> int:
        """Samples of a file; 0: it is not there. The last one of a shorter run has fewer."""
        path = self._path(first)
        if not path.is_file():
            return 0
        with self._reading(path) as file:
            return int(file.get_slice("checksum").get_shape()[0])

    def write(self, numbers: range, tokens: Tensor, of_teacher: Sequence[Tensor]) -> None:
        """Writes one file.

        Args:
            numbers: of the samples.
            tokens: [B, S] what the teacher has read.
            of_teacher: ids [B, S, N], log-probabilities [B, S, N] and that of the rest [B, S].

        Raises:
            DataError: no room, or no permission.
        """
        dtypes = (torch.int32, torch.float16, torch.float32)
        tensors = {
            name: each.to("cpu", dtype).contiguous()
            for name, each, dtype in zip(NAMES, of_teacher, dtypes, strict=True)
        }
        tensors["checksum"] = torch.tensor([checksum(sample) for sample in tokens])
        path = self._path(numbers[0])
        try:
            with replaced(path) as staged:
                save_file(tensors, staged)
                flush(staged)
            flush(path.parent)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.flag} {self.directory}: {path.name} cannot be written ({reason_of(error)}); make room or name "
                "another directory"
            ) from None

    def read(self, samples: range, tokens: Tensor) -> list[Tensor]:
        """What `write` was given of some samples.

        Args:
            tokens: [B, S] of the same samples, which the teacher must have read.

        Raises:
            DataError: a file that is missing or damaged, or other samples.
        """
        parts = [self._read_from(first, numbers) for first, numbers in self._by_file(samples)]
        *of_teacher, checksums = (torch.cat(each) for each in zip(*parts, strict=True))
        for number, sample, known in zip(samples, tokens, checksums.tolist(), strict=True):
            if checksum(sample) != known:
                raise DataError(
                    f"{self.flag} {self.directory}: the teacher has read other tokens as training sample {number}; "
                    "name another directory, or train on the same data with the same --seed and --train-iters"
                )
        return of_teacher

    def _by_file(self, samples: range) -> Iterator[tuple[int, range]]:
        """First sample of each file that has some of these, and which."""
        size = self.samples_of_file
        for first in range(samples[0] // size * size, samples[-1] + 1, size):
            yield first, range(max(samples[0], first), min(samples[-1] + 1, first + size))

    def _read_from(self, first: int, numbers: range) -> list[Tensor]:
        rows = slice(numbers[0] - first, numbers[-1] + 1 - first)
        with self._reading(self._path(first)) as file:
            return [file.get_slice(name)[rows] for name in (*NAMES, "checksum")]

    @contextmanager
    def _reading(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.flag} {self.directory}: {path.name} cannot be read ({reason_of(error)}); remove it, and the "
                "next start computes it again"
            ) from None

    def _path(self, first: int) -> Path:
        return self.directory / f"samples-{first:09d}.safetensors"


def open_directory(directory: Path, flag: str, made_of: Mapping[str, Any], micro_batch_size: int) -> TeacherLogits:
    """Checks the directory's manifest, or writes one into a directory that is new or empty. On one rank.

    Args:
        made_of: name of a property → its value here; JSON values.
        micro_batch_size: of the passes that may fill it. A file is of whole micro-batches.

    Raises:
        DataError: no directory of teacher's logits, or it was made of something else: names what differs.
    """
    path = directory / MANIFEST_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if others := sorted(each.name for each in directory.iterdir() if not each.name.endswith(".tmp")):
                raise DataError(
                    f"{flag} {directory}: holds {others[0]}, but no {MANIFEST_FILE}; name a new directory, or one of "
                    "an earlier run"
                )
            size = -(-LEAST_SAMPLES_OF_FILE // micro_batch_size) * micro_batch_size
            found = {"format": FORMAT, "samples_of_file": size, "made_of": dict(made_of)}
            write_whole(path, json.dumps(found, indent=1) + "\n")
        found = json.loads(path.read_text("utf-8"))
        _compare(directory, flag, found, made_of)
        return TeacherLogits(directory, flag, int(found["samples_of_file"]))
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{flag} {directory}: {MANIFEST_FILE} cannot be used ({reason_of(error)}); name another directory"
        ) from None


def _compare(directory: Path, flag: str, found: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
    if found["format"] != FORMAT:
        raise DataError(f"{flag} {directory}: of another version of this program; name another directory")
    for name, now in made_of.items():
        then = found["made_of"].get(name)
        if then != now:
            raise DataError(
                f"{flag} {directory}: made with {name} {then}, but this run has {now}; name another directory, or set "
                "what the other run had"
            )


def checksum(sample: Tensor) -> int:
    """CRC-32 of a sample's tokens, [S] int64."""
    return zlib.crc32(sample.to("cpu", torch.int64).contiguous().numpy().tobytes())


def bytes_of(samples: int, seq_length: int, best: int) -> int:
    """On disk, of all files of some samples."""
    return samples * (seq_length * (6 * best + 4) + 8)
