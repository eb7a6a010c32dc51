"""How a program's help reads: --help fits a screen, --help-all lists everything."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from contextlib import suppress
from typing import Any

from scmoe_ds.errors import LauncherError
from scmoe_ds.parallel.launchers import adopt_launcher

WIDTH = 98
"""Of 100 columns; an ellipsis that becomes three dots may need two more."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line for most flags; a default is shown where it says something and the help does not name it."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=36, width=WIDTH)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else action.dest.split("_")[-1].upper()

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or default_metavar} ..."
        if action.choices is not None and action.option_strings:
            return str(action.metavar or "|".join(map(str, action.choices)))
        return str(super()._format_args(action, default_metavar))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return str(super()._format_action_invocation(action))
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS, [], -1) or "default" in text or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})" if text else f"default: {shown}"


class HelpAction(argparse.Action):
    """--help and --help-all: prints on one process of a job, and ends."""

    def __init__(self, option_strings: Any, dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if is_first_process():
            # Not print(): a reader that has gone (`| head`) is no error.
            parser._print_message(help_text(parser, everything=option_string == "--help-all") + "\n", sys.stdout)
        parser.exit()


def help_text(parser: Any, everything: bool) -> str:
    """The help of a FlagParser; without `everything` that of the flags in its `often`, if it has any."""
    words = [str(action.metavar or action.dest).upper() for action in parser._get_positional_actions()]
    shown = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    groups = [(group.title, group.description, group._group_actions) for group in parser._action_groups]
    closing = parser.epilog
    if parser.often and not everything:
        groups = [("flags that are used most", None, [parser._option_string_actions[flag] for flag in parser.often])]
        closing = f"--help-all shows all {sum(bool(each.option_strings) for each in shown)} flags."
    formatter = parser.formatter_class(prog=parser.prog)
    for title, text, actions in groups:
        formatter.start_section(title)
        formatter.add_text(text)
        formatter.add_arguments(actions)
        formatter.end_section()
    paragraphs = [
        " ".join(["usage:", parser.prog, *words, "[flags]"]),
        parser.description,
        f"example:\n  {parser.example}" if parser.example else None,
        formatter.format_help().strip(),
        closing,
    ]
    text = "\n\n".join(_wrapped(each) for each in paragraphs if each)
    return text.replace("\u2026", "...")  # a terminal may know ASCII alone


def is_first_process() -> bool:
    """Whether this process speaks for all: the command line is the same on every rank."""
    environment = dict(os.environ)
    with suppress(LauncherError):
        adopt_launcher(environment)
    return environment.get("RANK", environment.get("LOCAL_RANK", "0")) == "0"


def _wrapped(text: str) -> str:
    return "\n".join(
        part
        for line in text.split("\n")
        for part in ([line] if line.startswith(" ") else textwrap.wrap(line, WIDTH) or [""])
    )
