"""Which runs benchmarks.quality.adapt has, in which order: the teachers, and students by importance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.record import QualityError

TEACHER = "teacher"
TRAINED_ON = "trained on"


@dataclass(frozen=True)
class Run:
    """One row of the record, for each seed.

    Attributes:
        name: "<teacher>: <what is done>".
        teacher: key of "teachers" in the settings.
        conversion: position, join and "half" (of the layers); None: the teacher itself, from scratch or trained on.
        recipe: "distill" (alpha, beta, gamma; None: fine-tuning), "shared_expert", "convert_over" (layer by layer over
            that share of the steps), "scratch".
        steps: optimizer steps.
    """

    name: str
    teacher: str
    conversion: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    steps: int

    @property
    def is_teacher(self) -> bool:
        return self.name == teacher_name(self.teacher)

    @property
    def is_hugging_face(self) -> bool:
        return self.teacher == "Qwen3-MoE"


def teacher_name(teacher: str) -> str:
    """The name of a teacher's own training."""
    return f"{teacher}: {TEACHER}"


@dataclass(frozen=True)
class AdaptPlan:
    """The settings file.

    Attributes:
        preset: the whole file; `Crew` reads its "environment".
        runs: by name, in order of importance.
    """

    preset: dict[str, Any]
    runs: dict[str, Run]

    @property
    def tokens_per_iteration(self) -> int:
        return int(self.preset["batch_size"]) * int(self.preset["seq_length"])

    def schedule(self, run: Run) -> dict[str, float]:
        """Steps, warm-up and peak learning rate of a run, as `adapt_hf.deepspeed_json` takes them."""
        teacher, students = self.preset["teachers"][run.teacher], self.preset["students"]
        if run.is_teacher or run.recipe.get("scratch"):
            return {"steps": run.steps, "warmup": teacher["warmup"], "lr": teacher["lr"]}
        return {"steps": run.steps, "warmup": students["warmup"], "lr": teacher["lr"] * students["lr_share"]}

    def section(self, run: Run, layers: Sequence[int] | None = None) -> dict[str, Any]:
        """The "scmoe" section of a run; "adapt" without its source.

        Args:
            layers: MoE layers with the most similar ends first, of which a half is converted.
        """
        teacher = self.preset["teachers"][run.teacher]
        if run.conversion is None:
            return dict(teacher["section"])
        fields = {key: run.conversion[key] for key in ("position", "join") if key in run.conversion}
        section = {**teacher["section"], "architecture": "scmoe", **fields, "merge": "add"}
        if not run.is_hugging_face:
            section["top_k"] = 1
        if run.recipe.get("scratch"):
            return section
        adapt: dict[str, Any] = {"distill": run.recipe["distill"]}
        if run.conversion.get("half"):
            assert layers is not None
            adapt["layers"] = sorted(layers[: teacher["moe_layers"] // 2])
        if "shared_expert" in run.recipe:
            adapt["shared_expert"] = run.recipe["shared_expert"]
        if "convert_over" in run.recipe:
            adapt["convert_every"] = int(run.recipe["convert_over"] * run.steps / teacher["moe_layers"])
        return {**section, "adapt": adapt}

    def select(self, parts: Sequence[str]) -> list[str]:
        """Runs whose name has one of the parts; all without parts.

        Raises:
            QualityError: a part that is in no name.
        """
        for part in parts:
            if not any(part in name for name in self.runs):
                raise QualityError(f"--only {part}: no run has it in its name; there are {', '.join(self.runs)}")
        return [name for name in self.runs if not parts or any(part in name for part in parts)]


def load_plan(path: Path) -> AdaptPlan:
    """
    Raises:
        QualityError: the file cannot be read, or its order names no such run.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        teachers = whole["teachers"]
        named = [line for entry in whole["students"]["order"] for line in _of_line(entry, whole["students"], teachers)]
    except (OSError, ValueError, KeyError) as error:
        raise QualityError(f"--settings {path}: cannot be read ({type(error).__name__}: {error})") from None
    runs = [Run(teacher_name(name), name, None, {}, teacher["steps"]) for name, teacher in teachers.items()]
    return AdaptPlan(whole, {run.name: run for run in [*runs, *named]})


def _of_line(line: str, students: Mapping[str, Any], teachers: Mapping[str, Any]) -> list[Run]:
    """The runs of a line of the order: for each teacher that it is for."""
    if line == TRAINED_ON:
        return [Run(f"{name}: {line}", name, None, {"distill": None}, students["steps"]) for name in teachers]
    for title, conversion in students["conversions"].items():
        recipe = students["recipes"].get(line.removeprefix(f"{title}, "))
        if line.startswith(title) and recipe is not None:
            allowed = conversion.get("teachers", list(teachers)), recipe.get("teachers", list(teachers))
            return [
                Run(f"{name}: {line}", name, conversion, recipe, _steps(recipe, students, teachers[name]))
                for name in teachers
                if all(name in each for each in allowed)
            ]
    raise ValueError(f"order: {line} is no conversion with a recipe")


def _steps(recipe: Mapping[str, Any], students: Mapping[str, Any], teacher: Mapping[str, Any]) -> int:
    steps = int(recipe.get("steps", students["steps"]))
    return int(teacher["steps"]) + steps if recipe.get("scratch") else steps
