"""What a page asks its reader to run: command lines and blocks of Python, in order."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of

ROOT = Path(__file__).parents[2]
PATTERNS = (
    *("README.md", "CONTRIBUTING.md", "docs/*.md", "ds_configs/README.md", "examples/README.md"),
    "scmoe_ds/programs/*.py",
)
STARTS = ("scmoe", "deepspeed", "python", "make", "pip")
"""Programs with which a command line begins. In a block marked as `bash` every line has to begin with one of them."""


@dataclass(frozen=True)
class Step:
    """One command line, without comment and in one line, or one block of Python; where it stands."""

    kind: str  # "command" or "python"
    text: str
    where: str


def pages() -> dict[str, list[Step]]:
    """The pages that ask for something to be run: of the documentation, docstrings of programs, examples in --help."""
    names = [path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    found = {name: list(steps(name)) for name in names}
    for program in PROGRAMS:
        where = f"scmoe {program} --help"
        lines = dict.fromkeys(_lines("\n".join(_examples(parser_of(program)))))
        found[where] = [Step("command", line, where) for line in lines]
    return {name: each for name, each in found.items() if each}


def steps(page: str) -> Iterator[Step]:
    """What a page asks for, in order.

    Raises:
        AssertionError: a line of a `bash` block is no command that is known here.
    """
    content = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".py"):
        docstring = ast.get_docstring(ast.parse(content)) or ""
        yield from (Step("command", line, page) for line in _lines(docstring) if _starts_a_command(line))
        return
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", content, re.DOTALL | re.MULTILINE):
        language, text = block.groups()
        where = f"{page}, line {content.count(chr(10), 0, block.start(2)) + 1}"
        if language == "python":
            yield Step("python", text, where)
        elif language in ("", "bash"):
            for line in _lines(text):
                if _starts_a_command(line):
                    yield Step("command", line, where)
                else:
                    assert not language, f"{where}: {line.split()[0]} is none of STARTS"


def _examples(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The commands that the help of a program and of its sub-commands shows."""
    if isinstance(parser, FlagParser):
        yield parser.example
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _examples(each)


def _starts_a_command(line: str) -> bool:
    """Whether a line begins with a program, perhaps behind variables of its environment."""
    first = next((word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)), "")
    return first.removeprefix(".venv/bin/") in STARTS


def _lines(text: str) -> list[str]:
    """Lines of a shell, joined where a backslash continues them; without comments and blank lines."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
