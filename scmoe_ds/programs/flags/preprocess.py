"""Flags of scmoe preprocess."""

from __future__ import annotations

import argparse

from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.tokenizer import add_tokenizer


def build_parser() -> FlagParser:
    """Megatron's flags for its tool of the same name, and ours."""
    parser = FlagParser(
        prog="scmoe preprocess",
        description="Turns text into the data sets that training reads: PREFIX_text_document.bin and .idx, for\n"
        "--data-path PREFIX_text_document. docs/data.md has the whole way, with a tokenizer of your own.",
        example="scmoe preprocess --input texts/ --output-prefix data/corpus --append-eod",
        often="--input --output-prefix --append-eod --json-keys --text-endings --tokenizer-model --vocab-file "
        "--merge-file --tokenizer-type --workers --skip-bad".split(),
    )
    source = parser.add_argument_group("what to read")
    source.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files and directories. A .txt file is one document. Other files have one JSON object a line "
        '({"text": "…"}). Of a directory all .txt, .jsonl and .json files are read, at any depth. '
        "Files may be compressed (gzip, zstd, bzip2, xz)",
    )
    source.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="which key of the JSON objects holds the text (default: text); several keys make several data sets",
    )
    source.add_argument(
        "--text-endings",
        nargs="+",
        default=[],
        metavar="ENDING",
        help="read files with these endings as text, too: .py .md for source code, say",
    )
    source.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out documents that cannot be read, and name the first ten (default: stop at the first)",
    )
    tokenizer = parser.add_argument_group("how to turn text into tokens; training needs the same flags")
    add_tokenizer(tokenizer, "the type that the other flags name, or ByteTokenizer")
    tokenizer.add_argument(
        "--append-eod",
        action="store_true",
        help="put the end-of-document token behind each document, so that a model sees where one ends",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="the files are PREFIX_text_document.bin and .idx; directories are made",
    )
    output.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes; the output is the same")
    output.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="Megatron's; the only format")
    output.add_argument("--log-interval", type=_positive, metavar="N", help="Megatron's; without effect")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
