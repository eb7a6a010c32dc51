"""Escapes foreign text for Markdown, so that it makes no link, heading, table, code or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;"})
_ENTITY = re.compile(r"&(?=#?\w+;)")
# At the start of a line these begin another block than a paragraph: headings, lists, quotes, rules, fences.
_BLOCK = re.compile(r"^([#+=~-]|\d+(?=[.)]))")


def escape(text: object) -> str:
    """A text within a line, on one line."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]])", r"\\\1", _ENTITY.sub("&amp;", line)).translate(_ENTITIES)


def paragraph(text: object) -> str:
    """A text as a paragraph of its own."""
    return _BLOCK.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", escape(text))


def code(text: object) -> str:
    """A text as inline code on one line; it may contain backticks."""
    line = " ".join(str(text).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else ""


def table(header: Sequence[object], rows: Iterable[Sequence[object]], align: str = "---") -> list[str]:
    """The lines of a table. `align` is for all columns but the first ("---:" to the right)."""
    lines = [f"| {' | '.join(escape(cell).replace('|', '&#124;') for cell in row)} |" for row in (header, *rows)]
    return [lines[0], "|---" + f"|{align}" * (len(header) - 1) + "|", *lines[1:]]
