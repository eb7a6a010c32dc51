"""Flags that name a tokenizer, and the tokenizer that they name."""

from __future__ import annotations

import argparse

from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.checks import flag_of

_FILES = ("tokenizer_model", "vocab_file", "merge_file")


def add_tokenizer(group: argparse._ArgumentGroup, default: str | None = None) -> None:
    """Adds the flags.

    Args:
        default: what is used without --tokenizer-type, for the help; None: the flag is required.
    """
    text = None if default is None else f"default: {default}"
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=default is None, help=text)
    group.add_argument("--tokenizer-model", help="local directory of a Hugging Face tokenizer")
    group.add_argument("--vocab-file", help="vocab.json of GPT-2's BPE")
    group.add_argument("--merge-file", help="merges.txt of GPT-2's BPE")


def tokenizer_of(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of --tokenizer-type.

    Raises:
        DataError: a file that is missing or unusable.
    """
    return build_tokenizer(args.tokenizer_type, **{name: getattr(args, name) for name in _FILES})


def named_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer of --tokenizer-type; None without the flag, when a checkpoint says which one to use.

    Raises:
        ArgumentError: files without --tokenizer-type.
        DataError: a file that is missing or unusable.
    """
    if args.tokenizer_type is not None:
        return tokenizer_of(args)
    for name in _FILES:
        if getattr(args, name) is not None:
            raise ArgumentError(
                f"{flag_of(name)} goes with a --tokenizer-type: name it, or leave both out for the "
                "tokenizer that the checkpoint records"
            )
    return None


def set_tokenizer_type(args: argparse.Namespace) -> None:
    """Sets --tokenizer-type, if it was not given, by the files that were.

    Raises:
        ArgumentError: files of a tokenizer of another type, which would be ignored.
    """
    gpt2, model = bool(args.vocab_file or args.merge_file), bool(args.tokenizer_model)
    if args.tokenizer_type is None:
        args.tokenizer_type = "GPT2BPETokenizer" if gpt2 else "HuggingFaceTokenizer" if model else "ByteTokenizer"
    for given, flags, kind in (
        (gpt2, "--vocab-file and --merge-file", "GPT2BPETokenizer"),
        (model, "--tokenizer-model", "HuggingFaceTokenizer"),
    ):
        if given and args.tokenizer_type != kind:
            raise ArgumentError(f"--tokenizer-type {args.tokenizer_type}: {flags} is for {kind}; remove one of them")
