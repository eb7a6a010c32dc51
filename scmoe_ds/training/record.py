"""The record of a training run: `log.jsonl` in its --save directory. One JSON object per line, for programs to read.
Each has its "time", in seconds since 1970.

    {"kind": "start", "iteration": 0, …}         what is trained; one per start or resume of the run
    {"kind": "step", "iteration": 10, …}         the numbers of a log line, and more, with all digits
    {"kind": "validation", "iteration": 100, …}
    {"kind": "schedule", "iteration": 8, …}      what overlaps from then on

Rank 0 appends. A number that JSON does not have (nan, inf) is null. A job that was killed may leave half a line, which
the reader passes over. When a resumed run starts before the last line, its "start" says so: what the earlier attempt
wrote beyond that iteration is not part of the run any more.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "log.jsonl"
TEACHERS_LOSS = "teacher_lm_loss"
"""Of a validation before the first step of a training from another model's weights: the loss of that model."""
Entry = dict[str, Any]
logger = logging.getLogger("scmoe_ds")


class RecordWriter:
    """Appends to a directory's record.

    Args:
        directory: of --save; it is made if need be. None: nothing is written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.path = None if directory is None else Path(directory) / FILE_NAME
        self._failed = False

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        """Appends one entry. A full disk must not end a training run: it is said once, and the entry is lost."""
        if self.path is None:
            return
        entry = {"kind": kind, "iteration": iteration, "time": time.time(), **values}
        line = json.dumps(_finite(entry), allow_nan=False, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:  # opened anew: a file that was moved away does not swallow the rest
                text = f"{line}\n".encode()
                file.write(text if _ends_a_line(file) else b"\n" + text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                logger.warning(
                    f"{self.path} cannot be written: {error.strerror}. The job goes on; its entries are lost"
                )


def _ends_a_line(file: Any) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


@dataclass
class RunRecord:
    """What a run has written, over all its starts.

    Attributes:
        starts: of every start, in order, also of those whose iterations were trained again.
        steps, validations: by iteration, in order of iterations.
        schedules: the schedules that were chosen, in order of iterations.
    """

    starts: list[Entry] = field(default_factory=list)
    steps: dict[int, Entry] = field(default_factory=dict)
    validations: dict[int, Entry] = field(default_factory=dict)
    schedules: list[Entry] = field(default_factory=list)

    @property
    def start(self) -> Entry:
        """What is trained, as the last start says it; empty if no start was recorded."""
        return self.starts[-1] if self.starts else {}

    @property
    def loss_name(self) -> str:
        """The key of the loss without the balancing term: "lm_loss", or "class_loss" for images."""
        return str(self.start.get("loss_name", "lm_loss"))

    def curve(self, name: str, kind: str = "steps") -> tuple[list[int], list[float]]:
        """Iterations and values of a number of "steps" or "validations", where it is known."""
        entries: dict[int, Entry] = getattr(self, kind)
        known = {iteration: each[name] for iteration, each in entries.items() if each.get(name) is not None}
        return list(known), list(known.values())


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """The record of a run.

    Args:
        path: the --save directory, or the file itself.

    Raises:
        FileNotFoundError: there is no record.
    """
    path = Path(path)
    run = RunRecord()
    for entry in _entries(path / FILE_NAME if path.is_dir() else path):
        iteration = entry["iteration"]
        if entry["kind"] == "start":
            run.starts.append(entry)
            run.steps, run.validations = _up_to(run.steps, iteration), _up_to(run.validations, iteration)
            run.schedules = [each for each in run.schedules if each["iteration"] <= iteration]
        elif entry["kind"] == "step":
            run.steps[iteration] = entry
        elif entry["kind"] == "validation":
            run.validations[iteration] = entry
        elif entry["kind"] == "schedule":
            run.schedules.append(entry)
    run.steps, run.validations = dict(sorted(run.steps.items())), dict(sorted(run.validations.items()))
    return run


def _up_to(entries: dict[int, Entry], iteration: int) -> dict[int, Entry]:
    return {number: entry for number, entry in entries.items() if number <= iteration}


def _entries(file: Path) -> Iterator[Entry]:
    """Every whole entry. Unknown kinds and fields, of a later version, are handed on."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # half a line
                continue
            if isinstance(entry, dict) and "kind" in entry and isinstance(entry.get("iteration"), int):
                yield entry
