"""Turn text into Megatron's indexed datasets, with the flags of Megatron's tool of the same name.

    scmoe preprocess --input corpus.jsonl --output-prefix data/corpus --append-eod \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --workers 8

writes data/corpus_text_document.bin and .idx; pass data/corpus_text_document to --data-path.
The output does not depend on --workers.
"""

from __future__ import annotations

import argparse
import glob
import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scmoe_ds.data import reader
from scmoe_ds.data.reader import BadDocumentError
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.data.worker_processes import SIGNALS, map_in_order
from scmoe_ds.errors import DataError
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.tokenizer import add_tokenizer, tokenizer_of

_TEXT_KEY = "text"
_NAMED = 10  # of bad documents, and of files left out
_PROGRAM = "scmoe preprocess"

Encoded = dict[str, np.ndarray]


class Ended(BaseException):
    """A signal asks for the end. No Exception: nothing may take it for an error of its own."""


@dataclass(frozen=True)
class Item:
    """One document still to be read: a line of a JSON file, or a whole text file (line 0)."""

    path: str
    line_number: int
    line: bytes


class Encoder:
    """One document to token ids per key. Each worker process has one."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = tuple(keys)
        self.append_eod = append_eod

    def encode(self, item: Item) -> dict[str, np.ndarray]:
        """Ids int32 [length] per key; length 0 for empty text. DataError names file and line."""
        if item.line_number == 0:
            texts = {_TEXT_KEY: reader.read_document(item.path)}
        else:
            texts = reader.parse_line(item.path, item.line_number, item.line, self.keys)
        encoded = {}
        for key, text in texts.items():
            ids = self.tokenizer.tokenize(text)
            if ids and self.append_eod:
                ids.append(self.tokenizer.eod)
            encoded[key] = np.asarray(ids, dtype=np.int32)
        return encoded


@dataclass
class Skipped:
    """Bad documents that --skip-bad leaves out: how many, and what is wrong with the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: BadDocumentError) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; 0 on success, 1 after an error, 128 + its number after a signal."""
    args = parse_arguments(arguments)
    try:
        with _signals_end_the_run():
            _check_output(args.output_prefix)
            paths = list_inputs(args.input)
            _check_keys(paths, args.json_keys)
            convert(paths, args)
    except (DataError, ImportError, OSError) as error:  # OSError: the disk is full, say
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except Ended as ended:
        number = signal.Signals(ended.args[0])
        print(f"{_PROGRAM}: ended by {number.name}", file=sys.stderr)
        return 128 + number
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Megatron's flags; exits with status 2 on an unknown one."""
    parser = FlagParser(
        prog="scmoe preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="JSONL files, .txt files (one document each), or directories of .jsonl, .json and .txt files; "
        "plain, or compressed with gzip, zstd, bzip2 or xz",
    )
    source.add_argument("--json-keys", nargs="+", default=[_TEXT_KEY], help="one dataset is written per key")
    source.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out documents that cannot be read, count them and name the first ten; for crawled text where some "
        "are known to be broken (default: stop at the first)",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    add_tokenizer(tokenizer)
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
            found = reader.find_files(path)
            if found.left_out:
                _say(f"{len(found.left_out)} file(s) of --input {name} left out: {_first(found.left_out)}")
            if not found.files:
                raise DataError(f"--input {name} holds no {', '.join(reader.ENDINGS)} file.")
            paths.extend(found.files)
        elif path.exists():
            paths.append(path)
        else:
            raise DataError(f"--input {name} does not exist. Check the path.")
    return paths


def convert(paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Tokenize ``paths`` and write one dataset per key, all of them or none."""
    # Both take long to import, and the pool's processes need neither.
    from tqdm import tqdm

    from scmoe_ds.data.indexed_writer import IndexedDatasetWriter

    keys = list(dict.fromkeys(args.json_keys))
    tokenizer = tokenizer_of(args)
    encoder = Encoder(tokenizer, keys, args.append_eod)
    num_empty, skipped = 0, Skipped()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(f"{args.output_prefix}_{key}_document", tokenizer.vocab_size))
            for key in keys
        }
        documents = stack.enter_context(closing(encode_all(read_items(paths), encoder, args.workers)))
        for encoded in tqdm(documents, unit=" documents", miniters=args.log_interval, mininterval=0.5):
            if isinstance(encoded, BadDocumentError) and args.skip_bad:
                skipped.add(encoded)
                continue
            if isinstance(encoded, Exception):
                raise encoded
            for key, ids in encoded.items():
                if ids.size:
                    writers[key].add(ids)
                else:
                    num_empty += 1
        _report_skipped(skipped)
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
        if reader.is_text(path):
            yield Item(str(path), 0, b"")
            continue
        has_lines = False
        for number, line in reader.read_lines(path):
            if line.strip():
                has_lines = True
                yield Item(str(path), number, line)
        if not has_lines:  # a copy that never began, perhaps
            _say(f"{path} is empty")


def encode_all(items: Iterator[Item], encoder: Encoder, workers: int) -> Generator[Encoded | Exception, None, None]:
    """Encode in input order, in this process or in ``workers`` others; what went wrong with a document takes its place.

    Raises:
        DataError: a worker was killed.
    """
    return map_in_order(encoder.encode, items, workers, lambda item: len(item.line) or os.path.getsize(item.path))


@contextmanager
def _signals_end_the_run() -> Iterator[None]:
    """Lets half-written files be removed; a second signal does not disturb that."""

    def end(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_skipped(skipped: Skipped) -> None:
    if skipped.count:
        _say(f"{skipped.count} bad document(s) left out (--skip-bad); the first:")
        for error in skipped.first:
            print(f"  {error}", file=sys.stderr)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _say(text: str) -> None:
    print(f"{_PROGRAM}: {text}", file=sys.stderr)


def _check_keys(paths: Sequence[Path], keys: Sequence[str]) -> None:
    texts = [path for path in paths if reader.is_text(path)]
    if texts and set(keys) != {_TEXT_KEY}:
        raise DataError(
            f"{texts[0]} is plain text, whose only key is {_TEXT_KEY!r}, but --json-keys asks for "
            f"{' '.join(keys)}. Leave --json-keys out, or convert the file to JSON lines."
        )


def _check_output(prefix: str) -> None:
    directory = Path(prefix).resolve().parent
    if not directory.is_dir():
        raise DataError(f"--output-prefix {prefix}: directory {directory} does not exist. Create it first.")
    left = sorted(map(str, directory.glob(f"{glob.escape(Path(prefix).name)}_*_document.*.tmp.*")))
    if left:  # of a run on another machine, perhaps: not for us to remove
        _say(f"half-written files of a run that was killed, or is still at work: {_first(left)}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
