#!/usr/bin/env python3
"""Turn text into Megatron's indexed datasets, with the flags of Megatron's tool of the same name.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --workers 8

writes data/corpus_text_document.bin and .idx; pass data/corpus_text_document to --data-path.
The output does not depend on --workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, not installed

from scmoe_ds.data.errors import DataError
from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from scmoe_ds.flag_parser import FlagParser

_TEXT_SUFFIX = ".txt"
_DIRECTORY_SUFFIXES = (".jsonl", ".json", _TEXT_SUFFIX)
_TEXT_KEY = "text"
_BLOCK_PER_WORKER = 512  # documents; bounds the memory, because Pool.imap reads its input without limit


@dataclass(frozen=True)
class Item:
    """One document still to be read: a line of a JSON file, or a whole text file (line 0)."""

    path: str
    line_number: int
    line: bytes


class Encoder:
    """One document to token ids per key. Lives once in each worker process."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = tuple(keys)
        self.append_eod = append_eod

    def encode(self, item: Item) -> dict[str, np.ndarray]:
        """Ids int32 [length] per key; length 0 for empty text. DataError names file and line."""
        texts = _read_text_file(item.path, self.keys) if item.line_number == 0 else _parse_line(item, self.keys)
        encoded = {}
        for key, text in texts.items():
            ids = self.tokenizer.tokenize(text)
            if ids and self.append_eod:
                ids.append(self.tokenizer.eod)
            encoded[key] = np.asarray(ids, dtype=np.int32)
        return encoded


_worker_encoder: Encoder | None = None  # set by the pool's initializer: a tokenizer is costly to send


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; 0 on success, 1 after an error that the user can mend."""
    args = parse_arguments(arguments)
    try:
        _check_output(args.output_prefix)
        paths = list_inputs(args.input)
        convert(paths, args)
    except (DataError, ImportError, OSError) as error:  # OSError: the disk is full, say
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Megatron's flags; exits with status 2 on an unknown one."""
    parser = FlagParser(
        prog="preprocess_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="JSONL files, .txt files (one document each), or directories of .jsonl, .json and .txt files",
    )
    source.add_argument("--json-keys", nargs="+", default=[_TEXT_KEY], help="one dataset is written per key")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--tokenizer-model", help="local directory, for HuggingFaceTokenizer")
    tokenizer.add_argument("--vocab-file", help="local vocab.json, for GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="local merges.txt, for GPT2BPETokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the eod token")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="path without _<key>_document and extension")
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="accepted; the only format")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=_positive, default=1, help="processes that tokenize")
    runtime.add_argument("--log-interval", type=_positive, default=1000, help="documents between updates")
    return parser.parse_args(arguments)


def list_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files of ``--input`` in the order given; those of a directory, at any depth, sorted by path."""
    paths: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _DIRECTORY_SUFFIXES)
            if not found:
                raise DataError(f"--input {name} holds no {', '.join(_DIRECTORY_SUFFIXES)} file.")
            paths.extend(found)
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"--input {name} does not exist. Check the path.")
    return paths


def convert(paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Tokenize ``paths`` and write one dataset per key, all of them or none."""
    # Both take long to import, and the pool's processes need neither.
    from tqdm import tqdm

    from scmoe_ds.data.corpus import IndexedDatasetWriter

    keys = list(dict.fromkeys(args.json_keys))
    tokenizer = build_tokenizer(
        args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
    )
    encoder = Encoder(tokenizer, keys, args.append_eod)
    num_empty = 0
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(f"{args.output_prefix}_{key}_document", tokenizer.vocab_size))
            for key in keys
        }
        documents = encode_all(read_items(paths), encoder, args.workers)
        for encoded in tqdm(documents, unit=" documents", miniters=args.log_interval, mininterval=0.5):
            for key, ids in encoded.items():
                if ids.size:
                    writers[key].add(ids)
                else:
                    num_empty += 1
        for key, writer in writers.items():
            if writer.num_documents == 0:  # checked before any writer commits
                raise DataError(f"the input holds no text under the key {key!r}: there is nothing to write.")
    for writer in writers.values():
        summary = writer.summary
        assert summary is not None
        size = f"{summary.num_documents} documents, {summary.num_tokens} {summary.dtype} tokens"
        print(f"{summary.prefix}: {size}")
    if num_empty:
        print(f"{num_empty} empty texts left out")


def read_items(paths: Iterable[Path]) -> Iterator[Item]:
    """Every document of every file, in order. Text files are left to the workers to read."""
    for path in paths:
        if path.suffix == _TEXT_SUFFIX:
            yield Item(str(path), 0, b"")
            continue
        try:
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield Item(str(path), number, line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error


def encode_all(items: Iterator[Item], encoder: Encoder, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Encode in input order, in this process or in ``workers`` others."""
    if workers == 1:
        yield from map(encoder.encode, items)
        return
    with multiprocessing.Pool(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        while block := list(islice(items, workers * _BLOCK_PER_WORKER)):
            yield from pool.imap(_encode_in_worker, block, chunksize=32)


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(item: Item) -> dict[str, np.ndarray]:
    assert _worker_encoder is not None
    return _worker_encoder.encode(item)


def _read_text_file(path: str, keys: Sequence[str]) -> dict[str, str]:
    if tuple(keys) != (_TEXT_KEY,):
        raise DataError(
            f"{path} is plain text, whose only key is {_TEXT_KEY!r}, but --json-keys asks for "
            f"{' '.join(keys)}. Leave --json-keys out, or convert the file to JSON lines."
        )
    try:
        return {_TEXT_KEY: Path(path).read_bytes().decode("utf-8")}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it, e.g. with iconv.") from error


def _parse_line(item: Item, keys: Sequence[str]) -> dict[str, str]:
    where = f"{item.path}, line {item.line_number}"
    try:
        record = json.loads(item.line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). Each line must be one JSON object; "
            "name plain text files .txt."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, but each line must be a JSON object.")
    texts = {}
    for key in keys:
        if key not in record:
            raise DataError(
                f"{where}: no key {key!r}; the line has {', '.join(map(repr, record)) or 'none'}. "
                "Name the keys that hold text with --json-keys."
            )
        text = record[key]
        if not isinstance(text, str):
            raise DataError(f"{where}: {key!r} is of type {type(text).__name__}, not a string.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key!r} has half of a surrogate pair at character {error.start}. Repair the escape sequence."
            ) from error
        texts[key] = text
    return texts


def _check_output(prefix: str) -> None:
    directory = Path(prefix).resolve().parent
    if not directory.is_dir():
        raise DataError(f"--output-prefix {prefix}: directory {directory} does not exist. Create it first.")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
