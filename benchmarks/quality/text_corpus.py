"""Tens of megabytes of real text that every machine with Python and this package's requirements already has.

    python -m benchmarks.quality.text_corpus --output data/text_corpus --megabytes 30 --vocab-size 4096

The running Python's library and the installed packages, their sources and documents, with a byte-level BPE trained on
the training part: text_corpus.bin/.idx (training documents first, then validation), vocab.json and merges.txt for
GPT2BPETokenizer, and corpus.json, which says what they were made of. Other versions of the packages are another
corpus, with another digest: losses on it can be compared within one digest only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from scmoe_ds.data.default_corpus import standard_library_documents
from scmoe_ds.data.durable_files import file_entry, write_whole
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.reader import read_document
from scmoe_ds.data.tokenizer import GPT2BPETokenizer
from scmoe_ds.errors import DataError

FORMAT = 1  # raise it when the choice, order or encoding of the documents changes
MARKER = "corpus.json"
SUFFIXES = (".py", ".rst", ".md", ".txt")
_SKIPPED_PARTS = re.compile(r"tests?|testing|idle_test|test_?data|data|fixtures?|__pycache__|_?vendor(ed)?|.*-info")
_SKIPPED_NAMES = re.compile(
    r"(licen[cs]e|copying|notice|authors|third.?party|test_|conftest).*|.*_(pb2|pb2_grpc|test)\.py"
    r"|(site|user)customize\.py",
    re.IGNORECASE,
)
_GENERATED = re.compile(r"do not edit|don't edit|auto-?generated|generated (by|from|automatically|file)", re.IGNORECASE)
_HEAD = 1000  # characters in which a generated file says so
_FEWEST_BYTES, _MOST_BYTES = 500, 100_000  # longer ones are mostly tables
_LONGEST_LINE = 400  # characters
_LINE_OF_ITS_OWN = 30  # characters; shorter lines are in many files that are no copies of each other
_END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """A file's text, by its path inside the library or site-packages with that directory's name in front."""

    name: str
    text: str


@dataclass(frozen=True)
class CorpusSettings:
    """What decides a corpus, beside what is installed.

    Attributes:
        megabytes: at most so many 10⁶ bytes of UTF-8, of the first documents by hash of the path.
        validation_share: of the documents.
        vocab_size: of the BPE, with the 256 bytes and end-of-document.
    """

    megabytes: float
    validation_share: float
    vocab_size: int


@dataclass(frozen=True)
class Corpus:
    """Where it is and what it holds; `split` is for --split: training and validation documents, no test documents."""

    directory: Path
    record: dict[str, Any]

    @property
    def prefix(self) -> str:
        return str(self.directory / "text_corpus")

    @property
    def split(self) -> str:
        return f"{self.record['documents']['train']},{self.record['documents']['validation']},0"

    @property
    def tokenizer_flags(self) -> list[str]:
        return [
            "--tokenizer-type",
            GPT2BPETokenizer.name,
            "--vocab-file",
            str(self.directory / "vocab.json"),
            "--merge-file",
            str(self.directory / "merges.txt"),
        ]


def site_packages_documents(root: Path) -> Iterator[Document]:
    """Texts below `root` whose path does not say that they are licences, tests or their data, in order of the path."""
    for directory, children, names in os.walk(root):
        children[:] = sorted(child for child in children if not _SKIPPED_PARTS.fullmatch(child))
        for name in sorted(names):
            path = Path(directory, name)
            if path.suffix not in SUFFIXES or _SKIPPED_NAMES.fullmatch(name) or path.is_symlink():
                continue
            if _FEWEST_BYTES <= path.stat().st_size <= _MOST_BYTES:
                try:
                    text = read_document(path)
                except (DataError, OSError):
                    continue
                yield Document(f"site-packages/{path.relative_to(root).as_posix()}", text)


def installed_documents() -> Iterator[Document]:
    """Of the running Python: its library, then what is installed in it."""
    for name, text in standard_library_documents():
        if not _SKIPPED_NAMES.fullmatch(name.rpartition("/")[2]):
            yield Document(f"stdlib/{name}", text)
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        yield from site_packages_documents(Path(root))


def is_prose_or_code(text: str) -> bool:
    """Whether people wrote and read it: not generated, not minified, not a table, of ordinary length."""
    if not _FEWEST_BYTES <= len(text.encode()) <= _MOST_BYTES or _GENERATED.search(text[:_HEAD]):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return max(map(len, text.splitlines())) <= _LONGEST_LINE and letters > 0.6 * len(text)


def choose(documents: Iterable[Document], most_bytes: float) -> list[Document]:
    """Documents by hash of their path until `most_bytes` of UTF-8, without copies.

    A copy has the same text as an earlier document, or more than half of its longer lines occur in earlier ones (a
    package that another one carries along, one model's file made from another's). Otherwise validation would ask
    for text that training has shown.
    """
    chosen: list[Document] = []
    texts: set[bytes] = set()
    lines: set[bytes] = set()
    size = 0
    for document in sorted(documents, key=lambda each: hashlib.sha256(each.name.encode()).digest()):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in texts or not is_prose_or_code(document.text):
            continue
        own = {_line_digest(line) for line in document.text.splitlines() if len(line.strip()) >= _LINE_OF_ITS_OWN}
        if 2 * len(own & lines) > len(own):
            continue
        size += len(document.text.encode())
        if size > most_bytes:
            break
        chosen.append(document)
        texts.add(digest)
        lines |= own
    return chosen


def _line_digest(line: str) -> bytes:
    return hashlib.blake2b(line.strip().encode(), digest_size=8).digest()


def is_validation(text: str, share: float) -> bool:
    """Decided by the text alone, so that no other document, order or machine moves it to the other side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> GPT2BPETokenizer:
    """Trains GPT-2's kind of BPE, writes vocab.json and merges.txt, and reads them back."""
    from tokenizers.implementations import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=2, show_progress=False, special_tokens=[_END_OF_DOCUMENT])
    bpe.save_model(str(directory))
    return GPT2BPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))


def prepare_corpus(directory: Path, settings: CorpusSettings) -> Corpus:
    """The corpus in `directory`, written if it is not there; once written it stays, whatever is installed later.

    Raises:
        DataError: the directory cannot be written, or too little text is installed for both parts.
    """
    expected = {"format": FORMAT, **asdict(settings)}
    marker = directory / MARKER
    record = _whole_corpus(directory, expected)
    if record is not None:
        return Corpus(directory, record)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)  # the corpus is whole only with it
        record = write_corpus(directory, choose(installed_documents(), 1e6 * settings.megabytes), settings)
        installed = {"python": sys.version.split()[0], "packages": _packages()}
        record = {"settings": expected, **record, **installed, "files": _files(directory)}
        write_whole(marker, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write the corpus in {directory}: {error.strerror}.") from error
    return Corpus(directory, record)


def _whole_corpus(directory: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a corpus with these settings whose files are as they were written; None if there is none."""
    try:
        record: dict[str, Any] = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        if record["settings"] != expected:
            return None
        # Earlier versions recorded no checksums.
        if record.get("files", _files(directory)) == _files(directory):
            return record
        damage = "its files are not what was written"
    except FileNotFoundError as error:
        if error.filename == str(directory / MARKER):
            return None
        damage = f"{error.filename} is missing"
    except (ValueError, KeyError, TypeError):
        damage = f"{MARKER} is damaged"
    print(f"text_corpus.py: the corpus in {directory}: {damage}; made anew", file=sys.stderr)
    return None


def _files(directory: Path) -> dict[str, Any]:
    return {
        name: file_entry(directory / name)
        for name in ("text_corpus.bin", "text_corpus.idx", "vocab.json", "merges.txt")
    }


def write_corpus(directory: Path, documents: list[Document], settings: CorpusSettings) -> dict[str, Any]:
    """Splits, trains the BPE on the training part, tokenizes; returns sizes and digest.

    Raises:
        DataError: a part without documents.
    """
    parts: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        parts["validation" if is_validation(document.text, settings.validation_share) else "train"].append(document)
    for part, members in parts.items():
        if not members:
            raise DataError(
                f"the installed packages leave no {part} document: ask for more megabytes than {settings.megabytes}, "
                f"or for another share than {settings.validation_share}."
            )
    tokenizer = train_bpe((document.text for document in parts["train"]), settings.vocab_size, directory)
    tokens = dict.fromkeys(parts, 0)

    def encoded() -> Iterator[list[int]]:
        for part, members in parts.items():
            for document in members:
                ids = [*tokenizer.tokenize(document.text), tokenizer.eod]
                tokens[part] += len(ids)
                yield ids

    write_indexed_dataset(Corpus(directory, {}).prefix, encoded(), tokenizer.vocab_size)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return {
        "sha256": digest.hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "documents": {part: len(members) for part, members in parts.items()},
        "bytes": {part: sum(len(each.text.encode()) for each in members) for part, members in parts.items()},
        "tokens": tokens,
    }


def _packages() -> dict[str, str]:
    """Every installed distribution's version: any of them may hold text."""
    names = {name for distributions in packages_distributions().values() for name in distributions}
    return {name: version(name) for name in sorted(names)}


def describe(record: dict[str, Any]) -> str:
    """A corpus in one sentence."""
    parts = "; ".join(
        f"{part} {record['documents'][part]} documents, {record['bytes'][part] / 1e6:.1f} MB, "
        f"{record['tokens'][part] / 1e6:.2f} M tokens"
        for part in ("train", "validation")
    )
    return (
        f"Library and installed packages of Python {record['python']}, BPE of {record['vocab_size']} "
        f"tokens; {parts}; sha256 {record['sha256'][:12]}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory")
    parser.add_argument("--megabytes", type=float, default=30, help="of text, at most")
    parser.add_argument("--validation-share", type=float, default=0.03, help="of the documents")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the BPE")
    args = parser.parse_args(argv)
    settings = CorpusSettings(args.megabytes, args.validation_share, args.vocab_size)
    try:
        corpus = prepare_corpus(args.output, settings)
    except (DataError, ImportError) as error:
        print(f"text_corpus.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{corpus.prefix}: {describe(corpus.record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
