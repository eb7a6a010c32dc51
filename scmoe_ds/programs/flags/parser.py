"""argparse whose help fits a screen, and whose errors are one line that names every mistake."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from scmoe_ds.programs.flags.help import HelpAction, HelpFormatter, help_text, is_first_process
from scmoe_ds.programs.flags.unknown import about_unknown, nearest_names, starts_like_a_flag

_RULES: dict[Any, str] = {int: "must be a whole number", float: "must be a number"}
_WORDS = {
    r"argument (\S+): expected .*": r"\1: needs a value; one that begins with a dash is written \1=VALUE",
    r"argument (\S+): not allowed with argument (\S+)": r"\1 and \2: give one of them",
    r"argument (\S+): ": r"\1: ",
    r"the following arguments are required: (.*)": r"\1: missing; --help shows an example",
    r"one of the arguments (.*) is required": r"one of \1 is missing",
}
"""argparse's own words, and ours."""


def _integer(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError("is too large")
    return number


def started_as(otherwise: str) -> str:
    """The command that the user typed: "scmoe PROGRAM", or another one where the `scmoe` command was not used."""
    command = Path(sys.argv[0])
    is_scmoe = command.name == "scmoe" or command.parts[-2:] == ("programs", "__main__.py")
    return f"scmoe {sys.argv[1]}" if is_scmoe else otherwise


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and names all mistakes at once, without its usage.

    Args:
        often: what --help lists, the most used first; --help-all lists everything. Default: both list everything.
        example: a command for the help.
        elsewhere: flags of other programs that this one does not have, each with what serves instead.
    """

    def __init__(
        self,
        *args: Any,
        often: Sequence[str] = (),
        example: str = "",
        elsewhere: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {"formatter_class": HelpFormatter, **kwargs, "allow_abbrev": False, "add_help": False}
        super().__init__(*args, **kwargs)
        self.often, self.example, self.elsewhere = often, example, dict(elsewhere or {})
        self._found: list[str] = []
        self.register("type", int, _integer)
        self.add_argument("-h", "--help", action=HelpAction, help=argparse.SUPPRESS)
        self.add_argument("--help-all", action=HelpAction, help=argparse.SUPPRESS)
        self.add_argument("--debug", action="store_true", help="show the whole stack of an error, C++ too")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; but all mistakes end the program together, each with what to write instead."""
        args = list(sys.argv[1:] if args is None else args)
        self._found = []
        if self._subparsers is not None and not args:
            self.error(f"missing: one of {', '.join(self._subparsers._group_actions[0].choices or ())}")
        if self._subparsers is None and not {"-h", "--help", "--help-all"} & set(args):
            # Before argparse looks: it stops at the first mistake.
            args = self._look_at_flags(args)
        parsed = super().parse_known_args(args, namespace)
        self._end_with_mistakes()
        return parsed

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with an error of one line."""
        args = list(sys.argv[1:] if args is None else args)
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flag, meant = args[args.index(rest[0]) - 1], f"--{rest[0]}"
            takes = f"; {flag} takes no value" if flag in self._option_string_actions else ""
            hint = f" (did you mean {meant}?)" if meant in self._option_string_actions else "; remove it"
            self.error(f"{' '.join(rest)}: belongs to no flag{takes}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, from one process of a job; exit code 2."""
        if not is_first_process():
            raise SystemExit(2)
        found = [*self._found, message]
        if self._found and "required" in message:  # what is missing is what was misspelt
            found.pop()
        for theirs, ours in _WORDS.items():
            found = [re.sub(f"^{theirs}", ours, each) for each in found]
        self.exit(2, f"{self.prog}: error: {'; '.join(dict.fromkeys(found))}\n")

    def format_help(self) -> str:
        """What --help-all prints."""
        return help_text(self, everything=True) + "\n"

    def _look_at_flags(self, args: list[str]) -> list[str]:
        """Finds flags that do not exist, that lack a value or have one too many, and that are required and missing.

        Returns:
            the command line without those that are wrong.
        """
        known, given = list(args), dict[str, list[str]]()
        for flag, values in _by_flag(args):
            action, mistakes = self._option_string_actions.get(flag.partition("=")[0]), len(self._found)
            if action is None:
                self._found.append(about_unknown(flag.partition("=")[0], self))
                _take_out(known, flag, values)
                continue
            name, shown = action.option_strings[0], " ".join([*flag.partition("=")[2:], *values]).strip()
            if action.nargs == 0 and "=" in flag:
                self._found.append(f"{flag}: takes no value; write {name}")
            if action.nargs in (None, "+") and not values and "=" not in flag:
                self._found.append(f"{flag}: needs a value; one that begins with a dash is written {flag}=VALUE")
            elif action.nargs is None and not shown and not isinstance(action, argparse._AppendAction):
                self._found.append(f"{name}: its value is empty, as of a shell variable that is not set; leave it out")
            if len(self._found) > mistakes:
                _take_out(known, flag, values)  # argparse would say it again
            if not isinstance(action, argparse._AppendAction):
                given.setdefault(name, []).append(shown)
        required = [action.option_strings[0] for action in self._actions if action.required and action.option_strings]
        if not self._found and (missing := [name for name in required if name not in given]):
            self.error(f"{', '.join(missing)}: missing; --help shows an example")
        for name, texts in given.items():
            if len(set(texts)) > 1 and is_first_process():
                _say_once(f"{self.prog}: {name} is given {len(texts)} times; the last holds: {texts[-1]}")
        return known

    def _end_with_mistakes(self) -> None:
        if self._found:
            *found, last = self._found
            self._found = found
            self.error(last)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            own = str(error.__context__) if isinstance(error.__context__, argparse.ArgumentTypeError) else ""
            rule = own or _RULES.get(action.type, "is no such value")
            self._found.append(f"{_name(action)} {arg_string or repr('')}: {rule}")
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value is None or action.choices is None or value in action.choices:
            return
        near = nearest_names(str(value), map(str, action.choices))
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        self._found.append(f"{_name(action)} {value}: must be one of {', '.join(map(str, action.choices))}{hint}")
        if isinstance(action, argparse._SubParsersAction):
            self._end_with_mistakes()


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def _take_out(words: list[str], flag: str, values: Sequence[str]) -> None:
    start = words.index(flag)
    del words[start : start + 1 + len(values)]


def _by_flag(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The flags of a command line, each with the words behind it."""
    found: list[tuple[str, list[str]]] = []
    for text in args:
        if text == "--":
            break
        if starts_like_a_flag(text):
            found.append((text, []))
        elif found:
            found[-1][1].append(text)
    return found
