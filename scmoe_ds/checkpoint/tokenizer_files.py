"""Records the tokenizer of a model with its weights, and adds its files when they are small.

The description of a checkpoint or an export has under "tokenizer": the type, an identity that does not depend on where
the files lie, and the names of the files beside the weights. The ids of another tokenizer mean something else to the
model, even when their number is the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmoe_ds.checkpoint.files import DamagedCheckpointError, inside
from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, tokenizer_in
from scmoe_ds.errors import CheckpointError, DataError, one_line, reason_of

logger = logging.getLogger("scmoe_ds")

KEY = "tokenizer"
MOST_BYTES = 20 * 10**6
"""Larger files would dominate the checkpoints of small models. The user names such a tokenizer."""

# Tokenizers of one vocabulary differ in spaces, digits, cases, scripts, combining marks and code.
PROBE = "The quick brown fox, 1234567890 3.14\n\t def f(x):  return 'Grüße'  # 世界 🙂 e\u0301 don't  ÀB_c\r\n   "

Record = Mapping[str, Any]


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Type and identity of a tokenizer. Tokenizers of the same identity give the same ids for the same text."""
    vocabulary = sorted((number, token) for token, number in tokenizer.vocabulary().items())
    identity = {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "vocabulary_sha256": _digest(vocabulary),
        "probe_sha256": _digest(tokenizer.tokenize(PROBE)),
    }
    return {"type": tokenizer.name, "identity": identity}


def carried_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Names and contents of the files for a checkpoint. Empty when they are too large, or do not make the same
    tokenizer again."""
    try:
        files = tokenizer.files()
        size = sum(map(len, files.values()))
        if size > MOST_BYTES:
            raise DataError(f"{size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}")
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                Path(directory, name).write_bytes(content)
            if describe(tokenizer_in(Path(directory), tokenizer.name)) != describe(tokenizer):
                raise DataError("what it saves makes another tokenizer")
    except Exception as error:  # a tokenizer of transformers may raise anything when it saves itself
        reason = f"({one_line(error)}): name them when you load one"
        logger.info(f"checkpoints record the tokenizer, but do not carry its files {reason}")
        return {}
    return files


def record(tokenizer: Record, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The description's "tokenizer": `describe`, and the names of the carried files."""
    return {**tokenizer, "files": sorted(files)}


def read_files(directory: Path, found: Record | None) -> dict[str, bytes]:
    """Names and contents of the tokenizer's files in a checkpoint or an export. Raises a DamagedCheckpointError if one
    cannot be read, or lies elsewhere."""
    contents = {}
    for name in [] if found is None else _checked(directory, found)["files"]:
        try:
            contents[name] = (directory / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpointError(
                f"{directory}: {name} of its tokenizer cannot be read ({error.strerror}); "
                "take another checkpoint, or make the export anew"
            ) from None
    return contents


def recorded_tokenizer(directory: Path, found: Record, flag: str) -> Tokenizer:
    """The tokenizer whose files are in a checkpoint or an export. Raises a CheckpointError if there are none, or they
    make another tokenizer than the recorded one."""
    checked = _checked(directory, found)
    if not checked["files"] and checked["type"] != "ByteTokenizer":
        raise CheckpointError(
            f"{flag} {directory} was trained with {_text(checked)}, but does not carry its files; "
            "name them with --tokenizer-type and the flags of training"
        )
    try:
        tokenizer = tokenizer_in(directory, checked["type"])
    except (DataError, OSError) as error:
        raise DamagedCheckpointError(
            f"{flag} {directory}: its tokenizer does not load ({reason_of(error)}); name the same one "
            "with --tokenizer-type and the flags of training"
        ) from None
    if describe(tokenizer)["identity"] != checked["identity"]:
        raise DamagedCheckpointError(
            f"{flag} {directory}: its tokenizer files give {_text(describe(tokenizer))}, but it was trained with "
            f"{_text(checked)}; name that one with --tokenizer-type and the flags of training"
        )
    return tokenizer


def check_same(directory: Path, found: Record, tokenizer: Record, flag: str, whose: str) -> None:
    """Refuses a tokenizer that is not the recorded one.

    Args:
        found: the record in a checkpoint or an export.
        tokenizer: `describe` of the tokenizer that is to be used.
        whose: names the latter.

    Raises:
        CheckpointError: they differ; names both.
    """
    checked = _checked(directory, found)
    if tokenizer["identity"] == checked["identity"]:
        return
    names = {
        "HuggingFaceTokenizer": f" --tokenizer-model {directory}",
        "GPT2BPETokenizer": f" --vocab-file {directory}/vocab.json --merge-file {directory}/merges.txt",
    }
    where = names.get(checked["type"], "") if checked["files"] else ""
    raise CheckpointError(
        f"{whose} is {_text(tokenizer)}, but {flag} {directory} was trained with {_text(checked)}, "
        f"whose token ids mean something else; use that one: --tokenizer-type {checked['type']}{where}"
    )


def _checked(directory: Path, found: Any) -> Record:
    """Checks that a file's record of a tokenizer has the form that `record` writes."""
    identity = found.get("identity") if isinstance(found, dict) else None
    good = (
        isinstance(identity, dict)
        and found.get("type") in TOKENIZER_TYPES
        and all(type(identity.get(key)) is int for key in ("vocab_size", "eod"))
        and all(isinstance(identity.get(key), str) for key in ("vocabulary_sha256", "probe_sha256"))
        and isinstance(found.get("files"), list)
    )
    if not good:
        raise DamagedCheckpointError(
            f'{directory}: its record of the tokenizer ("{KEY}") is damaged; take another checkpoint, or make the '
            "export anew"
        )
    for name in found["files"]:
        inside(directory, name, f'its record of the tokenizer ("{KEY}")')
    return dict(found)


def _text(found: Record) -> str:
    identity = found["identity"]
    both = hashlib.sha256((identity["vocabulary_sha256"] + identity["probe_sha256"]).encode()).hexdigest()
    return f"{found['type']} ({identity['vocab_size']} tokens, fingerprint {both[:8]})"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
