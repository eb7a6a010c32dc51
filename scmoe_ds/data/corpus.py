"""The documents of a corpus: from files and directories to single documents, in order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scmoe_ds.data import reader
from scmoe_ds.errors import DataError

MOST_NAMED = 10
"""Of files, documents or names that one line lists."""
_LARGE_BYTES = 64 << 20
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """One document still to be read: a line of a JSON file, or a whole text file (line 0)."""

    path: str
    line_number: int
    line: bytes


@dataclass(frozen=True)
class Corpus:
    """Files in order, and how to read them.

    Attributes:
        paths: of ``--input``; those of a directory, at any depth, sorted by path.
        endings: names that end so are text files, too, besides .txt (``--text-endings``).
        say: gets a line about what was left out.
    """

    paths: tuple[Path, ...]
    endings: tuple[str, ...]
    say: Say

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(path.stat().st_size for path in self.paths)

    def is_text(self, path: Path) -> bool:
        """Whether a file is one document."""
        return reader.is_text(path, self.endings)

    def items(self, read: Callable[[int], object]) -> Iterator[Item]:
        """Every document of every file. Text files are left to the workers to read.

        Args:
            read: gets the number of bytes on disk of each part that was read.
        """
        for path in self.paths:
            left = path.stat().st_size
            if self.is_text(path):
                if left > _LARGE_BYTES:
                    self.say(_about_large(path, left))
                yield Item(str(path), 0, b"")
            else:
                is_plain, has_lines = not reader.is_compressed(path), False
                for number, line in reader.read_lines(path):
                    if is_plain:
                        read(len(line))
                        left -= len(line)
                    if line.strip():
                        has_lines = True
                        yield Item(str(path), number, line)
                if not has_lines:  # a copy that never began, perhaps
                    self.say(f"{path} is empty")
            read(left)


def open_corpus(inputs: Sequence[str], endings: Sequence[str], say: Say) -> Corpus:
    """The corpus that ``--input`` names.

    Raises:
        DataError: a file that is absent or is no text, a directory without texts or that cannot be read.
    """
    endings = tuple(f".{ending.lstrip('.').lower()}" for ending in endings)
    paths: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = reader.find_files(path, endings)
            if found.left_out:
                say(f"{len(found.left_out)} file(s) of --input {name} left out: {first(found.left_out)}")
            if not found.files:
                raise DataError(
                    f"--input {name} holds no {', '.join((*reader.ENDINGS, *endings))} file. Name the endings of "
                    "other text files with --text-endings."
                )
            paths.extend(found.files)
        elif path.exists():
            _refuse_by_name(path)
            paths.append(path)
        else:
            raise DataError(f"--input {name} does not exist. Check the path.")
    return Corpus(tuple(paths), endings, say)


def first(names: Sequence[str]) -> str:
    """The first names of a long list."""
    return ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")


@contextmanager
def progress(corpus: Corpus) -> Iterator[Callable[[int], object]]:
    """A function that is told how many bytes were read, and shows how far that is: tqdm's bar with the time left where
    stderr is a terminal; elsewhere a line at each tenth of a large corpus."""
    total = corpus.num_bytes
    if sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5) as bar:
            yield bar.update
        return
    done = tenths = 0

    def read(num_bytes: int) -> None:
        nonlocal done, tenths
        done += num_bytes
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            corpus.say(f"{10 * tenths} % of {total / 1e6:.0f} MB read")

    yield read if total > _LARGE_BYTES else lambda _: None


def _about_large(path: Path, num_bytes: int) -> str:
    return (
        f"{path} is one document of {num_bytes >> 20} MiB: a Hugging Face tokenizer needs about 150 times as much "
        "memory. Write its parts as JSON lines if they are documents of their own."
    )


def _refuse_by_name(path: Path) -> None:
    """Files that people have and that hold no lines of JSON: the remedy is another than for a damaged line."""
    name = path.name.lower()
    if name.endswith(_TABLES):
        raise DataError(
            f"--input {path} is a table. Write it as JSON lines, e.g. with pandas: "
            "frame.to_json('corpus.jsonl', orient='records', lines=True)."
        )
    if name.endswith(_ARCHIVES) or ".tar." in name:
        raise DataError(f"--input {path} is an archive. Unpack it and give the directory.")
