"""Predicts whether ScMoE pays for a model on a machine. Reads a similarity record and a calibration's times; needs
neither model nor machine.

A calibration is for one position. The backbone of Pos-1 is the end of Pos-2's, which is the end of Pos-3's. Therefore
the timed operators also give other positions; a position with an operator that was not timed is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from scmoe_ds.analysis.records import read_json
from scmoe_ds.analysis.similarity import POSITIONS
from scmoe_ds.errors import AnalysisError, ScMoEConfigError
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.calibration_file import Description, find_times
from scmoe_ds.planner.plan import BreakEven, Mode, Plan, break_even, plan, simulate
from scmoe_ds.planner.times import SHARED, ChunkTimes, OperatorTime, OperatorTimes, PassTimes

MODES: tuple[Mode, ...] = ("forward", "train")
MIN_SPEEDUP = 1.01  # less is "next to nothing", as in the log of a calibration
BACKBONES = {
    "pos1": ("attention", "shared"),
    "pos2": ("mlp", "attention", "shared"),
    "pos3": ("attention", "mlp", "attention", "shared"),
}


@dataclass(frozen=True)
class Prediction:
    """One position in one mode, from shortcut to join: its plan, and the time of a blocking top-(k+1) MoE without a
    shared expert on the same backbone."""

    plan: Plan
    standard_ms: float
    limits: BreakEven

    @property
    def speedups(self) -> tuple[float, float]:
        """Against the same layer without overlap, and against the standard MoE."""
        fast = self.plan.predicted.total_ms
        return (self.plan.serial.total_ms / fast, self.standard_ms / fast) if fast else (1.0, 1.0)

    @property
    def saved_ms(self) -> float:
        """Time saved by overlap. It compares positions; a ratio would also depend on the length of the backbone."""
        return self.plan.serial.total_ms - self.plan.predicted.total_ms

    @property
    def hidden_ms(self) -> float:
        """Communication during computation."""
        return self.plan.predicted.communication_ms - self.plan.predicted.exposed_ms


@dataclass(frozen=True)
class PositionStudy:
    """A position: its backbone (None when an operator was not timed), the source of its times, and predictions."""

    backbone: Sequence[OperatorTime] | None
    source: str
    predictions: Mapping[Mode, Prediction]

    def window_ms(self, phase: str) -> float | None:
        """Computation between shortcut and join, "forward" or "backward"."""
        return None if self.backbone is None else float(sum(getattr(each, f"{phase}_ms") for each in self.backbone))


@dataclass(frozen=True)
class KindStudy:
    """MoE layers that share their times, and their positions by name."""

    description: Description
    top_k: int
    times: OperatorTimes
    positions: Mapping[str, PositionStudy]

    def communication_ms(self, phase: str) -> float:
        """Dispatch and combine in one chunk, or their gradients."""
        one = self.times.chunks[1]
        return float(getattr(one.dispatch, f"{phase}_ms") + getattr(one.combine, f"{phase}_ms"))


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Layer(_Part):
    stage: int
    block: int
    cosine: float


class _Position(_Part):
    mean: float | None
    least: float | None
    passes: bool
    layers: list[_Layer]


class _Verdict(_Part):
    text: list[str]
    threshold: float
    positions: dict[Literal["pos1", "pos2", "pos3"], _Position]

    @field_validator("positions")
    @classmethod
    def _all(cls, found: dict[str, _Position]) -> dict[str, _Position]:
        if missing := [name for name in POSITIONS if name not in found]:
            raise ValueError(f"{missing[0]} is missing")
        return found


class _Record(_Part):
    """The part of a similarity record that the page shows."""

    model: str
    verdict: _Verdict


def read_similarity(path: str) -> dict[str, Any]:
    """A record of the sub-command "similarity". Raises an AnalysisError if it is none."""
    record = read_json("--similarity", path)
    if not isinstance(record, dict) or record.get("kind") != "similarity":
        raise AnalysisError(f'--similarity {path} is no record of "similarity", which scmoe analyze writes')
    try:
        return _Record.model_validate(record).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        raise AnalysisError(
            f"--similarity {path} is incomplete or damaged: {place}: {first['msg']}; run the analysis again"
        ) from None


def read_times(path: str) -> list[tuple[Description, OperatorTimes]]:
    """Description and times of every kind of layers in a "calibration_file"; an AnalysisError if it has none."""
    saved, source = read_json("--calibration", path), f"--calibration {path}"
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        raise AnalysisError(
            f"{source} is not a calibration (a JSON list of objects): give the file that "
            '"scmoe": {"overlap": {"calibration_file": …}} names'
        )
    if not saved:
        raise AnalysisError(f"{source} has no times; measure them with scmoe report")
    found = []
    for entry in saved:
        description = entry.get("description") if isinstance(entry.get("description"), dict) else {}
        try:
            found += [(description, times) for times in find_times([entry], [description], (1,), source)]
        except ScMoEConfigError as error:
            raise AnalysisError(str(error)) from None
        if type(top_k := description.get("top_k", 1)) is not int or not 1 <= top_k <= 10**6:
            raise AnalysisError(f"{source} is damaged: top_k {str(top_k)[:40]!r} is no number of experts")
    return found


def study(description: Description, times: OperatorTimes) -> KindStudy:
    """Windows and predictions of all positions for one kind of layers."""
    top_k = int(description.get("top_k", 1))
    return KindStudy(description, top_k, times, {name: _study(name, times, top_k) for name in POSITIONS})


def _study(position: str, times: OperatorTimes, top_k: int) -> PositionStudy:
    known = [each.kind for each in times.backbone]
    backbone: list[OperatorTime] = []
    missing, source = [], "its operators as timed"
    for place, name in enumerate(reversed(BACKBONES[position]), start=1):
        if place <= len(known) and known[-place] == name:
            backbone.insert(0, times.backbone[-place])
        elif name in known:  # all blocks of a model are alike, and so are their attentions
            backbone.insert(0, times.backbone[known.index(name)])
            source = f"its operators as timed, one {name} standing for two"
        else:
            missing.append(name)
    if missing:
        return PositionStudy(None, "not timed: " + ", ".join(dict.fromkeys(missing)), {})
    own = times.model_copy(update={"backbone": tuple(backbone)})
    return PositionStudy(backbone, source, {mode: _predict(own, top_k, mode) for mode in MODES})


def _predict(times: OperatorTimes, top_k: int, mode: Mode) -> Prediction:
    def grown(part: PassTimes) -> PassTimes:
        return PassTimes(**{key: ms * (top_k + 1) / top_k for key, ms in part.model_dump().items()})

    one = times.chunks[1]
    chunks = {1: ChunkTimes(dispatch=grown(one.dispatch), experts=grown(one.experts), combine=grown(one.combine))}
    backbone = tuple(each for each in times.backbone if each.kind not in SHARED)
    standard = times.model_copy(update={"backbone": backbone, "chunks": chunks})
    standard_ms = simulate(standard, Schedule(1, overlap=False), mode).total_ms
    return Prediction(plan(times, mode), standard_ms, break_even(times, mode))


def settings(position: str, verdict: Mapping[str, Any]) -> dict[str, str | None] | None:
    """The JSON settings for a position that the similarity allows in all MoE layers, or in all but the first."""
    layers = verdict["positions"][position]["layers"]
    below = [layer for layer in layers if layer["cosine"] < verdict["threshold"]]
    if layers and not below:
        return {"position": position, "first_layer_position": None}
    if len(layers) < 2 or below != layers[:1]:
        return None
    others = {
        name: layer["cosine"]
        for name in POSITIONS
        for layer in verdict["positions"][name]["layers"]
        if all(layer[key] == below[0][key] for key in ("stage", "block"))
    }
    first = max(others, key=lambda name: others[name])
    return {"position": position, "first_layer_position": first} if others[first] >= verdict["threshold"] else None


def conclude(kind: KindStudy, verdict: Mapping[str, Any]) -> tuple[str, str | None, dict[str, str | None] | None]:
    """ "pays", "pays if …", "does not pay" or "cannot be said", with the position and its settings."""
    known = {name: each.predictions["train"] for name, each in kind.positions.items() if each.predictions}
    if not kind.communication_ms("forward") + kind.communication_ms("backward"):
        return "does not pay: nothing travels between the ranks, there is no communication to hide", None, None
    if not known:
        return "cannot be said from this calibration: no position has all of its operators timed", None, None
    fast = {name: each for name, each in known.items() if min(each.speedups) >= MIN_SPEEDUP}
    if not fast:
        best = max(known, key=lambda name: known[name].saved_ms)
        return "does not pay: it is predicted to gain next to nothing", best, None
    found = {name: chosen for name in fast if (chosen := settings(name, verdict))}
    if found:
        # A tap closer to the MoE is at least as similar, so a farther one must save more.
        best = max(found, key=lambda name: (round(fast[name].saved_ms, 3), -POSITIONS.index(name)))
        return "pays", best, found[best]
    least = {name: verdict["positions"][name]["least"] for name in fast}
    best = max(fast, key=lambda name: -2.0 if least[name] is None else least[name])
    word = "pays if training with this shortcut keeps the quality, which the similarity does not promise"
    return word, best, {"position": best, "first_layer_position": None}
