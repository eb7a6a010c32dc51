"""Reads the layout of Megatron's indexed datasets, and refuses damaged ones with a reason.

megatron-core asserts on a bad header and trusts every size in the index. When a file is truncated, it fails only when
training reaches the missing part. These checks come first.

``<prefix>.idx``, little endian: magic (9 bytes), version (u64), dtype code (u8), N sequences (u64),
M boundaries (u64), then N lengths (i32), N byte offsets into the .bin (i64), M document boundaries (i64).
A document is usually one sequence. With Megatron's --split-sentences it has several; --split divides sequences.

Megatron-DeepSpeed's own tool writes the end-of-document token of --append-eod into the .bin, but does not count it in
the index. Such a dataset has one token more per document than the index says. The token is read as the document's last.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scmoe_ds.errors import DataError

logger = logging.getLogger("scmoe_ds")

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_REBUILD = "Build the dataset again with scmoe preprocess"
_SCAN_BLOCK_TOKENS = 1 << 24
_FULL_SCAN_TOKENS = 1_000_000_000
_NUM_SAMPLED_BLOCKS = 16
_DIGEST_BLOCK_BYTES = 1 << 16
_CHECKED_ENDS = 1000


@dataclass(frozen=True)
class IndexedLayout:
    """A consistent pair of .bin and .idx.

    Attributes:
        prefix: path without extension.
        dtype: of the tokens in the .bin.
        lengths: int32 [N], tokens of each sequence, with end-of-document tokens that the index does not count.
        boundaries: int64 [M], the sequence at which each document begins; the last is N.
        fingerprint: hex digest of the index; two datasets that share it have the same lengths.
        uncounted_eod: the end-of-document token that the index does not count; None when it counts all tokens.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    boundaries: np.ndarray
    fingerprint: str
    uncounted_eod: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def unit(self) -> str:
        """What --split divides, in words."""
        return "documents" if len(self.boundaries) == len(self.lengths) + 1 else "sequences"

    def tokens(self) -> np.ndarray:
        """[num_tokens] of ``dtype``, memory-mapped."""
        return np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r")

    def offsets(self) -> np.ndarray:
        """int64 [N + 1]: the token at which each sequence begins; the last is the number of tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def document_offsets(self, sequences: range) -> np.ndarray:
        """int64 [D + 1]: the token at which each document in a range of sequences begins; the last is the range's end.

        The range may begin and end within a document. Documents without a sequence are left out.
        """
        inside = self.boundaries[(self.boundaries > sequences.start) & (self.boundaries < sequences.stop)]
        edges = np.concatenate([[sequences.start], inside, [sequences.stop]])
        return self.offsets()[np.unique(edges)]


def read_layout(prefix: str, eod: int | None = None) -> IndexedLayout:
    """Reads the index and checks it and the size of the .bin. Reads tokens only where the index does not count them.

    Args:
        eod: the tokenizer's end-of-document token; None without a tokenizer.

    Raises:
        DataError: a file is missing, truncated, of another format or version, or the two disagree; the dataset is
            empty; the tokens that the index does not count are not ``eod``.
    """
    _check_files_exist(prefix)
    layout = _read_index(prefix)
    itemsize, found_bytes = layout.dtype.itemsize, Path(prefix + ".bin").stat().st_size
    expected_bytes = layout.num_tokens * itemsize
    if found_bytes == expected_bytes:
        return layout
    counted = with_uncounted_eod(layout.lengths, layout.boundaries, found_bytes // itemsize)
    if counted is None or found_bytes % itemsize:
        state = "truncated: copy it" if found_bytes < expected_bytes else "of another run than its index: copy both"
        raise DataError(
            f"{prefix}.bin has {found_bytes} bytes, but {prefix}.idx describes {expected_bytes} (tokens of {itemsize} "
            f"bytes), so it is {state} again from the source. Otherwise: {_REBUILD}."
        )
    layout = replace(layout, lengths=counted, fingerprint=layout.fingerprint + "+eod")
    return replace(layout, uncounted_eod=_uncounted_token(layout, eod))


def _read_index(prefix: str) -> IndexedLayout:
    idx_path = prefix + ".idx"
    content = Path(idx_path).read_bytes()
    dtype, num_sequences, num_boundaries = _read_header(idx_path, content)
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "longer than its own header says"
        raise DataError(
            f"{idx_path} is {state}: {len(content)} bytes found, {expected} expected for {num_sequences} "
            f"sequences. Copy it again from its source. Otherwise: {_REBUILD}."
        )
    if num_sequences == 0:
        raise DataError(f"{idx_path} holds no documents. {_REBUILD} from input that has text.")
    lengths = np.frombuffer(content, np.int32, num_sequences, _HEADER.size)
    offsets = np.frombuffer(content, np.int64, num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries = np.frombuffer(content, np.int64, num_boundaries, _HEADER.size + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    consistent = (
        int(lengths.min()) >= 0
        and np.array_equal(offsets, ends - lengths * np.int64(dtype.itemsize))
        and num_boundaries > 0
        and int(boundaries[0]) == 0
        and int(boundaries[-1]) == num_sequences
        and bool((boundaries[1:] >= boundaries[:-1]).all())
    )
    if not consistent:
        raise DataError(f"{idx_path} contradicts itself: lengths, offsets or boundaries differ. {_REBUILD}.")
    if int(ends[-1]) == 0:
        raise DataError(f"{idx_path} lists {num_sequences} documents, all empty. {_REBUILD}.")
    return IndexedLayout(prefix, dtype, lengths, boundaries, hashlib.sha256(content).hexdigest())


def with_uncounted_eod(lengths: np.ndarray, boundaries: np.ndarray, num_tokens: int) -> np.ndarray | None:
    """``lengths`` with one token more at the end of each document; None when that does not give ``num_tokens``."""
    missing = num_tokens - int(lengths.sum(dtype=np.int64))
    if missing <= 0:
        return None
    last = boundaries[1:][boundaries[1:] > boundaries[:-1]] - 1  # an empty document got no token either
    if missing != len(last):
        return None
    counted = lengths.copy()
    counted[last] += 1
    return counted


def _uncounted_token(layout: IndexedLayout, eod: int | None) -> int:
    """The token that ends every document; looks at 1000 documents at most. Raises a DataError if the documents end with
    different tokens, or with another token than ``eod``."""
    ends = layout.document_offsets(range(len(layout.lengths)))[1:]
    places = ends[np.linspace(0, len(ends) - 1, min(len(ends), _CHECKED_ENDS), dtype=np.int64)] - 1
    found = np.unique(layout.tokens()[places])
    many = f"{layout.prefix}.bin has exactly one token more per document than {layout.prefix}.idx counts, but "
    if len(found) > 1:
        raise DataError(
            f"{many}the documents do not end with one token (they end with {found[0]}, {found[1]}, …), so it is not "
            f"an uncounted end-of-document token: the two are of different runs. Copy both again. Otherwise: "
            f"{_REBUILD}."
        )
    if eod is not None and int(found[0]) != eod:
        raise DataError(
            f"{many}the documents end with token {found[0]}, and the tokenizer's end-of-document token is {eod}: the "
            "data was made with another tokenizer. Give that one with --tokenizer-type and its files."
        )
    return int(found[0])


def check_token_range(layout: IndexedLayout, vocab_size: int) -> None:
    """Checks that every token id is below ``vocab_size``. One rank calls it for all.

    Reads up to 1e9 tokens, in blocks over a memory map. Of a larger dataset it reads 16 evenly spaced blocks of 17 M
    tokens, which include the first and the last; a wrong tokenizer shows in any of them. Also logs when the index does
    not count end-of-document tokens.

    Raises:
        DataError: a token id is outside the vocabulary; names the first one.
    """
    if layout.uncounted_eod is not None:
        logger.info(
            f"{layout.prefix}.idx does not count the token {layout.uncounted_eod} that ends each document "
            "(Megatron-DeepSpeed's --append-eod); it is read as the document's last token"
        )
    tokens = layout.tokens()
    for start in _block_starts(tokens.size):
        block = tokens[start : start + _SCAN_BLOCK_TOKENS]
        if int(block.max()) < vocab_size and int(block.min()) >= 0:
            continue
        position = start + int(np.argmax((block >= vocab_size) | (block < 0)))
        sequence = int(np.searchsorted(layout.offsets(), position, side="right")) - 1
        document = document_of(layout.boundaries, sequence)
        raise DataError(
            f"{layout.prefix}.bin holds token id {int(tokens[position])} (document {document}), but the "
            f"vocabulary has {vocab_size} tokens, 0..{vocab_size - 1}. The data was made with another "
            f"tokenizer: give that one with --tokenizer-type and its files. Otherwise: {_REBUILD} and the "
            "tokenizer of this run."
        )


def document_of(boundaries: np.ndarray, sequence: int) -> int:
    """The document that holds a sequence."""
    return int(np.searchsorted(boundaries, sequence, side="right")) - 1


def content_digest(layout: IndexedLayout) -> str:
    """Hex digest of 16 evenly spaced blocks of the tokens: 1 MiB at most, so that every rank can compare its copy."""
    digest = hashlib.sha256()
    last = max(layout.num_tokens * layout.dtype.itemsize - _DIGEST_BLOCK_BYTES, 0)
    with open(layout.prefix + ".bin", "rb") as stream:
        for number in range(_NUM_SAMPLED_BLOCKS):
            stream.seek(last * number // (_NUM_SAMPLED_BLOCKS - 1))
            digest.update(stream.read(_DIGEST_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _block_starts(num_tokens: int) -> list[int]:
    if num_tokens <= _FULL_SCAN_TOKENS:
        return list(range(0, num_tokens, _SCAN_BLOCK_TOKENS))
    last = num_tokens - _SCAN_BLOCK_TOKENS
    return [last * i // (_NUM_SAMPLED_BLOCKS - 1) for i in range(_NUM_SAMPLED_BLOCKS)]


def _check_files_exist(prefix: str) -> None:
    missing = [prefix + extension for extension in (".bin", ".idx") if not Path(prefix + extension).is_file()]
    if not missing:
        return
    remedy = "Give the path without extension (Megatron's prefix, often ending in _text_document)"
    if prefix.endswith((".bin", ".idx")):
        remedy = f"Give the path without extension: {prefix[:-4]}"
    raise DataError(f"{' and '.join(missing)} not found. {remedy}, or make the dataset with scmoe preprocess.")


def _read_header(idx_path: str, content: bytes) -> tuple[np.dtype, int, int]:
    """Dtype, number of sequences, number of document boundaries."""
    if content.startswith(b"TNTIDX"):
        raise DataError(
            f"{idx_path} is of an old format (--dataset-impl lazy or cached). {_REBUILD}, or with --dataset-impl mmap "
            "of the tool that wrote it."
        )
    if not content.startswith(_MAGIC[: len(content)]) or not content:
        raise DataError(
            f"{idx_path} is not the index of a Megatron dataset: it starts with {content[:9]!r}, not "
            f"{_MAGIC!r}. {_REBUILD}."
        )
    if len(content) < _HEADER.size:
        raise DataError(
            f"{idx_path} is truncated: {len(content)} bytes found, the header alone takes {_HEADER.size}. "
            f"Copy it again from its source. Otherwise: {_REBUILD}."
        )
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    if version != 1:
        raise DataError(f"{idx_path} has index version {version}; only version 1 is known. {_REBUILD}.")
    if code not in _INTEGER_DTYPES:
        raise DataError(f"{idx_path} has dtype code {code}, which is no integer type. {_REBUILD}.")
    return np.dtype(_INTEGER_DTYPES[code]), num_sequences, num_boundaries
