"""Flags of scmoe evaluate."""

from __future__ import annotations

from scmoe_ds.programs.flags.model import add_trained_model
from scmoe_ds.programs.flags.parser import FlagParser


def build_parser() -> FlagParser:
    """The parser of this program."""
    parser = FlagParser(
        prog="scmoe evaluate",
        description="Loss and perplexity of a GPT that pretrain_gpt_scmoe.py has trained, on a text or data set, or "
        "its results on tasks of lm_eval. No token is dropped here unless --drop-rate says so, while the validation "
        "of a training run applies the section's eval_capacity_factor: the two losses may differ a little.",
        example="scmoe evaluate --load checkpoints/gpt --data-path data/corpus_text_document --split 969,30,1",
        often="--load --data-path --split --text-file --tasks --num-fewshot --limit --seq-length --stride --batch-size "
        "--output --dtype --drop-rate --moe-expert-parallel-size".split(),
    )
    add_trained_model(parser)
    group = parser.add_argument_group("what to evaluate on")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-path", help="prefix of a .bin and .idx of scmoe preprocess")
    what.add_argument("--text-file", help="a UTF-8 text, evaluated as one document")
    what.add_argument(
        "--tasks", nargs="+", help="tasks of lm_eval, separated by spaces or commas; nothing is downloaded"
    )
    group.add_argument(
        "--split",
        help="with --data-path: the --split of the pretraining; its validation documents are evaluated. "
        "Default: all documents",
    )
    group.add_argument("--include-path", help="with --tasks: a directory of task files")
    group.add_argument(
        "--num-fewshot", type=int, help="with --tasks: examples before each question; default: the task's"
    )
    group.add_argument("--limit", type=int, help="with --tasks: questions per task; default: all")
    group = parser.add_argument_group("how")
    group.add_argument("--seq-length", type=int, help="tokens of a window; default: the model's context")
    group.add_argument(
        "--stride",
        type=int,
        help="tokens by which the window moves. Every window but the first scores only its last --stride tokens. "
        "When it equals --seq-length, windows are disjoint. Default: half of --seq-length; with --tasks "
        "--seq-length, as in lm_eval",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, help="windows, questions or prompts that a rank reads together"
    )
    group.add_argument("--output", help="a JSON file for the results")
    return parser
