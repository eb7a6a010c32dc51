"""The tokenizer that a model was trained with: recorded with its weights, and where it is small, carried along.

The description of a checkpoint or an export has it under "tokenizer": its type, an identity that does not depend on
where its files lie, and the names of its files beside the weights. Ids of another tokenizer mean something else to the
model, even where there are as many of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmoe_ds.checkpoint.files import DamagedCheckpointError
from scmoe_ds.checkpoint.paths import inside
from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, tokenizer_in
from scmoe_ds.errors import CheckpointError, DataError

logger = logging.getLogger("scmoe_ds")

KEY = "tokenizer"
MOST_BYTES = 20 * 10**6
"""Larger files would dominate the checkpoints of small models; the user names them instead."""

# Spaces, digits, cases, scripts, combining marks and code: where tokenizers of one vocabulary differ.
_PROBE = "The quick brown fox, 1234567890 3.14\n\t def f(x):  return 'Grüße'  # 世界 🙂 e\u0301 don't  ÀB_c\r\n   "

Record = Mapping[str, Any]


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The type of a tokenizer, and its identity: two of the same identity give the same ids for the same text."""
    vocabulary = sorted((number, token) for token, number in tokenizer.vocabulary().items())
    identity = {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "vocabulary_sha256": _digest(vocabulary),
        "probe_sha256": _digest(tokenizer.tokenize(_PROBE)),
    }
    return {"type": tokenizer.name, "identity": identity}


def carried_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Names and contents of the files that go into a checkpoint; none if they are too large, or do not make the same
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
        reason = " ".join(str(error).split())[:200]
        logger.info(
            f"checkpoints record the tokenizer, but do not carry its files ({reason}): name them when you load one"
        )
        return {}
    return files


def record(tokenizer: Record, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the description says under "tokenizer": `describe`, and the names of the files that are carried."""
    return {**tokenizer, "files": sorted(files)}


def read_files(directory: Path, found: Record | None) -> dict[str, bytes]:
    """The files that a checkpoint or an export carries.

    Raises:
        DamagedCheckpointError: one cannot be read, or is elsewhere.
    """
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
    """The tokenizer that a checkpoint or an export carries.

    Raises:
        CheckpointError: it carries none, or another one than it records.
    """
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
            f"{flag} {directory}: its tokenizer does not load ({error}); name the same one "
            "with --tokenizer-type and the flags of training"
        ) from None
    if describe(tokenizer)["identity"] != checked["identity"]:
        raise DamagedCheckpointError(
            f"{flag} {directory}: its tokenizer files give {_text(describe(tokenizer))}, but "
            f"it was trained with {_text(checked)}; name that one with --tokenizer-type and "
            "the flags of training"
        )
    return tokenizer


def check_same(directory: Path, found: Record, tokenizer: Record, flag: str, whose: str) -> None:
    """Refuses a tokenizer that is not the recorded one.

    Args:
        found: what a checkpoint or an export records.
        tokenizer: `describe` of the one that is to be used.
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
        f"whose token ids mean something else; use that one: --tokenizer-type {checked['type']}"
        f"{where}"
    )


def _checked(directory: Path, found: Any) -> Record:
    """A file's record of a tokenizer, checked to have the form that `record` writes."""
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
            f'{directory}: its record of the tokenizer ("{KEY}") is damaged; take another '
            "checkpoint, or make the export anew"
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
