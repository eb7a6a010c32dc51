"""What the planner predicts for an MoE in every block, every second, every fourth: speed-up over top-2.

All blocks of a model are alike. So the operator times of one pair, from a record of benchmarks.speed.block, give every
frequency: n blocks with one MoE are n attentions, n - 1 MLPs and the MoE. Both sides leave out the residual sum behind
the MoE. Top-2 also leaves out the norm in front of its MoE, which ScMoE's shared expert contains. This favours top-2 by
less than 1 %.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.pairs import tap_of
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.simulation import Mode, simulate, total_ms
from scmoe_ds.planner.times import OperatorTime, OperatorTimes

RESULTS = Path(__file__).parents[1] / "results"
RECORDS = ("block_swin_60_padded", "block_swin_50_padded", "block_gpt2-medium_15_padded")
"""Of benchmarks.speed.block, on two shaped nodes in one machine: 60, 50 and 15 % communication."""


@dataclass(frozen=True)
class Measured:
    """Operator times of one record, in one mode.

    Attributes:
        share: communication's share of the top-2 MoE's time, as measured.
        scmoe: times of the Pos-2 pair: MLP, attention, shared expert, and its routed experts.
        top2: times of the pipelined top-2 MoE.
    """

    share: float
    scmoe: OperatorTimes
    top2: OperatorTimes


@dataclass(frozen=True)
class Prediction:
    """One run of blocks, milliseconds per micro-batch.

    Attributes:
        scmoe_ms, blocking_ms, pipelined_ms: of the whole run with ScMoE, with top-2 whose communication nothing
            hides, and with top-2 in the best number of chunks.
        hidden: share of ScMoE's communication that runs beside computation.
    """

    scmoe_ms: float
    blocking_ms: float
    pipelined_ms: float
    hidden: float


def read_measured(path: Path, mode: Mode) -> Measured:
    """From a record of benchmarks.speed.block.

    Raises:
        ValueError: it has no times of a Pos-2 pair or of a top-2 MoE.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    calibrations: Mapping[str, Any] = record["modes"][mode]["calibrations"]
    found = {}
    for name, words in (
        ("scmoe", ("architecture scmoe", "position pos2", "top_k 1")),
        ("top2", ("architecture pipelined_topk", "top_k 2")),
    ):
        kinds = [kind for kind in calibrations if all(f" {word}," in f" {kind.strip()}," for word in words)]
        if len(kinds) != 1:
            raise ValueError(f"{path}: {len(kinds)} calibrations of {' '.join(words)}; one is needed")
        found[name] = OperatorTimes.model_validate(calibrations[kinds[0]]["times"])
    return Measured(float(record["links"][mode]["share"]), found["scmoe"], found["top2"])


def operators_of(measured: Measured, blocks: int) -> list[OperatorTime]:
    """All operators of a run of so many blocks, the last of which has the MoE and a shared expert."""
    by_kind = {each.kind: each for each in measured.scmoe.backbone}
    return [by_kind[kind] for kind in [*("attention", "mlp") * (blocks - 1), "attention", "shared"]]


def predict(measured: Measured, config: ScMoEConfig, mode: Mode) -> Prediction:
    """A run of `config.moe_every` blocks, by the planner.

    Args:
        config: of a ScMoE; its frequency, position and distance say where the shortcut is taken.
    """
    operators = operators_of(measured, config.moe_every)
    position = "pos1" if config.moe_every == 1 else config.position
    tap = tap_of(config, position)
    chosen = plan(measured.scmoe.model_copy(update={"backbone": tuple(operators[tap:])}), mode).predicted
    dense_ms = _sum(operators[:-1], mode)
    return Prediction(
        scmoe_ms=_sum(operators[:tap], mode) + chosen.total_ms,
        blocking_ms=dense_ms + simulate(measured.top2, Schedule(1, overlap=False), mode).total_ms,
        pipelined_ms=dense_ms + plan(measured.top2, mode).predicted.total_ms,
        hidden=chosen.hidden_share,
    )


def _sum(operators: Sequence[OperatorTime], mode: Mode) -> float:
    return sum(total_ms(each, mode) for each in operators)
