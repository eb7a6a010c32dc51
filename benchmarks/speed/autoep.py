"""Hugging Face's MoE blocks on two nodes: DeepSpeed's AutoEP as it is, and this package on the same weights.

    python -m benchmarks.speed.autoep --output benchmarks/results
    python -m benchmarks.speed.autoep --families qwen3 --shares 0.6 --rounds 6
    python -m benchmarks.speed.autoep --adapted --families qwen3 --blocks 4 --shares 0.5 --modes train \\
        --output benchmarks/results

Two nodes are made in this machine (root, Linux), one pinned rank on each, joined by a link whose rate is searched so
that the all-to-alls take `--shares` of the time of AutoEP's MoE layers in a training step. A model is a few of
transformers' own decoder layers with AutoEPMoELayer in them; the shapes are cut in width and batch only. All rows share
the same weights and run in every round in rotating order. A speed-up is the median of the ratios within rounds, with
its 10th and 90th percentile. Schedules are those of the package's own calibration at the rate that was found.

What was measured before is kept: a family is written as soon as it is done, and no share or skew of it is measured
again unless `--again` says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import autoep_page
from benchmarks.harness.autoep_parts import Step, peak_bytes, record_layers
from benchmarks.harness.autoep_rows import AUTOEP, Row, Run, adapted, table
from benchmarks.harness.families import FAMILIES, SEQUENCE, build_model, skew_router
from benchmarks.harness.link import find_rate
from benchmarks.harness.measure import EVICTED_BYTES, cold
from benchmarks.harness.on_nodes import on_nodes, parse
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.planner.schedule_text import schedule_text
from scmoe_ds.planner.simulation import Mode

WARM_UP = 1
SKEWED_ROWS = ["chunks", "scmoe Pos-1", "no communication"]
Times = dict[str, list[float]]


class Bench:
    """All rows of one family on this rank.

    Args:
        settings: the command line's, of one cell.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, family = settings, FAMILIES[settings["family"]]
        self.family = replace(family, blocks=settings["blocks"] or family.blocks)
        cut, rows = self.family.cut(settings["share"]), (adapted if settings["adapted"] else table)(self.family)
        self.rows = {name: row for name, row in rows.items() if _is_chosen(name, settings["only"])}
        sections = {row.parts: row.section for row in reversed(self.rows.values())}
        models: dict[str, Any] = {parts: build_model(self.family, cut, each) for parts, each in sections.items()}
        teacher = models[self.rows[AUTOEP].parts]
        torch.manual_seed(1 + dist.get_rank())
        self.hidden = torch.randn(cut.sequences, SEQUENCE, teacher.config.hidden_size)
        self.loads = skew_router(teacher, self.hidden, settings["skew"])
        self.runs = {name: Run(row, models[row.parts], settings["method"]) for name, row in self.rows.items()}
        self._other = torch.zeros(EVICTED_BYTES // 4)

    def cell(self) -> dict[str, Any]:
        """The link, and every row in both modes."""
        link = self.set_link()
        for run in self.runs.values():
            run.calibrate(cold(run.step(self.hidden, train=True), self._other))
        modes: tuple[Mode, ...] = ("train", "forward")
        found = {mode: self.measure(mode) for mode in modes if mode in self.settings["modes"]}
        return {"link": link, "loads": self.loads, "modes": found, "differences": self.differences()}

    def differences(self) -> dict[str, float]:
        """Of the outputs of all rows that are to compute the same, the largest one to AutoEP's, over its largest."""
        expected = self.runs[AUTOEP].output(self.hidden)
        same = [name for name, row in self.rows.items() if row.architecture == "as_is" and row.communicates]
        found = [float((self.runs[name].output(self.hidden) - expected).abs().max()) for name in same]
        return dict(zip(same, over_ranks([each / float(expected.abs().max()) for each in found]), strict=True))

    def set_link(self) -> dict[str, float]:
        """Sets the link's rate by AutoEP's training step, or to the rate that is given."""
        run = self.runs[AUTOEP]
        step = cold(run.step(self.hidden, train=True), self._other)
        if self.settings["rate_mbit"]:
            from lab.nodes import shape_own_end

            shape_own_end(self.settings["rate_mbit"])
            return {"rate_mbit": self.settings["rate_mbit"]}
        return vars(find_rate(partial(record_layers, run.model, step), self.settings["share"]))

    def measure(self, mode: Mode) -> list[dict[str, Any]]:
        """The rows of one mode."""
        rows = {name: row for name, row in self.rows.items() if mode in row.modes}
        steps = {name: self.runs[name].step(self.hidden, mode == "train") for name in rows}
        processor: dict[str, list[float]] = {name: [] for name in rows}
        counted = {name: partial(_count_processor, steps[name], processor[name]) for name in rows}
        timed = interleave(counted, self.settings["rounds"], WARM_UP, before=dist.barrier)
        times = {name: over_ranks(values) for name, values in timed.items()}
        waited = {name: self.runs[name].waited_ms(steps[name]) for name in rows}
        found = []
        for name, row in rows.items():
            (processor_s,) = over_ranks([statistics.median(processor[name])])
            (peak,) = over_ranks([float(peak_bytes(steps[name]))])
            found.append(
                {
                    "row": name,
                    "median_ms": 1e3 * statistics.median(times[name]),
                    "speedup": vars(Spread.of_ratios(times[AUTOEP], times[name])),
                    "processor_ms": 1e3 * processor_s,
                    "peak_mb": peak / 1e6,
                    "schedule": ", ".join(dict.fromkeys(map(schedule_text, self.runs[name].schedules(mode)))),
                    "waited_ms": waited[name],
                    **self._limit(row, times, name, mode),
                    **_not_waited(waited, name, row.blocking),
                }
            )
        return found

    def _limit(self, row: Row, times: Times, name: str, mode: Mode) -> dict[str, Any]:
        """How close a row is to the same without communication."""
        if row.limit not in times:
            return {}
        exposed = _exposed_ms(times, name, row.limit)
        found: dict[str, Any] = {"limit_speedup": vars(Spread.of_ratios(times[AUTOEP], times[row.limit]))}
        found["exposed_ms"] = vars(exposed)
        if row.blocking in times:
            waited = _exposed_ms(times, row.blocking, row.limit)
            if waited.p10 > 0:  # otherwise there is nothing to hide that could be measured
                found["hidden_share"] = 1 - exposed.median / waited.median
        found["communication_ms"] = self.runs[name].communication_ms(mode)
        return found


def _exposed_ms(times: Times, name: str, limit: str) -> Spread:
    """What a row takes beyond the same without communication, within rounds."""
    return Spread.of([1e3 * (full - bare) for full, bare in zip(times[name], times[limit], strict=True)])


def _not_waited(waited: dict[str, float | None], name: str, blocking: str | None) -> dict[str, float]:
    """The share of the waits of the same row with blocking exchanges that a row is spared."""
    own, all_ms = waited[name], waited.get(blocking or "")
    return {} if own is None or not all_ms else {"not_waited_share": 1 - own / all_ms}


def _count_processor(step: Step, seconds: list[float]) -> None:
    """Runs a step, and notes the processor time of all threads."""
    started = time.process_time()
    step()
    seconds.append(time.process_time() - started)


def _is_chosen(name: str, only: list[str]) -> bool:
    return not only or name == AUTOEP or any(part in name for part in only)


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    found: list[dict[str, Any]] = settings.pop("known")
    known = len(found)
    for cell in settings.pop("cells"):
        rate = next((each["link"]["rate_mbit"] for each in found if each["settings"]["share"] == cell["share"]), None)
        own = {**settings, **cell, "rate_mbit": rate if cell["skew"] > 1 else None}
        found.append({"settings": own, **Bench(own).cell()})
    return {"cells": found[known:]}


def cells(args: argparse.Namespace, family: str) -> list[dict[str, Any]]:
    """The shares and skews of a family that are measured in one go; a skew comes after its share without one."""
    found = [{"family": family, "share": share, "skew": 1.0} for share in args.shares]
    if family == args.skewed_family and not args.adapted:
        of_all = {"family": family, "share": args.skewed_share, "modes": ["train"], "only": args.only or SKEWED_ROWS}
        found += [{**of_all, "skew": skew} for skew in args.skews]
    return found


def _find(record: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any] | None:
    return next((each for each in record["cells"] if cell.items() <= each["settings"].items()), None)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shares", nargs="*", type=float, default=[0.6, 0.5, 0.15])
    parser.add_argument("--skews", nargs="*", type=float, default=[2.0, 3.0, 4.0, 5.0], help="busiest expert over mean")
    parser.add_argument("--skewed-family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--skewed-share", type=float, default=0.6, help="without skew")
    parser.add_argument("--modes", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument("--method", choices=METHODS, default="collective", help="AutoEP's own is the collective")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="only rows whose name has a PART")
    parser.add_argument("--adapted", action="store_true", help="rows of converted models; record: autoep_adapted")
    parser.add_argument("--blocks", type=int, help="decoder layers; default: two, of LongCat one")
    parser.add_argument("--again", action="store_true", help="measure again what the record has")
    parser.add_argument("--output", type=Path, help="directory for the record, autoep_rows.json and .md")
    return parser


def main() -> None:
    args, settings = parse(build_parser(), rank_main)
    file = args.output / f"autoep_{'adapted' if args.adapted else 'rows'}.json" if args.output else None
    page = autoep_page.adapted_page if args.adapted else autoep_page.page
    record = json.loads(file.read_text()) if file and file.exists() else {"cells": []}
    for family in args.families:
        missing = [cell for cell in cells(args, family) if args.again or not _find(record, cell)]
        if not missing:
            continue
        of_family = [each for each in record["cells"] if each["settings"]["family"] == family]
        known = [{key: each[key] for key in ("settings", "link")} for each in of_family if not args.again]
        found = on_nodes("benchmarks.speed.autoep", {**settings, "cells": missing, "known": known})
        measured = [{**{key: found[key] for key in ("command", "environment")}, **cell} for cell in found["cells"]]
        kept = [each for each in record["cells"] if not any(_find({"cells": [each]}, cell) for cell in missing)]
        record["cells"] = kept + measured
        for cell in measured:
            print(autoep_page.cell_text(cell), flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=1) + "\n")
            file.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
