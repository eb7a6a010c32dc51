"""Predicts whether ScMoE pays for a model on a machine. Reads a similarity record and a calibration's times of that
model; needs neither model nor machine.

Times decide. Similarity is a hint: it decides nothing, because in our own runs it foretold nothing (QUALITY_RUNS).

A calibration is for one position. The backbone of Pos-1 is the end of Pos-2's, which is the end of Pos-3's. Therefore
the timed operators also give other positions; a position with an operator that was not timed is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from scmoe_ds.analysis.records import read_json
from scmoe_ds.analysis.similarity import POSITIONS
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import AnalysisError, ScMoEConfigError
from scmoe_ds.models.identity import Identity, differences
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.calibration_file import Description, find_times
from scmoe_ds.planner.plan import BreakEven, Plan, break_even, plan
from scmoe_ds.planner.simulation import Mode, simulate
from scmoe_ds.planner.speed_text import NOTICEABLE, change, compared
from scmoe_ds.planner.times import SHARED, ChunkTimes, OperatorTime, OperatorTimes, PassTimes

_OLD = "an earlier version of scmoe_ds wrote it; "
MODES: tuple[Mode, ...] = ("forward", "train")
DEFAULT: str = ScMoEConfig.model_fields["position"].default
QUALITY_RUNS = (
    ("Pos-1", "0.995, 0.999", "−0.020 ± 0.006"),
    ("Pos-2", "0.13, 0.99", "−0.046 ± 0.004"),
    ("Pos-2, in the first MoE layer Pos-1", "0.995, 0.99", "−0.020 ± 0.005"),
    ("Pos-3", "0.08, 0.99", "−0.045 ± 0.005"),
)
"""Position, similarity in both MoE layers, loss less that of top-2 (CG-1, three seeds, nats per token) of
benchmarks/results/quality.md and analyses.md."""
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
    def pays(self) -> bool:
        """Whether it is noticeably faster than both."""
        return all(change(speedup) == "gain" for speedup in self.speedups)

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
    identity: dict[str, Any]
    verdict: _Verdict


def read_similarity(path: str) -> dict[str, Any]:
    """A record of the sub-command "similarity". Raises an AnalysisError if it is none."""
    record = read_json("--similarity", path)
    if not isinstance(record, dict) or record.get("kind") != "similarity":
        raise AnalysisError(f'--similarity {path} is no record of "similarity", which scmoe analyze writes')
    if "verdict" in record and "identity" not in record:
        raise AnalysisError(f"--similarity {path} does not say which model it is of: {_OLD}run the analysis again")
    try:
        return _Record.model_validate(record).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        raise AnalysisError(
            f"--similarity {path} is incomplete or damaged: {place}: {first['msg']}; run the analysis again"
        ) from None


@dataclass(frozen=True)
class Times:
    """A "calibration_file": which model it is of; description and times of every kind of layers."""

    identity: Identity
    kinds: Sequence[tuple[Description, OperatorTimes]]


def read_times(path: str) -> Times:
    """Raises an AnalysisError if the file has no times, or does not say of which model."""
    return times_of(read_json("--calibration", path), f"--calibration {path}")


def times_of(saved: Any, source: str) -> Times:
    """Of what `Calibrator.state` gave, from the source of that name. Raises an AnalysisError as `read_times`."""
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        raise AnalysisError(
            f"{source} is not a calibration (a JSON list of objects): give the file that "
            '"scmoe": {"overlap": {"calibration_file": …}} names'
        )
    if not saved:
        raise AnalysisError(f"{source} has no times; measure them with scmoe report")
    kinds = []
    for entry in saved:
        description = entry.get("description") if isinstance(entry.get("description"), dict) else {}
        try:
            kinds += [(description, times) for times in find_times([entry], [description], (1,), source)]
        except ScMoEConfigError as error:
            raise AnalysisError(str(error)) from None
        if type(top_k := description.get("top_k", 1)) is not int or not 1 <= top_k <= 10**6:
            raise AnalysisError(f"{source} is damaged: top_k {str(top_k)[:40]!r} is no number of experts")
    identity = saved[0].get("identity")
    if not isinstance(identity, dict):
        raise AnalysisError(
            f"{source} does not say which model it is of: {_OLD}remove it, and measure again with scmoe report"
        )
    if any(entry.get("identity") != identity for entry in saved):
        raise AnalysisError(f"{source} has times of several models; measure again with scmoe report")
    return Times(identity, kinds)


def check_one_model(similarity: str, of_similarity: Identity, calibration: str, of_times: Identity) -> None:
    """Raises an AnalysisError if the files of these names are of models of other sizes, or have no size in common."""
    files = f"--similarity {similarity} and --calibration {calibration}"
    if found := differences(of_similarity, of_times):
        listed = "; ".join(found)[:300]
        raise AnalysisError(f"{files} are of two models ({listed}): measure both of one model")
    if not of_similarity.keys() & of_times.keys():
        raise AnalysisError(f"{files} do not say whether they are of one model: no size stands in both; measure again")


def study(description: Description, times: OperatorTimes) -> KindStudy:
    """Windows and predictions of all positions for one kind of layers."""
    top_k = int(description.get("top_k", 1))
    return KindStudy(description, top_k, times, {name: _study(name, times, top_k) for name in POSITIONS})


def _study(position: str, times: OperatorTimes, top_k: int) -> PositionStudy:
    backbone, source = timed_backbone(BACKBONES[position], times)
    if backbone is None:
        return PositionStudy(None, source, {})
    late = times.late
    if late is not None and len(times.backbone) > 2:  # otherwise there is an MoE in every block, and one position
        late = late.model_copy(update={"after_dispatch": position == "pos3"})
    own = times.model_copy(update={"backbone": tuple(backbone), "late": late})
    return PositionStudy(backbone, source, {mode: _predict(own, top_k, mode) for mode in MODES})


def timed_backbone(kinds: Sequence[str], times: OperatorTimes) -> tuple[list[OperatorTime] | None, str]:
    """Operators of these kinds as they were timed in a backbone that may be another position's, and where from; None
    and the missing kinds if one was not timed."""
    known = [_kind(each) for each in times.backbone]
    backbone: list[OperatorTime] = []
    missing, source = [], "its operators as timed"
    for place, kind in enumerate(reversed(kinds), start=1):
        if place <= len(known) and known[-place] == kind:
            backbone.insert(0, times.backbone[-place])
        elif kind in known:  # all blocks of a model are alike, and so are their attentions
            backbone.insert(0, times.backbone[known.index(kind)])
            source = f"its operators as timed, one {kind} standing for two"
        else:
            missing.append(kind)
    if missing:
        return None, "not timed: " + ", ".join(dict.fromkeys(missing))
    return backbone, source


def _kind(operator: OperatorTime) -> str:
    return "attention" if "attn" in operator.kind else operator.kind  # in models that others wrote: "self_attn"


def _predict(times: OperatorTimes, top_k: int, mode: Mode) -> Prediction:
    def grown(part: PassTimes) -> PassTimes:
        return PassTimes(**{key: ms * (top_k + 1) / top_k for key, ms in part.model_dump().items()})

    one = times.chunks[1]
    chunks = {1: ChunkTimes(dispatch=grown(one.dispatch), experts=grown(one.experts), combine=grown(one.combine))}
    backbone = tuple(each for each in times.backbone if each.kind not in SHARED)
    standard = times.model_copy(update={"backbone": backbone, "chunks": chunks})
    standard_ms = simulate(standard, Schedule(1, overlap=False), mode).total_ms
    return Prediction(plan(times, mode), standard_ms, break_even(times, mode))


def conclude(kinds: Sequence[KindStudy]) -> tuple[str, str | None]:
    """ "pays …", "does not pay …" or "cannot be said …", and the best position by times.

    One position has to pay for all kinds of layers, because a JSON has one. Similarity does not choose. Among positions
    that save about the same, the default is taken: it did best in our quality runs.
    """
    known: dict[str, list[Prediction]] = {}
    for name, kind in itertools.product(POSITIONS, kinds):
        if found := kind.positions[name].predictions:
            known.setdefault(name, []).append(found["train"])
    if not any(kind.communication_ms(phase) for kind in kinds for phase in ("forward", "backward")):
        return "does not pay: nothing travels between the ranks, there is no communication to hide", None
    if not known:
        return "cannot be said from this calibration: no position has all of its operators timed", None
    pays = [name for name, of_kinds in known.items() if all(each.pays for each in of_kinds)]
    saved = {name: fmean(each.saved_ms for each in of_kinds) for name, of_kinds in known.items()}
    best = max(pays or known, key=lambda name: saved[name])
    if DEFAULT in (pays or known):
        about_the_same_ms = (NOTICEABLE - 1) * fmean(each.plan.serial.total_ms for each in known[DEFAULT])
        best = DEFAULT if saved[best] - saved[DEFAULT] <= about_the_same_ms else best
    title = f"Pos-{best[-1]}"
    if not pays:
        slowest = min(known[best], key=lambda each: min(each.speedups))
        overlap, standard = slowest.speedups
        return (
            f"does not pay: at {title}, the best position, a pair {compared(standard, _standard(kinds))} and "
            f"{compared(overlap, 'the same without overlap')}, predicted",
            best,
        )
    return f"pays at {title}, by these times; what it does to the quality, only training says", best


def _standard(kinds: Sequence[KindStudy]) -> str:
    return f"top-{kinds[0].top_k + 1} MoE"
