"""The `scmoe` command: `scmoe PROGRAM FLAGS` is `python -m scmoe_ds.programs.MODULE FLAGS`.

On several ranks a program is started by the launcher: `deepspeed --module scmoe_ds.programs.MODULE FLAGS`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from scmoe_ds import __version__
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a program; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "--help-all", "help"):
        print(usage())
        return 0 if words else 2
    name, *flags = words
    if name == "--version":
        print(f"scmoe_ds {__version__}")
        return 0
    if name.startswith("-"):
        print(f"scmoe: error: {name}: name a program first, e.g. scmoe pretrain {name} ...", file=sys.stderr)
        return 2
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        remedy = f'did you mean "{near[0]}"?' if near else f"choose one of {', '.join(PROGRAMS)}"
        print(f"scmoe: error: {name}: no such program; {remedy}", file=sys.stderr)
        return 2
    # --help and a wrong flag end here, before torch is imported.
    parser_of(name).parse_args(flags)
    if PROGRAMS[name].needs_deepspeed:
        try:
            importlib.import_module("scmoe_ds.deepspeed_version")
        except ImportError as error:
            print(f"scmoe {name}: error: {error}", file=sys.stderr)
            return 2
    code: int = importlib.import_module(f"scmoe_ds.programs.{PROGRAMS[name].module}").main(flags)
    return code


def usage() -> str:
    """The help text: one line for each program."""
    rows = [f"  {name:<15}{program.text}" for name, program in PROGRAMS.items()]
    several = "On several ranks: deepspeed --module scmoe_ds.programs.MODULE, or deepspeed pretrain_gpt_scmoe.py"
    return "\n".join(["usage: scmoe PROGRAM [flags]; scmoe PROGRAM --help lists the flags", "", *rows, "", several])


if __name__ == "__main__":
    sys.exit(main())
