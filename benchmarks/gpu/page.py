"""An acceptance record as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scmoe_ds.analysis.markdown import code, escape, table

REHEARSAL = (
    "**CPU rehearsal: numbers mean nothing.** The steps ran with tiny sizes on a CPU, to test the steps themselves."
)


def markdown(record: dict[str, Any]) -> str:
    """The page of a record, finished or not."""
    where = record["environment"]
    lines = [f"# Acceptance on {record['gpus']} × {escape(where['device'])}", ""]
    if record["rehearsal"]:
        lines += [REHEARSAL, ""]
    lines += [f"{code(record['command'])}, {where['date']}, commit {where['commit']}.", ""]
    lines += [*_environment(where), "", "## Targets", "", *_rows(record["targets"]), ""]
    lines += ["## Steps", "", *_rows([_summary(step) for step in record["steps"]]), ""]
    for step in record["steps"]:
        lines += _step(step)
    return "\n".join(lines).rstrip() + "\n"


def _environment(where: dict[str, str]) -> list[str]:
    names = [name for name in where if name not in ("device", "date", "commit")]
    return table(names, [[where[name] for name in names]])


def _summary(step: dict[str, Any]) -> dict[str, Any]:
    seconds = "–" if step["seconds"] is None else f"{step['seconds']:.0f}"
    return {"step": step["name"], "question": step["question"], "result": step["result"], "s": seconds}


def _step(step: dict[str, Any]) -> Iterator[str]:
    if not (step["tables"] or step["last_lines"] or step["files"]):
        return
    yield from (f"## {step['name']}", "", escape(step["question"]), "")
    for title, rows in step["tables"].items():
        yield from (f"### {escape(title)}", "", *_rows(rows), "")
    if step["files"]:
        yield from ("Files: " + ", ".join(map(code, step["files"])), "")
    if step["last_lines"]:
        fence = "`" * max(4, 1 + max(len(line) - len(line.lstrip("`")) for line in step["last_lines"]))
        yield from (
            f"It ended with “{escape(step['result'])}”. Its last lines:",
            "",
            fence,
            *step["last_lines"],
            fence,
            "",
        )


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return table(heads, [[row.get(head, "–") for head in heads] for row in rows])
