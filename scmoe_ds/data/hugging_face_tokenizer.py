"""Tokenizers of transformers, from a local directory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import final

from scmoe_ds.data.control_tokens import plain_encoder
from scmoe_ds.data.tokenizer_base import Tokenizer, missing_package
from scmoe_ds.errors import DataError, reason_of

_FILES = ("tokenizer*", "vocab*", "*.model", "*.vocab", "*.spm", "*.tiktoken", "merges.txt", "*.bpe")


@final
class HuggingFaceTokenizer(Tokenizer):
    """Any ``transformers`` tokenizer in a local directory. Its end-of-sequence token ends a document.

    Args:
        tokenizer_model: directory written by ``tokenizer.save_pretrained``. Hub names are not looked up.

    Raises:
        DataError: the directory is absent, does not load, or has no end-of-sequence token of its own, or
            ``transformers`` is not installed.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, tokenizer_model: str) -> None:
        _check_directory(Path(tokenizer_model))
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise missing_package("transformers", self.name) from error
        try:
            # Without trust_remote_code=False transformers asks on the terminal whether to run code of the directory.
            options = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_model, **options)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... by file
            raise DataError(
                f"--tokenizer-model {tokenizer_model} does not load as a transformers tokenizer: {reason_of(error)}. "
                "The directory needs tokenizer_config.json and the vocabulary files next to it."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"--tokenizer-model {tokenizer_model} has no end-of-sequence token to end a document with. "
                'Set "eos_token" in its tokenizer_config.json.'
            )
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        # Ids may have gaps, so the greatest id can exceed the count of tokens.
        self.vocab_size = max(len(self._tokenizer), max(vocabulary.values()) + 1)
        self.eod = int(self._tokenizer.eos_token_id)
        self._encode = plain_encoder(self._tokenizer)
        end = str(self._tokenizer.eos_token)
        unknown = "\U0010fffd"  # in case the token for unknown text is the end-of-sequence token
        if any(self.eod in self._encode(text) for text in (end, f"a{end}b", f"a {end} b", unknown)):
            raise DataError(
                f"--tokenizer-model {tokenizer_model}: ordinary text can become the end-of-sequence token {end!r}, so "
                'that it could end a document. Set "eos_token" in its tokenizer_config.json to a token of its own.'
            )
        self._describe(f"{i}\t{token}\n".encode() for token, i in sorted(vocabulary.items()))

    def tokenize(self, text: str) -> list[int]:
        """Ids of ``text`` without the special tokens that some tokenizers add around it.

        A text such as ``</s>`` is ordinary text. Added tokens that are not special are words.
        """
        return self._encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` with special tokens and unchanged spaces."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def files(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save_pretrained(directory)
            return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}


def _check_directory(directory: Path) -> None:
    """Before transformers looks: of a directory without a tokenizer it makes an empty one, or says much and little."""
    if not directory.is_dir():
        raise DataError(
            f"--tokenizer-model {directory} is not a local directory. Save the tokenizer with "
            "transformers' save_pretrained and give that directory; names on a hub are not downloaded."
        )
    names = {path.name for path in directory.iterdir()}
    if {"vocab.json", "merges.txt"} <= names and not any(name.startswith("tokenizer") for name in names):
        raise DataError(
            f"--tokenizer-model {directory} has vocab.json and merges.txt alone: name these two with --vocab-file and "
            "--merge-file."
        )
    if not any(fnmatch(name, pattern) for name in names for pattern in _FILES):
        raise DataError(
            f"--tokenizer-model {directory} holds no tokenizer. Save it there with transformers' save_pretrained."
        )
