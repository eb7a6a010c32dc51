"""Turns text into the data sets that training reads: a .bin of token ids and an .idx of document lengths, as Megatron's
tool of the same name writes them.

    scmoe preprocess --input texts/ --output-prefix data/corpus --append-eod

writes data/corpus_text_document.bin and .idx; training reads them with --data-path data/corpus_text_document.
docs/data.md has the whole way, with a tokenizer of your own.
"""

from __future__ import annotations

import argparse
import glob
import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scmoe_ds.data import reader
from scmoe_ds.data.corpus import MOST_NAMED, Corpus, Item, first, open_corpus, progress
from scmoe_ds.data.reader import BadDocumentError
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.data.worker_processes import SIGNALS, map_in_order
from scmoe_ds.errors import DataError, UserError, mistake_of_path
from scmoe_ds.programs.flags.preprocess import build_parser
from scmoe_ds.programs.flags.tokenizer import set_tokenizer_type, tokenizer_of

if TYPE_CHECKING:
    from scmoe_ds.data.indexed_writer import IndexedDatasetWriter

_TEXT_KEY = "text"
_SAMPLE_TOKENS = 40
_PROGRAM = "scmoe preprocess"

Encoded = dict[str, np.ndarray]


class Ended(BaseException):
    """A signal asks for the end. No Exception: nothing may take it for an error of its own."""


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
        if len(self.first) < MOST_NAMED:
            self.first.append(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; 0 on success, 2 after an error that a user can correct, 1 after another, 128 + its number after a
    signal."""
    args = build_parser().parse_args(arguments)
    try:
        with _signals_end_the_run():
            set_tokenizer_type(args)
            corpus = open_corpus(args.input, args.text_endings, _say)
            _check_keys(corpus, args.json_keys)
            _prepare_output(args.output_prefix)
            convert(corpus, args)
    except (UserError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        mistake = error if isinstance(error, UserError) else mistake_of_path(error)
        print(f"{_PROGRAM}: error: {mistake or error}", file=sys.stderr)
        return 1 if mistake is None else 2
    except Ended as ended:
        number = signal.Signals(ended.args[0])
        print(f"{_PROGRAM}: ended by {number.name}", file=sys.stderr)
        return 128 + number
    return 0


def convert(corpus: Corpus, args: argparse.Namespace) -> None:
    """Tokenizes the corpus and writes one data set per key, all of them or none."""
    from scmoe_ds.data.indexed_writer import IndexedDatasetWriter  # the pool's processes do not need its imports

    keys = list(dict.fromkeys(args.json_keys))
    tokenizer = tokenizer_of(args)
    encoder = Encoder(tokenizer, keys, args.append_eod)
    num_empty, skipped, samples = 0, Skipped(), dict[str, np.ndarray]()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(f"{args.output_prefix}_{key}_document", tokenizer.vocab_size))
            for key in keys
        }
        items = corpus.items(stack.enter_context(progress(corpus)))
        for encoded in stack.enter_context(closing(encode_all(items, encoder, args.workers))):
            if isinstance(encoded, BadDocumentError) and args.skip_bad:
                skipped.add(encoded)
                continue
            if isinstance(encoded, Exception):
                raise encoded
            for key, ids in encoded.items():
                if ids.size:
                    writers[key].add(ids)
                    samples.setdefault(key, ids[:_SAMPLE_TOKENS])
                else:
                    num_empty += 1
        _report_skipped(skipped)
        for key, writer in writers.items():
            if writer.num_documents == 0:  # checked before any writer commits
                raise DataError(f"the input holds no text under the key {key!r}: there is nothing to write.")
    if num_empty:
        print(f"{num_empty} empty texts left out")
    for key, writer in writers.items():
        _report_written(writer, tokenizer, args.append_eod, samples[key])


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


def _report_written(writer: IndexedDatasetWriter, tokenizer: Tokenizer, append_eod: bool, sample: np.ndarray) -> None:
    summary = writer.summary
    assert summary is not None
    print(
        f"{summary.prefix}: {summary.num_documents} documents, {summary.num_tokens} {summary.dtype} tokens of "
        f"{tokenizer.name} ({tokenizer.vocab_size} ids)"
    )
    if not append_eod and summary.num_documents > 1:
        print("no token marks where a document ends: --append-eod adds it")
    print(f"the first document begins: {tokenizer.detokenize(sample.tolist())!r}")


def _say(text: str) -> None:
    print(f"{_PROGRAM}: {text}", file=sys.stderr)


def _check_keys(corpus: Corpus, keys: Sequence[str]) -> None:
    texts = [path for path in corpus.paths if corpus.is_text(path)]
    if texts and set(keys) != {_TEXT_KEY}:
        raise DataError(
            f"{texts[0]} is plain text, whose only key is {_TEXT_KEY!r}, but --json-keys asks for "
            f"{' '.join(keys)}. Leave --json-keys out, or convert the file to JSON lines."
        )


def _prepare_output(prefix: str) -> None:
    directory = Path(prefix).resolve().parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output-prefix {prefix}: {directory} cannot be made ({error.strerror}).") from error
    left = sorted(map(str, directory.glob(f"{glob.escape(Path(prefix).name)}_*_document.*.tmp.*")))
    if left:  # of a run on another machine, perhaps: not for us to remove
        _say(f"half-written files of a run that was killed, or is still at work: {first(left)}")


if __name__ == "__main__":
    sys.exit(main())
