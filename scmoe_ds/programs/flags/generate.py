"""Flags of scmoe generate."""

from __future__ import annotations

from scmoe_ds.programs.flags.model import add_trained_model
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.trace import add_trace


def build_parser() -> FlagParser:
    """The parser of this program."""
    parser = FlagParser(
        prog="scmoe generate",
        description="Generate text with a GPT that pretrain_gpt_scmoe.py has trained.",
        example='scmoe generate --load checkpoints/gpt --prompt "def main():" --temperature 0.8',
        often="--load --prompt --prompt-file --interactive --max-new-tokens --temperature --top-k --top-p --stop "
        "--seed --batch-size --dtype --experts --drop-rate --moe-expert-parallel-size".split(),
    )
    add_trained_model(parser)
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", action="append", default=[], help="text to go on from; may be given several times")
    group.add_argument("--prompt-file", help="a text file with one prompt a line")
    group.add_argument("--interactive", action="store_true", help="asks for prompts until the end of input (Ctrl-D)")
    group.add_argument("--max-new-tokens", type=int, default=100, help="most tokens after each prompt")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends a completion and is not printed; "
        "may be given several times. The end-of-document token always ends it",
    )
    group.add_argument("--batch-size", type=int, default=8, help="prompts that a rank completes together")
    group.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    group.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0: all")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="choose among the most likely tokens that together have this probability",
    )
    group.add_argument("--seed", type=int, default=1234, help="random seed; each prompt gets its own generator")
    add_trace(
        parser.add_argument_group("what happened"),
        "forward pass N (1 reads the first batch of prompts, then each makes a token)",
    )
    return parser
