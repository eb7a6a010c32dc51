"""Steps that somebody measured, from a file: what `scmoe plan --fit` reads. No torch.

- `log.jsonl` of a training run, or its --save directory: the run's own layout, its steps behind the first ones;
- what a training printed: lines of this package, of Megatron-DeepSpeed or of DeepSpeed's throughput timer;
- a CSV file with a line of names, or a JSON list of objects: one step per row, and what differs in its layout.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ArgumentError, one_line, reason_of
from scmoe_ds.training.record import FILE_NAME, RunRecord, read_record

WARM_UP = 3
"""Steps at the start of a run that pay for allocations and calibration."""
TIMES = {"step_ms": "total", "exposed_ms": "exposed", "reduce_ms": "reduce", "optimizer_ms": "optimizer"}
LAYOUT = {
    "expert_parallel": int,
    "tensor_parallel": int,
    "zero_stage": int,
    "micro_batch": int,
    "accumulation": int,
    "world": int,
    "precision": str,
    "recompute": bool,
}
_RATES = ("tokens_per_second", "samples_per_second")
_COLUMNS = ("name", "method", *TIMES, "seconds_per_iteration", *_RATES, *LAYOUT)
_LINES: tuple[tuple[re.Pattern[str], Callable[[float], tuple[str, float]]], ...] = (
    (re.compile(r"elapsed time per iteration \(ms\): ([0-9.eE+]+)"), lambda found: ("step_ms", found)),
    (re.compile(r"\biter +\d+/\d+ .* ([0-9.]+[kMG]?) tok/s"), lambda found: ("tokens_per_second", found)),
    (re.compile(r"\biter +\d+/\d+ .* ([0-9.]+[kMG]?) img/s"), lambda found: ("samples_per_second", found)),
    (re.compile(r"CurrSamplesPerSec=([0-9.eE+]+)"), lambda found: ("samples_per_second", found)),
)
_PREFIX = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class MeasuredRow:
    """A step as a file has it.

    Attributes:
        name: of the row, or the file.
        times: any of `TIMES`' names, "seconds_per_iteration", "tokens_per_second", "samples_per_second".
        layout: what differs from the layout that the command line gives, by the names of `simulate.layout.Layout`.
        method: its name; "": the command line's.
        spread: of the step's time, relative.
        facts: of a run's start, to compare the model by; empty: not known.
    """

    name: str
    times: Mapping[str, float]
    layout: Mapping[str, Any]
    method: str = ""
    spread: float = 0.0
    facts: Mapping[str, Any] | None = None

    def parts(self, samples: int, tokens: int) -> dict[str, float]:
        """Milliseconds: "total" of the step, and the others of `TIMES` that are known.

        Args:
            samples: in a step of all ranks.
            tokens: of a sample.
        """
        times = self.times
        if "step_ms" in times:
            total = times["step_ms"]
        elif "seconds_per_iteration" in times:
            total = 1e3 * times["seconds_per_iteration"]
        elif "tokens_per_second" in times:
            total = 1e3 * samples * tokens / times["tokens_per_second"]
        else:
            total = 1e3 * samples / times["samples_per_second"]
        return {
            "total": total,
            **{TIMES[name]: ms for name, ms in times.items() if name in TIMES and name != "step_ms"},
        }


def read_measured(path: Path) -> list[MeasuredRow]:
    """The rows of a file.

    Raises:
        ArgumentError: no file, no steps, a number that cannot be, an unknown column.
    """
    try:
        if path.is_dir() or path.suffix == ".jsonl":
            return [_of_record(path)]
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return _rows(path, list(csv.DictReader(file, skipinitialspace=True)))
        if path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
            return _rows(path, content.get("steps") if isinstance(content, dict) else content)
        return [_of_lines(path, path.read_text("utf-8", errors="replace"))]
    except FileNotFoundError:
        what = f"a directory without {FILE_NAME}" if path.is_dir() else "not there"
        raise ArgumentError(f"--fit {path}: {what}; name a training's log, its --save directory, CSV or JSON") from None
    except OSError as error:
        raise ArgumentError(f"--fit {path}: {reason_of(error)}; name a file that can be read") from None
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        if isinstance(error, ArgumentError):
            raise
        what = "is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ArgumentError(f"--fit {path}: {what}; correct the file") from None


def _of_record(path: Path) -> MeasuredRow:
    run = read_record(path)
    steps = _settled(run)
    if not steps:
        raise ArgumentError(
            f"--fit {path}: no step behind the first {WARM_UP} iterations; train longer, or name another run"
        )
    seconds = [float(step["seconds_per_iteration"]) for step in steps]
    times = {"seconds_per_iteration": _checked(path, "seconds_per_iteration", statistics.median(seconds))}
    exposed = [float(step["exposed_ms"]) for step in steps if step.get("exposed_ms") is not None]
    if exposed:
        times["exposed_ms"] = statistics.median(exposed)
    start = run.start
    names = {
        "expert_parallel": "expert_parallel",
        "tensor_parallel": "tensor_parallel",
        "zero_stage": "zero_stage",
        "micro_batch_size": "micro_batch",
        "accumulation_steps": "accumulation",
        "ranks": "world",
        "precision": "precision",
    }
    layout = {ours: start[theirs] for theirs, ours in names.items() if start.get(theirs) is not None}
    return MeasuredRow(str(path), times, layout, spread=_spread(seconds), facts=start)


def _settled(run: RunRecord) -> list[dict[str, Any]]:
    """The steps behind the warm-up and the choice of schedules."""
    chosen = max((int(each["iteration"]) for each in run.schedules), default=0)
    first = max(WARM_UP, chosen, min(run.steps, default=0))  # a mean over the first steps has their allocations in it
    return [
        step for number, step in run.steps.items() if number > first and step.get("seconds_per_iteration") is not None
    ]


def _of_lines(path: Path, text: str) -> MeasuredRow:
    for pattern, entry in _LINES:
        values = [_number(found) for found in pattern.findall(text)]
        if len(values) > WARM_UP:
            settled = values[WARM_UP:]
            name, value = entry(statistics.median(settled))
            return MeasuredRow(str(path), {name: _checked(path, name, value)}, {}, spread=_spread(settled))
    raise ArgumentError(
        f"--fit {path}: no steps in it, or no more than {WARM_UP}; it needs lines such as 'iter 50/300 … 3625 tok/s', "
        "'elapsed time per iteration (ms): 1234.5' or 'CurrSamplesPerSec=12.3', or name a CSV or JSON file"
    )


def _number(text: str) -> float:
    return float(text.rstrip("kMG")) * _PREFIX.get(text[-1], 1.0)


def _rows(path: Path, rows: Any) -> list[MeasuredRow]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ArgumentError(
            f"--fit {path}: has no steps; it needs rows with step_ms, and what differs in each row's layout"
        )
    return [_row(path, number, row) for number, row in enumerate(rows, start=1)]


def _row(path: Path, number: int, row: Mapping[Any, Any]) -> MeasuredRow:
    given = {str(name).strip(): value for name, value in row.items() if value not in (None, "")}
    for name in given.keys() - set(_COLUMNS):
        near = get_close_matches(name, _COLUMNS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(_COLUMNS)}"
        raise ArgumentError(f"--fit {path}: row {number}: {name}: no such column; {remedy}")
    times = {
        name: _checked(path, f"row {number}: {name}", value)
        for name, value in given.items()
        if name in TIMES or name == "seconds_per_iteration" or name in _RATES
    }
    if not times.keys() & {"step_ms", "seconds_per_iteration", *_RATES}:
        raise ArgumentError(f"--fit {path}: row {number}: has no step_ms; add the milliseconds of a step")
    for name in TIMES:
        if times.get(name, 0.0) > times.get("step_ms", math.inf):
            raise ArgumentError(f"--fit {path}: row {number}: {name} = {times[name]:g}: is longer than step_ms")
    layout = {name: _setting(path, number, name, given[name]) for name in LAYOUT if name in given}
    return MeasuredRow(str(given.get("name", f"row {number}")), times, layout, str(given.get("method", "")))


def _setting(path: Path, number: int, name: str, value: Any) -> Any:
    kind = LAYOUT[name]
    if kind is bool:
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise ArgumentError(f"--fit {path}: row {number}: {name} = {value}: must be true or false")
        return str(value).lower() in ("true", "1")
    try:
        read = kind(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"--fit {path}: row {number}: {name} = {value}: must be a whole number") from None
    if kind is int and read < (0 if name == "zero_stage" else 1):
        raise ArgumentError(f"--fit {path}: row {number}: {name} = {value}: must be positive; correct the row")
    if name == "zero_stage" and read > 3:
        raise ArgumentError(f"--fit {path}: row {number}: {name} = {value}: must be 0, 1, 2 or 3")
    return read


def _checked(path: Path, where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"--fit {path}: {where} = {value}: must be a number") from None
    is_part = where.endswith(("exposed_ms", "reduce_ms", "optimizer_ms"))
    if (number != 0 and not 1e-9 <= number <= 1e12) or (number == 0 and not is_part):
        raise ArgumentError(f"--fit {path}: {where} = {value}: no step takes that; correct or remove it")
    return number


def _spread(values: Sequence[float]) -> float:
    """Of the median of these values, relative: from the 10th and the 90th percentile of one."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return (high - low) / 2 / statistics.median(ordered) / math.sqrt(len(ordered))
