"""argparse, with errors of one line: what is wrong, and the nearest flag."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from scmoe_ds.config.messages import nearest


def _integer(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large")
    return number


def started_as(otherwise: str) -> str:
    """The command that the user typed: "scmoe PROGRAM", or another one where the `scmoe` command was not used."""
    command = Path(sys.argv[0])
    is_scmoe = command.name == "scmoe" or command.parts[-2:] == ("programs", "__main__.py")
    return f"scmoe {sys.argv[1]}" if is_scmoe else otherwise


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and does not print its usage with every error.

    Args:
        elsewhere: flags of other programs that this one does not have, each with what serves instead.
    """

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self.elsewhere = dict(elsewhere or {})
        self.register("type", int, _integer)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; but a flag that does not exist ends the program, with the nearest that does."""
        args = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            # Before argparse looks: it would miss a flag that is required and misspelt, and say no more.
            flags = [
                text.split("=", 1)[0] for text in args if text.startswith("--") and text != "--" and " " not in text
            ]
            if unknown := [self._unknown(flag) for flag in flags if flag not in {"--", *self._option_string_actions}]:
                self.error("; ".join(dict.fromkeys(unknown)))
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with an error of one line."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"{' '.join(rest)}: belongs to no flag; remove it")
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, from one process of a node; exit code 2."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _unknown(self, flag: str) -> str:
        if flag in self.elsewhere:
            return f"{flag} is not taken here: {self.elsewhere[flag]}"
        shown = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        near = nearest(flag, shown) or nearest(flag, self.elsewhere)
        return f"{flag}: unknown flag" + (f' (did you mean "{near}"?)' if near else "; --help lists them")
