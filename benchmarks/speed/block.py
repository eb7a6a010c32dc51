"""A pair of blocks on two nodes: DeepSpeed's MoE, the strong baselines, and ScMoE under every schedule.

    python -m benchmarks.speed.block --shape swin --share 0.6 --output benchmarks/results
    python -m benchmarks.speed.block --shape swin --share 0.6 --tables slots --rounds 10 --output benchmarks/results
    python -m benchmarks.speed.block --shape swin --tables crossing --modes train --output benchmarks/results

Two nodes are made in this machine (root, Linux), one pinned rank on each, joined by a link whose rate is searched so
that the all-to-all takes `--share` of the baseline's MoE layer, in the mode that is measured. All variants run
in every round in rotating order; a speed-up is the median of the ratios within rounds, with its 10th and 90th
percentile. Baseline: top-2 with the dispatch that all others have, DeepSpeed's own layer where it has that dispatch.
Schedules are those of the package's own calibration and planner, at the rate that was found.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import rows, tables
from benchmarks.harness.link import Link, find_rate, rates_in
from benchmarks.harness.measure import EVICTED_BYTES, cold
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.pace import References
from benchmarks.harness.parts import hidden_by_waits, mean_over_ranks, record_steps
from benchmarks.harness.planned import Calibrated, calibrate_kinds, schedule_of
from benchmarks.harness.variants import (
    BASELINES,
    SHAPES,
    STOCK,
    TABLES,
    Shape,
    Table,
    baseline,
    build,
    one_primitive,
    selected,
    unit,
)
from benchmarks.speed import bars
from lab.nodes import shape_own_end
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.planner.rounds import interleave, over_ranks
from scmoe_ds.planner.simulation import Mode
from scmoe_ds.trace.recorder import Phase

CROSSING_RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0)
FIRST_CROSSING_MBIT = 400.0
RECORDED_STEPS = 3
WARM_UP = 2
PACE = "pace"
PROCESSOR_ROUNDS = 5


class Bench:
    """One table of pairs on this rank, in one mode.

    Attributes:
        calibrated: by `Variant.kind`, at the link's present rate; see `calibrate`.
    """

    def __init__(self, table: Table, shape: Shape, mode: Mode, settings: dict[str, Any]) -> None:
        self.table, self.mode, self.rounds = table, mode, settings["rounds"]
        torch.manual_seed(dist.get_rank())
        hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size)
        self.runs: dict[str, Any] = {
            name: build(variant, shape, settings["skew"], settings["method"]) for name, variant in table.items()
        }
        self.steps = {name: unit(run, hidden.clone(), mode == "train") for name, run in self.runs.items()}
        # Steps that are calibrated or recorded follow each other; in the rounds, other pairs come between them.
        other = torch.zeros(EVICTED_BYTES // 4)
        training = {name: unit(run, hidden.clone(), train=True) for name, run in self.runs.items()}
        self.cold_training_steps = {name: cold(step, other) for name, step in training.items()}
        self.cold_steps = {name: cold(step, other) for name, step in self.steps.items()}
        self.calibrated: dict[str, Calibrated] = {}
        self.references = References()
        with torch.no_grad():
            counts = next(iter(self.runs.values()))(hidden).exp_counts.float()
        self.load_max_over_mean = float(counts.max() / counts.mean())
        self.expert_counts = counts.tolist()

    def calibrate(self) -> None:
        """Times the parts of all kinds of pairs, and gives every pair the schedule that follows from them."""
        self.calibrated = calibrate_kinds(self.table, self.runs, self.cold_training_steps)
        for name, variant in self.table.items():
            if variant.kind in self.calibrated:
                schedule = schedule_of(variant, self.calibrated[variant.kind].times, self.mode)
                self.runs[name].schedule = self.runs[name].forward_schedule = schedule

    def measure(self) -> dict[str, list[float]]:
        """Seconds of the slower rank, of every row in every round."""
        paced = self.steps | {PACE: self.references.sample}
        times = interleave(paced, self.rounds, WARM_UP, before=dist.barrier)
        return {name: over_ranks(values) for name, values in times.items() if name != PACE}

    def processor_ms(self) -> dict[str, float]:
        """Median processor time of all of a rank's threads in a step of every row, of the busier rank."""
        rounds = max(1, min(PROCESSOR_ROUNDS, self.rounds // 4))
        times = interleave(self.steps, rounds, 1, before=dist.barrier, clock=time.process_time)
        return {name: 1e3 * over_ranks([statistics.median(values)])[0] for name, values in times.items()}

    def prediction(self, name: str, median_ms: float) -> rows.Row:
        """What the plan said; empty for layers of DeepSpeed and rows without communication."""
        variant = self.table[name]
        if not variant.is_scheduled or not variant.communicates:
            return {}
        return rows.prediction(self.calibrated[variant.kind], self.runs[name].schedule, self.mode, median_ms)

    def parts(self, name: str) -> rows.Row:
        """What a step consists of, and for each pass how much of its communication was not waited for."""
        variant = self.table[name]
        steps = record_steps(self.runs[name], self.cold_steps[name], RECORDED_STEPS)
        found: rows.Row = {"parts_ms": mean_over_ranks(steps)}
        if variant.is_scheduled and variant.overlap and variant.communicates:
            sent = self.calibrated[variant.kind].communication()
            phases: dict[Phase, float] = {"forward": sent.forward_ms}
            if self.mode == "train":
                phases["backward"] = sent.backward_ms
            found["hidden_by_waits"] = hidden_by_waits(steps, phases)
        return found

    def times_of_kinds(self) -> dict[str, Any]:
        """The calibration, for the record."""
        return {
            kind: {"before_tap": each.before_tap.model_dump(), "times": each.times.model_dump(mode="json")}
            for kind, each in self.calibrated.items()
        }


def link(shape: Shape, mode: Mode, settings: dict[str, Any]) -> Link:
    """Sets the link's rate by the baseline, or to that of an earlier record."""
    bench = Bench(baseline(settings["dispatch"]), shape, mode, settings | {"skew": 0.0})
    (name,) = bench.table
    steps = partial(record_steps, bench.runs[name], bench.cold_steps[name])
    return find_rate(steps, settings["share"], settings.get("rates_of", {}).get(mode))


def speedups(name: str, shape: Shape, mode: Mode, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of the tables that compare with a baseline."""
    base = STOCK if name == "ablation" else BASELINES[settings["dispatch"]]
    table = selected(TABLES[name](settings["dispatch"]), base, settings["variants"])
    bench = Bench(table, shape, mode, settings)
    bench.calibrate()
    times = bench.measure()
    # Repeated for its times: bars are drawn of the first record.
    in_parts = name == "main" and not settings.get("rates_of")
    processor_ms = bench.processor_ms() if in_parts else {}
    found = rows.speedup_rows(table, times, base)
    for variant, row in found.items():
        row |= {"table": name, "mode": mode, **bench.prediction(variant, row["median_ms"])}
        kind = table[variant].kind
        if kind in bench.calibrated:
            row |= rows.limits(variant, table, times, bench.calibrated[kind], mode)
        if in_parts:
            row |= bench.parts(variant) | rows.processor(variant, table, processor_ms)
    record = {"rows": list(found.values()), "load_max_over_mean": bench.load_max_over_mean}
    record |= {"expert_counts": bench.expert_counts, "pace": bench.references.pace()}
    record["calibrations"] = bench.times_of_kinds()
    if name == "slots" and not settings["variants"]:
        record["auto_over_best"] = rows.auto_over_best(table, times)
    return record


def crossing(shape: Shape, mode: Mode, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of one chunk against several, at rates at which Pos-2's communication is a multiple of its window."""
    table = TABLES["crossing"](settings["dispatch"])
    bench = Bench(table, shape, mode, settings)
    pos2 = next(variant.kind for variant in table.values() if variant.position == "pos2")
    shape_own_end(FIRST_CROSSING_MBIT)
    bench.calibrate()
    at_first = bench.calibrated[pos2].communication_ms(mode) / bench.calibrated[pos2].window_ms(mode)
    found: list[rows.Row] = []
    for ratio in CROSSING_RATIOS:
        rate = FIRST_CROSSING_MBIT * at_first / ratio
        shape_own_end(rate)
        bench.calibrate()
        for name, row in rows.crossing_rows(table, bench.measure()).items():
            calibrated = bench.calibrated[table[name].kind]
            found.append(
                {
                    "table": "crossing",
                    "mode": mode,
                    "rate_mbit": rate,
                    **row,
                    "communication_over_window": calibrated.communication_ms(mode) / calibrated.window_ms(mode),
                    **bench.prediction(name, row["median_ms"]),
                }
            )
    return {"rows": found, "load_max_over_mean": bench.load_max_over_mean}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    shape = SHAPES[settings["shape"]]
    record: dict[str, Any] = {"links": {}, "tables": {}}
    with one_primitive(settings["method"]):
        for mode, name in itertools.product(settings["modes"], settings["tables"]):
            if name != "crossing" and mode not in record["links"]:
                record["links"][mode] = vars(link(shape, mode, settings))
            found = (crossing if name == "crossing" else partial(speedups, name))(shape, mode, settings)
            record["tables"].setdefault(name, {})[mode] = found
    return record


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="swin")
    parser.add_argument(
        "--share",
        type=float,
        default=0.6,
        help="all-to-all share of the baseline's MoE layer; the crossing chooses its own rates",
    )
    parser.add_argument(
        "--rates-of", type=rates_in, default={}, metavar="RECORD", help="repeats a record at its rates, not at --share"
    )
    parser.add_argument("--dispatch", choices=BASELINES, default="padded", help="of all rows, on both sides")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="collective",
        help="all-to-all of all rows, DeepSpeed's own layers included; theirs is the collective",
    )
    parser.add_argument(
        "--nodes", type=int, default=2, help="more than there are cores share them, and compute accordingly slower"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["main"])
    parser.add_argument("--modes", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument("--variants", nargs="+", default=[], metavar="PART", help="only rows whose name has a PART")
    parser.add_argument("--skew", type=float, default=0.0, help="added to expert 0's logit, about")
    parser.add_argument("--output", type=Path, help="directory for JSON, Markdown table and figure")
    return parser


def main() -> None:
    args, settings = parse(build_parser(), rank_main)
    whole = on_nodes("benchmarks.speed.block", settings)
    for name, modes in whole.pop("tables").items():
        record = whole | {"table": name, "modes": modes}
        text = tables.markdown(record, SHAPES[args.shape].name)
        print(text)
        if args.output:
            share = "" if name == "crossing" else f"_{round(100 * args.share)}"
            suffix = ("" if name == "main" else f"_{name}") + ("_skewed" if args.skew else "")
            drawn = {"main": bars.stacked, "slots": bars.slots, "crossing": bars.crossing}.get(name)
            figure = drawn(record) if drawn and not args.rates_of else None
            suffix += "" if args.nodes == 2 else f"_{args.nodes}_nodes"
            write(args.output, f"block_{args.shape}{share}_{args.dispatch}{suffix}", record, text, figure)


if __name__ == "__main__":
    main()
