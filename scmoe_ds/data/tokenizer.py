"""Tokenizers with Megatron's names, from local files. Nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import final

from scmoe_ds.data.hugging_face_tokenizer import HuggingFaceTokenizer
from scmoe_ds.data.tokenizer_base import Tokenizer, missing_package
from scmoe_ds.errors import DataError, reason_of

TOKENIZER_TYPES = ("ByteTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer")

_VOCAB_FILE, _MERGE_FILE = "vocab.json", "merges.txt"
_WORD_END = re.compile(r"(?<=\w)(?=[ \t\r\n])")
_PART_CHARACTERS = 1 << 16
_GPT2_END_OF_DOCUMENT = "<|endoftext|>"


@final
class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text, 256 ends a document. Needs no file."""

    name = "ByteTokenizer"

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eod = 256
        self._describe([b"utf-8"])

    def tokenize(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``. Raises UnicodeEncodeError on a lone surrogate."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decodes bytes, without end-of-document.

        Bytes that are not UTF-8, and ids from the padding of a vocabulary, become U+FFFD: a model in training may
        generate both.
        """
        invalid_byte = 0xFF  # never occurs in UTF-8
        octets = bytes(i if 0 <= i < 256 else invalid_byte for i in ids if i != self.eod)
        return octets.decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def files(self) -> dict[str, bytes]:
        return {}


@final
class GPT2BPETokenizer(Tokenizer):
    """GPT-2's byte-level BPE from a local ``vocab.json`` and ``merges.txt``.

    Args:
        vocab_file: JSON object, token string to id; must hold ``<|endoftext|>``.
        merge_file: one merge a line.

    Raises:
        DataError: a file is absent, unreadable, or without ``<|endoftext|>``, or ``tokenizers`` is not installed.
    """

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        _require_file("--vocab-file", vocab_file, "GPT-2's vocab.json")
        _require_file("--merge-file", merge_file, "GPT-2's merges.txt")
        try:
            from tokenizers.implementations import ByteLevelBPETokenizer
        except ImportError as error:
            raise missing_package("tokenizers", self.name) from error
        try:
            self._bpe = ByteLevelBPETokenizer.from_file(vocab_file, merge_file)
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(
                f"--vocab-file {vocab_file} and --merge-file {merge_file} do not load as GPT-2 BPE: "
                f"{reason_of(error)}. Give the vocab.json and merges.txt that belong together."
            ) from error
        vocabulary: dict[str, int] = self._bpe.get_vocab()
        if _GPT2_END_OF_DOCUMENT not in vocabulary:
            raise DataError(
                f"--vocab-file {vocab_file} has {len(vocabulary)} tokens but no {_GPT2_END_OF_DOCUMENT}, "
                "which marks the end of a document. Add it with the next free id."
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = vocabulary[_GPT2_END_OF_DOCUMENT]
        self._paths = {_VOCAB_FILE: Path(vocab_file), _MERGE_FILE: Path(merge_file)}
        self._describe(path.read_bytes() for path in self._paths.values())

    def tokenize(self, text: str) -> list[int]:
        """BPE ids of ``text``; a literal ``<|endoftext|>`` in it is ordinary text.

        A long text is encoded in parts, because the library takes 150 bytes for each byte of a text. A part ends with
        a letter or digit before white space. GPT-2's pattern begins a word there, so the ids are those of the whole.
        """
        ids: list[int] = []
        begin = 0
        while begin < len(text):
            cut = _WORD_END.search(text, begin + _PART_CHARACTERS)
            end = cut.start() if cut else len(text)
            ids += self._bpe.encode(text[begin:end]).ids
            begin = end
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; end-of-document shows as ``<|endoftext|>``."""
        return str(self._bpe.decode(list(ids), skip_special_tokens=False))

    def vocabulary(self) -> dict[str, int]:
        return dict(self._bpe.get_vocab())

    def files(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self._paths.items()}


def build_tokenizer(
    tokenizer_type: str,
    *,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> Tokenizer:
    """The tokenizer that Megatron's flags describe.

    Args:
        tokenizer_type: one of ``TOKENIZER_TYPES`` (``--tokenizer-type``).
        tokenizer_model: local directory, for HuggingFaceTokenizer (``--tokenizer-model``).
        vocab_file: for GPT2BPETokenizer (``--vocab-file``).
        merge_file: for GPT2BPETokenizer (``--merge-file``).

    Raises:
        DataError: unknown type, a flag that this type needs is missing, or its files are unusable.
    """
    if tokenizer_type == ByteTokenizer.name:
        return ByteTokenizer()
    if tokenizer_type == GPT2BPETokenizer.name:
        return GPT2BPETokenizer(
            _require_flag("--vocab-file", vocab_file, tokenizer_type, "a local vocab.json"),
            _require_flag("--merge-file", merge_file, tokenizer_type, "a local merges.txt"),
        )
    if tokenizer_type == HuggingFaceTokenizer.name:
        return HuggingFaceTokenizer(
            _require_flag("--tokenizer-model", tokenizer_model, tokenizer_type, "a local directory")
        )
    raise DataError(f"--tokenizer-type {tokenizer_type} is not known. Choose one of: {', '.join(TOKENIZER_TYPES)}.")


def tokenizer_in(directory: Path, tokenizer_type: str) -> Tokenizer:
    """The tokenizer whose ``files`` lie in a directory, which may hold other files too. Raises a DataError if the type
    is unknown, or its files are unusable."""
    return build_tokenizer(
        tokenizer_type,
        tokenizer_model=str(directory),
        vocab_file=str(directory / _VOCAB_FILE),
        merge_file=str(directory / _MERGE_FILE),
    )


def pad_vocab_size(vocab_size: int, make_divisible_by: int = 128, tensor_parallel_size: int = 1) -> int:
    """Megatron's padded vocabulary: the least multiple of both arguments' product, at least ``vocab_size``. Raises a
    DataError if an argument is not positive."""
    if min(vocab_size, make_divisible_by, tensor_parallel_size) < 1:
        raise DataError(
            f"the vocabulary size ({vocab_size}), --make-vocab-size-divisible-by ({make_divisible_by}) and "
            f"--tensor-model-parallel-size ({tensor_parallel_size}) must all be at least 1."
        )
    multiple = make_divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def _require_flag(flag: str, value: str | None, tokenizer_type: str, expected: str) -> str:
    if not value:
        raise DataError(f"--tokenizer-type {tokenizer_type} needs {flag}, and none was given: pass {expected}.")
    return value


def _require_file(flag: str, path: str, expected: str) -> None:
    if not Path(path).is_file():
        raise DataError(f"{flag} {path} is not a file. Give the local path of {expected}.")
