"""The speed-ups of the paper's tables 1, 2 and 4 and of its figure 8, simulated.

    python -m benchmarks.predict.paper --output benchmarks/results

Per cluster at most three numbers are fitted, on rows without a shortcut; the same rows choose what the paper does not
state. Rows of ScMoE are predicted. Whole steps and
pairs of blocks run through `scmoe_ds.simulate`, from `clusters/`, `ds_configs/` and the presets.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import environment
from benchmarks.predict import paper_page
from benchmarks.predict.chain import CLUSTERS, CONFIGS, setting_of, times_of
from benchmarks.predict.paper_choice import FAMILIES, Choice, choices
from benchmarks.predict.paper_fit import Factors
from benchmarks.predict.paper_rows import ROWS, SETTINGS, Mode, Row, Setting
from scmoe_ds.figure_style import save
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.simulation import Simulated, total_ms
from scmoe_ds.simulate.cluster import read_cluster
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.times import PairTimes, StepTimes

CHUNKS = 4
EVEN = Routing(skew=1.0)
"""A padded dispatch sends and computes the capacity, whatever the routing."""
METHODS = {
    "top-2": Method("top-2", "topk", routed=2, overlap=False),
    "top-1": Method("top-1", "topk", routed=1, overlap=False),
    "top-3": Method("top-3", "topk", routed=3, overlap=False),
    "top-2, pipelined": Method("top-2, pipelined", "topk", routed=2, most_chunks=CHUNKS),
    "top-1, pipelined": Method("top-1, pipelined", "topk", routed=1, most_chunks=CHUNKS),
    "shared expert": Method("shared expert", "shared_expert", routed=1, overlap=False),
    **{
        f"ScMoE Pos-{n}": Method(f"ScMoE Pos-{n}", "scmoe", routed=1, position=f"pos{n}", most_chunks=CHUNKS)  # type: ignore[arg-type]
        for n in (1, 2, 3)
    },
    "ScMoE-2 Pos-2": Method("ScMoE-2 Pos-2", "scmoe", routed=2, position="pos2", most_chunks=CHUNKS),
}
"""As the paper runs them: padded buffers, and nothing beside the communication without a shortcut or pipelining."""


class Simulation:
    """The rows of one setting on its cluster, whose figures some factors scale."""

    def __init__(self, setting: str, facts: Setting | None = None) -> None:
        facts = SETTINGS[setting] if facts is None else facts
        self.cluster = read_cluster(CLUSTERS / f"{facts.cluster}.json")
        world = self.cluster.nodes * self.cluster.gpus_per_node
        self.model, own, self.layout = setting_of(facts.preset, CONFIGS / f"{facts.config}.json", world)
        if facts.micro_batch is not None:
            passes = self.layout.micro_batch * self.layout.accumulation // facts.micro_batch if self.model.images else 1
            self.layout = replace(self.layout, micro_batch=facts.micro_batch, accumulation=passes)
        self.methods = {
            name: replace(each, dispatch="padded", capacity_factor=factor_of(each, own, facts), merge=own.merge)
            for name, each in METHODS.items()
        }
        self.unfused = not facts.fused_attention
        self.times = functools.cache(self._times)
        self.step_ms = functools.cache(self._step_ms)

    def value(self, row: Row, factors: Factors) -> float:
        """What the simulation says for a row."""
        if row.quantity == "share":
            return share_of(self._pair(row.method, row.mode, factors), row.mode)
        if row.quantity == "hidden":
            return planned(self._pair(row.method, row.mode, factors), row.mode).hidden_share
        of = self.pair_ms if row.quantity == "pair" else self.step_ms
        return of(row.over, row.mode, factors) / of(row.method, row.mode, factors)

    def pair_ms(self, method: str, mode: Mode, factors: Factors) -> float:
        """A pair of blocks, with what comes before the tap."""
        pair = self._pair(method, mode, factors)
        return total_ms(pair.before, mode) + planned(pair, mode).total_ms

    def _pair(self, method: str, mode: Mode, factors: Factors) -> PairTimes:
        """The pair that the model has most of."""
        return max(self.times(method, mode, factors).pairs, key=lambda pair: pair.count)

    def _layout(self, mode: Mode) -> Layout:
        return self.layout if mode == "train" else replace(self.layout, training=False, accumulation=1)

    def _times(self, method: str, mode: Mode, factors: Factors) -> StepTimes:
        machine = machine_of(factors.on(self.cluster))
        return times_of(self.model, self.methods[method], self._layout(mode), machine, EVEN, self.unfused)

    def _step_ms(self, method: str, mode: Mode, factors: Factors) -> float:
        return run_step(self.times(method, mode, factors), self._layout(mode), mode).total_ms


def factor_of(method: Method, own: Method, facts: Setting) -> float:
    """The capacity factor as `Method` counts it, over the mean rows of an expert."""
    choices = 1 if facts.capacity == "rows" else method.routed or 1
    return own.capacity_factor / choices


def planned(pair: PairTimes, mode: Mode) -> Simulated:
    """What the planner's schedule of a pair costs, or blocking communication where the method has no overlap."""
    found = plan(pair.by_class[0], mode)
    return found.predicted if pair.overlapped else found.serial


def share_of(pair: PairTimes, mode: Mode) -> float:
    """Dispatch and combine in the time of gate, encode, dispatch, experts, combine and decode."""
    times = pair.by_class[0]
    whole = times.chunks[1]
    exchanged = total_ms(whole.dispatch, mode) + total_ms(whole.combine, mode)
    computed = sum(total_ms(part, mode) for part in (times.gate, times.encode, whole.experts, times.decode))
    return exchanged / (exchanged + computed)


def record_of(command: str) -> dict[str, Any]:
    """Everything that the page shows."""
    tried = {family: choices(family, ROWS, Simulation) for family in FAMILIES}
    facts = {name: tried[family][0].facts for family, names in FAMILIES.items() for name in names}
    simulations = {name: Simulation(name, replace(SETTINGS[name], **own)) for name, own in facts.items()}
    fitted_groups = {group: found for each in tried.values() for group, found in each[0].fits.items()}
    rows = []
    for row in ROWS:
        simulation, fitted = simulations[row.setting], fitted_groups[SETTINGS[row.setting].group].factors
        rows.append(
            {
                **vars(row),
                "words": SETTINGS[row.setting].words,
                "fitted": row.fitted,
                "simulated": simulation.value(row, fitted),
                "simulated_without_fit": simulation.value(row, Factors()),
            }
        )
    predicted = [abs(row["simulated"] - row["value"]) for row in rows if is_predicted(row)]
    return {
        "benchmark": "benchmarks.predict.paper",
        "command": command,
        "environment": environment("none: simulated"),
        "chosen": {family: found[0].facts for family, found in tried.items()},
        "tried": {family: [_tried(each) for each in found] for family, found in tried.items()},
        "fits": {
            group: {
                "free": list(found.free),
                "factors": vars(found.factors),
                "values": values_of(
                    next(s for n, s in simulations.items() if SETTINGS[n].group == group), found.factors
                ),
            }
            for group, found in fitted_groups.items()
        },
        "rows": rows,
        "mean_error": statistics.fmean(predicted),
        "largest_error": max(predicted),
    }


def _tried(choice: Choice) -> dict[str, Any]:
    fits = {group: {"free": list(found.free), "loss": found.loss} for group, found in choice.fits.items()}
    return {"facts": choice.facts, "loss": choice.loss, "fits": fits}


def is_predicted(row: Mapping[str, Any]) -> bool:
    """Whether a row of the record is a speed-up of a whole step that the fit has not read."""
    return row["quantity"] == "speed-up" and not row["fitted"]


def values_of(simulation: Simulation, factors: Factors) -> dict[str, float]:
    """The figures of the description that the factors make."""
    after = factors.on(simulation.cluster)
    return {
        "peak_TFLOP_per_s": after.gpu.peak[simulation.layout.precision] / 1e12,
        "launch_us": after.gpu.launch * 1e6,
        "memory_GB_per_s": after.gpu.bandwidth / 1e9,
        "inside_GB_per_s": after.inside.rate / 1e9,
        "network_GB_per_s": 0.0 if after.between is None else after.between.nics * after.between.nic_rate / 1e9,
        "rows_share": after.gpu.efficiency["rows"].likely,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="writes plan_paper.json, .md and .png there")
    args = parser.parse_args(argv)
    record = record_of("python -m benchmarks.predict.paper")
    text = paper_page.page(record)
    print(text)
    if args.output:
        (args.output / "plan_paper.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (args.output / "plan_paper.md").write_text(text, "utf-8")
        save(paper_page.figure(record), args.output / "plan_paper.png")


if __name__ == "__main__":
    main()
