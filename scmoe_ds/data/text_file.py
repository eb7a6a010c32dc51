"""Reads a UTF-8 text file as tokens, for analysis and evaluation."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from scmoe_ds.data.reader import STREAM_ERRORS, is_compressed, open_stream
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.errors import DataError, reason_of

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Text:
    """A text, byte for byte, decompressed and without a byte-order mark.

    Attributes:
        tokens: [N] ids, int32; with ByteTokenizer uint8, a memory map unless the file is compressed.
        num_bytes: in UTF-8.
        num_words: separated by whitespace.
        digest: SHA-256 of the bytes, in hex.
    """

    tokens: np.ndarray
    num_bytes: int
    num_words: int
    digest: str


def read_text(path: str, tokenizer: Tokenizer, vocab_size: int, flag: str = "--text-file") -> Text:
    """The text that a flag names; an empty file has no tokens.

    Tokenizers other than ByteTokenizer may look any distance ahead, so the whole text is read and tokenized at once.

    Args:
        vocab_size: of the model; every id is below it.
        flag: for errors.

    Raises:
        DataError: the file is missing or not UTF-8, or the tokenizer belongs to another model.
    """
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    digest, num_bytes, num_words, within_word = hashlib.sha256(), 0, 0, False
    tokens, kept = np.empty(0, np.uint8), []
    try:
        # A pipe, such as <(zcat text.gz) of a shell, is read once.
        stays_on_disk = is_bytes and os.path.isfile(path) and not is_compressed(path)
        with open_stream(path) as stream:
            for piece in _pieces(stream):
                octets = piece.encode("utf-8")
                digest.update(octets)
                num_bytes += len(octets)
                # A word that goes on from one piece to the next is one word.
                num_words += len(piece.split()) - (within_word and not piece[0].isspace())
                within_word = not piece[-1].isspace()
                if not stays_on_disk:
                    kept.append(piece)
        if stays_on_disk and num_bytes:  # there is no map of an empty file
            mark = os.path.getsize(path) - num_bytes
            tokens = np.memmap(path, dtype=np.uint8, mode="r", offset=mark)
        elif is_bytes:
            tokens = np.frombuffer("".join(kept).encode(), dtype=np.uint8)
    except (*STREAM_ERRORS, UnicodeError) as error:
        raise DataError(f"{flag} {path} cannot be read as UTF-8 text: {reason_of(error)}") from None
    if not is_bytes:
        tokens = np.array(tokenizer.tokenize("".join(kept)), dtype=np.int32)
    if num_bytes and not len(tokens):  # transformers makes an empty tokenizer of a directory without one
        raise DataError(
            f"--tokenizer-type {tokenizer.name} finds no token in {flag} {path}: its vocabulary is "
            "empty; name the model's tokenizer with --tokenizer-type and its files"
        )
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise DataError(
            f"--tokenizer-type {tokenizer.name} gives token {int(tokens.max())}, but the model has "
            f"{vocab_size} tokens: name the tokenizer that it was trained with"
        )
    return Text(tokens, num_bytes, num_words, digest.hexdigest())


def _pieces(stream: Any) -> Iterator[str]:
    """A file's characters, in parts that are not empty; line ends stay as they are.

    Raises:
        UnicodeError: bytes that are not UTF-8, and where they are in the file.
        EOFError: a stream that is damaged or cut short, and in which line.
    """
    decoder, num_read, line = codecs.getincrementaldecoder("utf-8-sig")(), 0, 1
    while True:
        try:
            block = stream.read1(_PIECE_BYTES)  # what comes at once, so that the line is known
        except STREAM_ERRORS as error:
            raise EOFError(f"{error} (in line {line})") from None
        num_read += len(block)
        line += block.count(b"\n")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:  # it counts from what was left of the blocks before
            raise UnicodeError(f"{error.reason} at byte {num_read - len(error.object) + error.start}") from None
        if text:
            yield text
        if not block:
            return
