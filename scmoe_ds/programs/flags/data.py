"""Flags for the text of a GPT, as Megatron's."""

from __future__ import annotations

import argparse

from scmoe_ds.data.reader import read_document
from scmoe_ds.errors import DataError
from scmoe_ds.programs.flags.checks import flag_of
from scmoe_ds.programs.flags.tokenizer import add_tokenizer

DEFAULT_SPLIT = "969, 30, 1"
SPLIT_FLAGS = ("train_data_path", "valid_data_path", "test_data_path")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Flags that name the text, its split and its tokenizer."""
    group = parser.add_argument_group("data and tokenizer")
    group.add_argument(
        "--data-path",
        nargs="+",
        help="prefix of .bin and .idx, or weight prefix …; default: a corpus",
    )
    group.add_argument("--data-args-path", help="file that holds what --data-path would say; for long blends")
    group.add_argument("--split", help=f"shares of training, validation and test, default {DEFAULT_SPLIT}")
    for name, use in (("train", ""), ("valid", ", default: no validation"), ("test", ", evaluated once at the end")):
        group.add_argument(f"--{name}-data-path", nargs="+", help=f"as --data-path, for this split alone{use}")
    group.add_argument("--data-cache-path", help="where sample indices are kept; default: beside the data")
    group.add_argument("--corpus-dir", default="data", help="where the default corpus is written")
    add_tokenizer(group, "the type that the other flags name, or ByteTokenizer")
    group.add_argument("--num-workers", type=int, default=0, help="data loader processes per rank")
    group.add_argument("--seed", type=int, default=1234, help="seed of weights, data order, dropout and gate noise")


def resolve_data_flags(args: argparse.Namespace) -> None:
    """Checks which data flags go together; reads --data-args-path into ``data_path`` and sets the default of ``split``.

    Raises:
        DataError: flags that exclude each other, or a file that cannot be read or names nothing.
    """
    given = [flag_of(name) for name in SPLIT_FLAGS if getattr(args, name)]
    if given:
        others = [name for name in ("data_path", "data_args_path", "split") if getattr(args, name)]
        if others:
            raise DataError(
                f"{given[0]} names the data of one split, {flag_of(others[0])} the data of all: give one or the other."
            )
        if not args.train_data_path:
            raise DataError(f"{given[0]} without --train-data-path: there is nothing to train on. Give it, too.")
        return
    if args.data_args_path:
        if args.data_path:
            raise DataError("--data-args-path and --data-path both name the data: give one of them.")
        args.data_path = read_document(args.data_args_path).split()
        if not args.data_path:
            raise DataError(f"--data-args-path {args.data_args_path} names no data: write what --data-path would say.")
    args.split = args.split or DEFAULT_SPLIT
