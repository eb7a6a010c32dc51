"""What an adaptation has cost and brought: numbers out of records of training runs and of `scmoe evaluate`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from scmoe_ds.analysis.records import read_json
from scmoe_ds.errors import AnalysisError
from scmoe_ds.training.record import TEACHERS_LOSS, RunRecord

Who = Literal["teacher", "before", "after"]
WHO: tuple[Who, ...] = ("teacher", "before", "after")
"""The source; the student before its training, and after."""


class Evaluated(BaseModel):
    """A record of `scmoe evaluate --output`, as far as the report reads it."""

    model_config = ConfigDict(extra="ignore")

    results: dict[str, Any]
    flags: dict[str, Any]
    checkpoint: str

    @property
    def text(self) -> str | None:
        """What the loss is of; None if tasks were answered."""
        name = self.flags.get("text_file") or self.flags.get("data_path")
        if name is None or not isinstance(self.results.get("loss"), (int, float)):
            return None
        split = f" (validation part of {self.flags['split']})" if self.flags.get("split") else ""
        return f"{name}{split}, windows of {self.flags.get('seq_length')}, stride {self.flags.get('stride')}"

    @property
    def tasks(self) -> dict[str, float]:
        """Each task's number that lm_eval gives first, with its name: "piqa, acc"."""
        found = {}
        for task, numbers in self.results.get("results", {}).items():
            named = [(key, each) for key, each in numbers.items() if "," in key and "_stderr" not in key]
            if named and isinstance(named[0][1], (int, float)):
                found[f"{task}, {named[0][0].partition(',')[0]}"] = float(named[0][1])
        return found


def read_evaluated(flag: str, path: str) -> Evaluated:
    """Raises an AnalysisError if the file is no record of `scmoe evaluate`."""
    try:
        return Evaluated.model_validate(read_json(flag, path))
    except ValidationError:
        raise AnalysisError(f"{flag} {path} is no record that scmoe evaluate --output writes") from None


@dataclass(frozen=True)
class Speed:
    """Medians over the log lines since the schedules were chosen.

    Attributes:
        seconds: of a training step.
        tokens_per_second: of all ranks.
        hidden: share of the communication; None: not measured.
        machine: ranks, nodes and card. Other machines are not compared.
        with_teacher: whether a step has a pass of the teacher in it.
    """

    seconds: float
    tokens_per_second: float
    hidden: float | None
    machine: tuple[Any, ...]
    with_teacher: bool


@dataclass
class Report:
    """All that the page shows.

    Attributes:
        losses: what each loss is of → whose → nats per token.
        tasks: task and metric → whose → its number.
        curve: tokens of the student's training and the validation's loss there.
        validations: what `curve` is of.
        tokens, hours: spent on the student; None: no record of its training.
        tokens_of_teacher: spent on the teacher; None: not known.
        speeds: of the teacher's run and of the student's.
    """

    losses: dict[str, dict[Who, float]] = field(default_factory=dict)
    tasks: dict[str, dict[Who, float]] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    validations: str = ""
    tokens: int | None = None
    hours: float | None = None
    tokens_of_teacher: int | None = None
    speeds: dict[Who, Speed] = field(default_factory=dict)

    @property
    def main(self) -> tuple[str, dict[Who, float]] | None:
        """The loss that the verdict is about: one that teacher and student have both; evaluations come first."""
        both = [each for each in self.losses.items() if {"teacher", "after"} <= each[1].keys()]
        return both[0] if both else None

    @property
    def gap(self) -> float | None:
        """By which share the student's loss is above the teacher's; None: not known."""
        if self.main is None:
            return None
        losses = self.main[1]
        return losses["after"] / losses["teacher"] - 1

    @property
    def speedup(self) -> float | None:
        """How many times as fast the student trains as the teacher; None: not known, or not the same machine."""
        if len(self.speeds) < 2 or self.speeds["teacher"].machine != self.speeds["after"].machine:
            return None
        return self.speeds["after"].tokens_per_second / self.speeds["teacher"].tokens_per_second

    @property
    def still_falls(self) -> float | None:
        """Nats that the validation's loss fell in the last third of the tokens; None: not known."""
        if len(self.curve) < 3 or self.tokens is None:
            return None
        early = [loss for tokens, loss in self.curve if tokens <= 2 / 3 * self.curve[-1][0]]
        return early[-1] - self.curve[-1][1] if early else None


def report(
    runs: Mapping[str, RunRecord], teacher: RunRecord | None, evaluated: Mapping[Who, Sequence[Evaluated]]
) -> Report:
    """
    Args:
        runs: of the student's training, by directory, the first one first. Later ones go on with the result.
        teacher: of the teacher's training; None: there is no record.
        evaluated: whose → records of `scmoe evaluate`.
    """
    found = Report()
    for who in WHO:
        for each in evaluated.get(who, ()):
            if (text := each.text) is not None:
                found.losses.setdefault(text, {})[who] = float(each.results["loss"])
            for task, number in each.tasks.items():
                found.tasks.setdefault(task, {})[who] = number
    for name, run in runs.items():
        _add_run(found, name, run, teacher)
    if teacher is not None:
        found.tokens_of_teacher = sum(tokens for tokens, _ in _spent(teacher)) or None
        if (speed := _speed(teacher)) is not None:
            found.speeds["teacher"] = speed
    return found


def _add_run(found: Report, name: str, run: RunRecord, teacher: RunRecord | None) -> None:
    before, spent = found.tokens or 0, _spent(run)
    found.tokens = before + sum(tokens for tokens, _ in spent)
    found.hours = (found.hours or 0.0) + sum(seconds for _, seconds in spent) / 3600
    speed = _speed(run)
    if speed is not None and (not speed.with_teacher or "after" not in found.speeds):
        found.speeds["after"] = speed
    iterations, losses = run.curve(run.loss_name, "validations")
    if not losses:
        return
    text = _data_of(run)
    if found.validations not in ("", text):  # another text: its losses are no part of the curve
        found.curve = []
    found.validations = text
    per_step, first = int(run.start.get("units_per_step") or 0), run.starts[0].get("iteration", 0)
    found.curve += [
        (before + (at - first) * per_step, loss) for at, loss in zip(iterations, losses, strict=True) if at >= first
    ]
    of_text = found.losses.setdefault(text, {})
    of_text["after"] = losses[-1]
    if iterations[0] <= first and "before" not in of_text and not before:
        of_text["before"] = losses[0]
    _, of_teacher = run.curve(TEACHERS_LOSS, "validations")
    if not of_teacher and teacher is not None and _data_of(teacher) == text:
        _, of_teacher = teacher.curve(teacher.loss_name, "validations")
    if of_teacher:
        of_text["teacher"] = of_teacher[-1]


def _data_of(run: RunRecord) -> str:
    return f"validation of {run.start.get('data', 'the run')}, sequences of {run.start.get('seq_length', '?')}"


def _spent(run: RunRecord) -> list[tuple[int, float]]:
    """Tokens and seconds of each log line."""
    return list(_lines(run))


def _lines(run: RunRecord) -> Iterator[tuple[int, float]]:
    done, per_step = (run.starts[0].get("iteration", 0) if run.starts else 0), run.start.get("units_per_step") or 0
    for iteration, step in run.steps.items():
        steps = max(iteration - done, 0)
        yield steps * int(per_step), steps * float(step.get("seconds_per_iteration") or 0.0)
        done = iteration


def _speed(run: RunRecord) -> Speed | None:
    chosen = run.schedules[-1]["iteration"] if run.schedules else 1
    steps = [each for iteration, each in run.steps.items() if iteration > chosen and each.get("tokens_per_second")]
    if not steps:
        return None
    hidden = [each["hidden"] for each in steps if each.get("hidden") is not None]
    distil = ((run.start.get("adapt") or {}).get("distill") or {}) if isinstance(run.start.get("adapt"), dict) else {}
    return Speed(
        seconds=statistics.median(each["seconds_per_iteration"] for each in steps),
        tokens_per_second=statistics.median(each["tokens_per_second"] for each in steps),
        hidden=statistics.median(hidden) if hidden else None,
        machine=tuple(run.start.get(name) for name in ("ranks", "nodes", "card")),
        with_teacher=bool(distil) and not distil.get("teacher_logits"),
    )
