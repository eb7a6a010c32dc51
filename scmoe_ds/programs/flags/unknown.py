"""What to say of a flag that a program does not have: the nearest that it has, a JSON key, the program that has it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from scmoe_ds.programs.flags.other_names import OTHER_NAMES
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of

_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""Documents and chats turn "--" into other dashes."""


def starts_like_a_flag(text: str) -> bool:
    """Whether a word of a command line is a flag: dashes and a letter, and not a text with spaces."""
    return text.startswith(tuple(_DASHES)) and text.lstrip(_DASHES)[:1].isalpha() and " " not in text


def about_unknown(flag: str, parser: Any) -> str:
    """What a user may have meant.

    Args:
        flag: as it was typed.
        parser: the FlagParser that lacks it.
    """
    name = _plain(flag)
    taken: Mapping[str, argparse.Action] = parser._option_string_actions
    names = {_plain(each): each for each in taken}
    joined = {each.replace("-", ""): full for each, full in names.items()}
    if same := names.get(name) or joined.get(name.replace("-", "")):
        return _did_you_mean(flag, [same])
    refused = {_plain(each): reason for each, reason in parser.elsewhere.items()}
    answer = refused.get(name) or OTHER_NAMES.get(name, "")
    if answer in taken:
        return f"{flag} is called {answer} here"
    if name in refused or (" " in answer and "--deepspeed_config" in taken):
        return f"{flag} is not taken here: {answer}"
    shown = {plain: full for plain, full in names.items() if taken[full].help != argparse.SUPPRESS}
    for candidates, cutoff in ((shown, 0.8), (names, 0.8)):
        if near := nearest_names(name, candidates, cutoff):
            return _did_you_mean(flag, [names[each] for each in near])
    if programs := _programs_with(name):
        return f"{flag} is a flag of {', '.join(programs)}"
    if close := nearest_names(name, refused, cutoff=0.85):
        return f"{flag}: unknown flag (nearest: --{close[0]}, which is not taken here: {refused[close[0]]})"
    return _did_you_mean(flag, [names[each] for each in nearest_names(name, shown)])


def nearest_names(name: str, names: Iterable[str], cutoff: float = 0.65) -> list[str]:
    """Names that begin as this one does, three at most; else the one that looks most like it, if any does."""
    names = list(names)
    if len(name) > 2 and (longer := [each for each in names if each.startswith(name)]):
        return longer[:3]
    return difflib.get_close_matches(name, names, n=1, cutoff=cutoff)


def _did_you_mean(flag: str, near: list[str]) -> str:
    return f"{flag}: unknown flag" + (f" (did you mean {' or '.join(near)}?)" if near else "; --help-all shows all")


def _plain(flag: str) -> str:
    return flag.lstrip(_DASHES).lower().replace("_", "-")


def _programs_with(name: str) -> list[str]:
    """Programs that have a flag of this name, and programs' commands."""
    found = []
    for program in PROGRAMS:
        parser = parser_of(program)
        commands = parser._subparsers._group_actions[0].choices.values() if parser._subparsers else []
        if any(name in map(_plain, each._option_string_actions) for each in (parser, *commands)):
            found.append(f"scmoe {program}")
    return found
