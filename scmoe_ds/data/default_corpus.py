"""A default corpus that every machine with Python already has: the sources of its standard library."""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scmoe_ds.data.durable_files import file_entry, write_whole
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.reader import read_document
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import DataError

# Installed packages, tests (more text than the library itself, much of it repeated), and two packages that are tables:
# code pages, and one 700 kB string literal of help topics.
_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
# An administrator's files, and the record of the build, which is full of the building machine's paths.
_SKIPPED_FILES = ("sitecustomize.py", "usercustomize.py", "_sysconfigdata")
_CORPUS_NAME = "python_stdlib"
_CORPUS_FORMAT = 1  # raise it when the choice, order or encoding of the documents changes
_SHUFFLE_SEED = 1234


def standard_library_documents() -> Iterator[tuple[str, str]]:
    """The running interpreter's own library sources as (path inside the library, text), sorted by path.

    About 10 MB in 600 files (CPython 3.11). Leaves out tests, installed packages, tables, files that a build or an
    administrator adds, links, and files that are empty or not UTF-8.

    Raises:
        DataError: the library is installed without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    found = False
    for name in names:
        path = root / name
        skipped = name.startswith(_SKIPPED_FILES) or _SKIPPED_DIRECTORIES & set(name.split("/")[:-1])
        if skipped or path.is_symlink():
            continue
        try:
            text = read_document(path)
        except (DataError, OSError):
            continue
        if text:
            found = True
            yield name, text
    if not found:
        raise DataError(
            f"{root} holds no .py files, so there is no default corpus: this Python comes without library sources. "
            "Give a dataset of your own with --data-path."
        )


def prepare_default_corpus(directory: str | os.PathLike[str]) -> str:
    """Writes the standard-library corpus with ``ByteTokenizer``, unless a current one is there.

    Creates ``directory`` if necessary, and in it ``python_stdlib.bin``, ``.idx`` and ``.json``. The last one records
    the source of the others. Concurrent processes write the same bytes and replace whole files, so none of them sees a
    half-written file.

    Returns:
        The path prefix ``<directory>/python_stdlib``.

    Raises:
        DataError: the directory cannot be written, or the interpreter has no library sources.
    """
    prefix = os.path.join(os.fspath(directory), _CORPUS_NAME)
    if _is_current(prefix):
        return prefix
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {directory} for the default corpus: {error.strerror}.") from error
    tokenizer = ByteTokenizer()
    texts = [text for _, text in standard_library_documents()]
    # GPTDataset's --split takes contiguous ranges of documents. In alphabetical order the test split would hold only
    # the last few modules (zipfile, zoneinfo), which differ from the rest.
    random.Random(_SHUFFLE_SEED).shuffle(texts)
    documents = ([*tokenizer.tokenize(text), tokenizer.eod] for text in texts)
    summary = write_indexed_dataset(prefix, documents, tokenizer.vocab_size)
    sizes = {key: value for key, value in asdict(summary).items() if key != "prefix"}
    record = json.dumps({**_corpus_identity(), **sizes, "files": _entries(prefix)}, indent=2)
    write_whole(Path(prefix + ".json"), record + "\n")
    return prefix


def _corpus_identity() -> dict[str, Any]:
    return {
        "format": _CORPUS_FORMAT,
        "python": sys.version,
        "tokenizer": ByteTokenizer.name,
        "shuffle_seed": _SHUFFLE_SEED,
    }


def _is_current(prefix: str) -> bool:
    """Whether the record beside the corpus matches this interpreter and the checksums of both files."""
    try:
        record = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        return {**record, **_corpus_identity(), "files": _entries(prefix)} == record
    except (OSError, ValueError, TypeError):
        return False


def _entries(prefix: str) -> dict[str, Any]:
    return {extension: file_entry(Path(prefix + extension)) for extension in (".bin", ".idx")}
