"""Reading the layout of Megatron's indexed datasets, and refusing damaged ones with a reason.

megatron-core asserts on a bad header, trusts every size in the index, and fails on a truncated file
only when training reaches the missing part. These checks come first.

``<prefix>.idx``, little endian: magic (9 bytes), version (u64), dtype code (u8), N sequences (u64),
M boundaries (u64), then N lengths (i32), N byte offsets into the .bin (i64), M document boundaries (i64).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scmoe_ds.data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_REBUILD = "Build the dataset again with tools/preprocess_data.py"
_SCAN_BLOCK_TOKENS = 1 << 24
_FULL_SCAN_TOKENS = 1_000_000_000
_NUM_SAMPLED_BLOCKS = 16
_DIGEST_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class IndexedLayout:
    """A consistent pair of .bin and .idx.

    Attributes:
        prefix: path without extension.
        dtype: of the tokens in the .bin.
        lengths: int32 [N], tokens of each document.
        fingerprint: hex digest of the index; two datasets that share it have the same document lengths.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))


def check_indexed_dataset(prefix: str, vocab_size: int) -> None:
    """Raise unless ``<prefix>.bin`` and ``.idx`` are whole and every token id is below ``vocab_size``.

    Up to 1e9 tokens are all looked at, in blocks over a memory map. Of a larger dataset 16 evenly spaced
    blocks of 17 M tokens are, the first and the last included: a wrong tokenizer shows in any of them.

    Raises:
        DataError: a file is missing, truncated, of another format or version, or the two disagree; the
            dataset is empty; a token id is outside the vocabulary.
    """
    check_token_range(read_layout(prefix), vocab_size)


def read_layout(prefix: str) -> IndexedLayout:
    """Read and check the index, and the size of the .bin against it. Reads no token.

    Raises:
        DataError: as ``check_indexed_dataset``, except for token ids.
    """
    idx_path, bin_path = prefix + ".idx", prefix + ".bin"
    _check_files_exist(prefix)
    with open(idx_path, "rb") as stream:
        content = stream.read()
    dtype, num_sequences, num_boundaries = _read_header(idx_path, content)
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "longer than its own header says"
        raise DataError(
            f"{idx_path} is {state}: {len(content)} bytes found, {expected} expected for {num_sequences} "
            f"documents. Copy it again from its source. Otherwise: {_REBUILD}."
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
        and int(boundaries[-1]) == num_sequences
    )
    if not consistent:
        raise DataError(f"{idx_path} contradicts itself: lengths, offsets or boundaries differ. {_REBUILD}.")
    if int(ends[-1]) == 0:
        raise DataError(f"{idx_path} lists {num_sequences} documents, all empty. {_REBUILD}.")
    bin_bytes = Path(bin_path).stat().st_size
    if bin_bytes != int(ends[-1]):
        raise DataError(
            f"{bin_path} has {bin_bytes} bytes, but {idx_path} describes {int(ends[-1])} (tokens of "
            f"{dtype.itemsize} bytes). One is truncated or from another run: copy both again. "
            f"Otherwise: {_REBUILD}."
        )
    return IndexedLayout(prefix, dtype, lengths, hashlib.sha256(content).hexdigest())


def check_token_range(layout: IndexedLayout, vocab_size: int) -> None:
    """The token-id part of ``check_indexed_dataset``; says where the first bad id of a block is."""
    tokens = np.memmap(layout.prefix + ".bin", dtype=layout.dtype, mode="r")
    for start in _block_starts(tokens.size):
        block = tokens[start : start + _SCAN_BLOCK_TOKENS]
        if int(block.max()) < vocab_size and int(block.min()) >= 0:
            continue
        position = start + int(np.argmax((block >= vocab_size) | (block < 0)))
        document = int(np.searchsorted(np.cumsum(layout.lengths, dtype=np.int64), position, side="right"))
        raise DataError(
            f"{layout.prefix}.bin holds token id {int(tokens[position])} (document {document}), but the "
            f"vocabulary has {vocab_size} tokens, 0..{vocab_size - 1}. The data was made with another "
            f"tokenizer: give that one with --tokenizer-type and its files. Otherwise: {_REBUILD} and the "
            "tokenizer of this run."
        )


def content_digest(layout: IndexedLayout) -> str:
    """Hex digest of 16 evenly spaced blocks of the tokens, the first and the last included: 1 MiB at most, so that
    every rank can afford to compare its copy with the others'."""
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
    raise DataError(f"{' and '.join(missing)} not found. {remedy}, or make the dataset with tools/preprocess_data.py.")


def _read_header(idx_path: str, content: bytes) -> tuple[np.dtype, int, int]:
    """Dtype, number of sequences, number of document boundaries."""
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
