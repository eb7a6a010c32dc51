"""What a step has found, written to a file after every addition: a crash or a time limit loses nothing of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Notes:
    """Numbers, tables and files of one step.

    Attributes:
        path: the JSON file that follows every addition; None: none does.
        numbers: by name; targets.py reads them.
        tables: rows by the title of their table. A row's keys are the heads of its columns.
        files: names of what the step has written beside the record.
    """

    path: Path | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Notes:
        """What a step has written so far; nothing if it has not begun."""
        content: Mapping[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return cls(None, **content)

    def number(self, name: str, value: float) -> None:
        """Notes a number. What was not finite stays out: JSON does not have it, and no target meets it."""
        if math.isfinite(value):
            self.numbers[name] = float(value)
        self._write()

    def row(self, table: str, **cells: Any) -> None:
        """Adds a row to a table."""
        self.tables.setdefault(table, []).append(cells)
        self._write()

    def file(self, name: str) -> None:
        """Names a file that the step has written."""
        self.files.append(name)
        self._write()

    def content(self) -> dict[str, Any]:
        """All but the path, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "path"}

    def _write(self) -> None:
        if self.path is not None:
            whole = self.path.with_suffix(".new")
            whole.write_text(json.dumps(self.content()), "utf-8")
            whole.replace(self.path)  # a process that is killed leaves no half file
