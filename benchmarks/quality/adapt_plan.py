"""Which runs benchmarks.quality.adapt has, in which order: the teachers, and students by importance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.record import QualityError, identity_of
from scmoe_ds.parallel.agreement import fingerprint

TEACHER = "teacher"
TRAINED_ON = "trained on"
_SECTION_FIELDS = ("position", "join", "top_k")


@dataclass(frozen=True)
class Run:
    """One row of the record, for each seed.

    Attributes:
        name: "<teacher>: <what is done>".
        teacher: key of "teachers" in the settings.
        conversion: position, join, top_k, and "half" of the layers or "all_but" so many, the most similar ends first;
            None: the teacher itself.
        recipe: "distill" (alpha, beta, gamma; None: fine-tuning), "shared_expert", "convert_over" (layer by layer over
            that share of the steps), "scratch".
        steps: optimizer steps.
        line: place in the order; teachers are at 0.
    """

    name: str
    teacher: str
    conversion: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    steps: int
    line: int

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
    """A preset of the settings file; `Crew` and `Record` read it as they read a `record.Plan`.

    Attributes:
        preset: "environment", "corpus", "evaluation", sizes, "teachers" and "students".
        runs: by name, in order of importance.
        common: what the table reads.
    """

    name: str
    preset: dict[str, Any]
    runs: dict[str, Run]
    common: dict[str, Any]

    @property
    def tokens_per_iteration(self) -> int:
        return int(self.preset["batch_size"]) * int(self.preset["seq_length"])

    @property
    def tokens(self) -> int:
        """Training tokens of a teacher, the most of all."""
        return self.tokens_per_iteration * max(int(each["steps"]) for each in self.preset["teachers"].values())

    def identity(self, corpus: Mapping[str, Any]) -> dict[str, Any]:
        """What the runs of one record have in common: all but the students."""
        common = {key: value for key, value in self.preset.items() if key != "students"}
        return {"preset": self.name, **common, "corpus": identity_of(corpus)}

    def fingerprint(self, corpus: Mapping[str, Any]) -> str:
        """Names the directory of the teachers: those of other sizes must not teach."""
        return fingerprint([self.identity(corpus)])

    def variants(self, vocab_size: int) -> dict[str, dict[str, Any]]:
        """What the record says of each run."""
        return {
            name: {
                "section": {"conversion": run.conversion, "recipe": run.recipe, **self.schedule(run)},
                "flags": {},
                "teacher": run.teacher,
            }
            for name, run in self.runs.items()
        }

    def order(self, names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Teachers of all seeds first. Then a line of the settings' order after the other, each with all seeds, so that
        what matters most has them when the time is over."""
        pairs = [(name, seed) for name in names for seed in seeds]
        line = {name: run.line for name, run in self.runs.items()}
        return sorted(pairs, key=lambda pair: (line[pair[0]], pair[1]))

    def schedule(self, run: Run) -> dict[str, float]:
        """Steps, warm-up and peak learning rate of a run, as `adapt_hf.deepspeed_json` takes them."""
        teacher, students = self.preset["teachers"][run.teacher], self.preset["students"]
        if run.is_teacher or run.recipe.get("scratch"):
            return {"steps": run.steps, "warmup": teacher["warmup"], "lr": teacher["lr"]}
        return {"steps": run.steps, "warmup": students["warmup"], "lr": teacher["lr"] * students["lr_share"]}

    def section(self, run: Run) -> dict[str, Any]:
        """The "scmoe" section of a run; "adapt" without source and layers."""
        teacher = self.preset["teachers"][run.teacher]
        if run.conversion is None:
            return dict(teacher["section"])
        fields = {key: run.conversion[key] for key in _SECTION_FIELDS if key in run.conversion}
        section = {**teacher["section"], **teacher["converted"], **fields, "architecture": "scmoe"}
        if run.recipe.get("scratch"):
            return section
        adapt: dict[str, Any] = {"distill": run.recipe["distill"]}
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


def load_plan(path: Path, preset: str) -> AdaptPlan:
    """
    Raises:
        QualityError: the file cannot be read, or its order names no such run.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        chosen = whole["presets"][preset]
        teachers, students = chosen["teachers"], chosen["students"]
        runs = [Run(teacher_name(name), name, None, {}, teacher["steps"], 0) for name, teacher in teachers.items()]
        for number, line in enumerate(students["order"], 1):
            runs += _of_line(line, number, students, teachers)
    except (OSError, ValueError, KeyError) as error:
        raise QualityError(
            f"--settings {path} --preset {preset}: cannot be read ({type(error).__name__}: {error})"
        ) from None
    return AdaptPlan(preset, chosen, {run.name: run for run in runs}, {"within": whole["within"]})


def _of_line(line: str, number: int, students: Mapping[str, Any], teachers: Mapping[str, Any]) -> list[Run]:
    """The runs of a line of the order: one for each teacher that it is for."""
    what, _, recipe_name = line.partition(", ")
    if what == TRAINED_ON:
        recipe = {"distill": None, **students["recipes"].get(recipe_name, {})}
        return [
            Run(f"{name}: {line}", name, None, recipe, _steps(recipe, students, teachers[name]), number)
            for name in teachers
        ]
    for title, conversion in students["conversions"].items():
        recipe = students["recipes"].get(line.removeprefix(f"{title}, "))
        if line.startswith(title) and recipe is not None:
            allowed = conversion.get("teachers", list(teachers)), recipe.get("teachers", list(teachers))
            return [
                Run(f"{name}: {line}", name, conversion, recipe, _steps(recipe, students, teachers[name]), number)
                for name in teachers
                if all(name in each for each in allowed)
            ]
    raise ValueError(f"order: {line} is no conversion with a recipe")


def _steps(recipe: Mapping[str, Any], students: Mapping[str, Any], teacher: Mapping[str, Any]) -> int:
    steps = int(recipe.get("steps", students["steps"]))
    return int(teacher["steps"]) + steps if recipe.get("scratch") else steps
