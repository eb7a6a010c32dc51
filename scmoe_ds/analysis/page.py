"""One page of an analysis: Markdown with its figure beside it, and HTML with the figure inside of it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scmoe_ds.analysis import markdown
from scmoe_ds.errors import AnalysisError, reason_of

Part = str | tuple[str, Any]
"""A paragraph, an HTML tag ("h1", "h2", "pre", "img") and its text, "table" and its rows, the head first, or, for HTML
alone, "svg" and a drawing."""
_STYLE = (
    "body{font:15px sans-serif;max-width:70em;margin:auto}table{border-collapse:collapse}img{max-width:100%}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}"
)


def as_markdown(parts: Sequence[Part], picture: str) -> str:
    """The whole as Markdown.

    Args:
        parts: from top to bottom. All text is escaped: names, descriptions and verdicts come from foreign files.
        picture: path of the figure, from the page.
    """
    return "\n\n".join(_markdown(part, picture) for part in parts) + "\n"


def as_html(parts: Sequence[Part], picture: bytes, title: str) -> str:
    """The whole as one HTML file that loads nothing.

    Args:
        picture: the figure, a PNG; empty without an "img" among the parts.
        title: of the browser's window.
    """
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = "\n".join(_html(part, picture) for part in parts)
    return f"{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"


def write(parts: Sequence[Part], picture: bytes, prefix: str, title: str) -> list[Path]:
    """Writes <prefix>.md, .html and .png. Raises an AnalysisError if they cannot be written."""
    text, web, beside = (Path(prefix + suffix) for suffix in (".md", ".html", ".png"))
    try:
        text.write_text(as_markdown(parts, beside.name), encoding="utf-8")
        web.write_text(as_html(parts, picture, title), encoding="utf-8")
        beside.write_bytes(picture)
    except OSError as error:
        raise AnalysisError(f"--output-prefix {prefix} cannot be written ({reason_of(error)})") from None
    return [text, web, beside]


def _markdown(part: Part, picture: str) -> str:
    tag, value = ("p", part) if isinstance(part, str) else part
    if tag == "table":
        return "\n".join(markdown.table(value[0], value[1:]))
    if tag == "pre":
        return f"```{'json' if value.startswith('{') else ''}\n{value}\n```"
    if tag == "img":
        return f"![{markdown.escape(value)}]({quote(picture)})"
    return {"h1": "# ", "h2": "## "}.get(tag, "") + markdown.paragraph(value)


def _html(part: Part, picture: bytes) -> str:
    tag, value = ("p", part) if isinstance(part, str) else part
    if tag == "table":
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in value]
        return "<table><tr>" + "</tr>\n<tr>".join([rows[0].replace("td>", "th>"), *rows[1:]]) + "</tr></table>"
    if tag == "svg":
        return str(value)
    if tag == "img":
        return f'<img alt="{html.escape(value)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return f"<{tag}>{html.escape(value)}</{tag}>"
