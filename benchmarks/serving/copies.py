"""Copies of hot experts on two nodes: prefill and decode under a skewed gate, with and without.

    python -m benchmarks.serving.copies --share 0.6 --output benchmarks/results

Each row is the same model with other copies. "layer" is the routed branch of one MoE layer alone: gate, exchange,
experts, decode. "top-1" and "ScMoE" are passes of a GPT of two blocks as scmoe_ds.inference runs it, without and with
a shortcut; the second block has the MoE layer. Beside them run passes with an even gate: without copies, without rows
that travel, and without experts' time as well. The second and the third are limits of what copies can reach. The first
is the limit of balance alone, which copies can pass: their rows do not travel.

The gate sends `skew` times the mean to one expert and the same number of tokens to all others; that expert and
`experts / 2 - 1` others live on rank 0. The link is set so that the all-to-all takes `--share` of DeepSpeed's top-2
layer. Rows alternate within rounds; a speed-up is the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.link import find_rate
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.parts import EXPOSED, record_steps
from benchmarks.harness.variants import AGAIN, SHAPES, baseline, one_primitive
from benchmarks.serving.copied_model import LIMITS, NONE, ONE, Copied, rows
from benchmarks.serving.inference import PHASES, STOCK, Served, shape_of
from benchmarks.speed.block import Bench
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.moe.decisions.copies import Costs
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.planner.simulation import Mode

LEFT = 0.25
"""Of the second rank's tokens, where most of its texts have ended."""
OF_PASSES = (NONE, NONE + AGAIN, ONE, *LIMITS)
MODELS = {
    "top-1": Served({"architecture": "topk", "top_k": 1}, {"enabled": False}),
    "ScMoE": Served({"architecture": "scmoe", "position": "pos2"}),
}


def measure(phase: Mode, skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Times of all rows under one skew. Collective."""
    named = rows(settings["experts"] // 2)
    found: dict[str, Any] = {"skew": skew, "rows": {name: {} for name in named}, "passes": {}}

    def timed(step: Callable[[str], object], names: Sequence[str]) -> dict[str, Any]:
        steps = {name: partial(step, name) for name in names}
        times = interleave(steps, settings["rounds"], 2, dist.barrier)
        seconds = {name: over_ranks(values) for name, values in times.items()}
        return {
            name: {
                "median_ms": 1e3 * statistics.median(values),
                "speedup": vars(Spread.of_ratios(seconds[NONE], values)),
                "reached": vars(Spread.of_ratios(values, seconds[ONE])),
            }
            for name, values in seconds.items()
        }

    def note(what: str, times: dict[str, Any]) -> None:
        for name, each in times.items():
            found["rows"][name][what] = each

    passes = skew == max(settings["skews"])  # otherwise the layer alone, to save time
    for kind, served in list(MODELS.items())[: None if passes else 1]:
        model = Copied(served, phase, settings)
        model.skew(skew)
        found["costs"] = model.costs()._asdict()
        needed = [*(named if kind == "top-1" else OF_PASSES), *(LIMITS if passes and kind == "top-1" else ())]
        for name in needed:
            model.add(name, (named | LIMITS)[name], Costs(**found["costs"]))
        if passes:
            found["passes"][kind] = timed(model.whole, OF_PASSES)
        if kind == "top-1":
            note("layer", timed(model.layer, list(named)))
            reference = model.layer(NONE)
            for name, each in found["rows"].items():
                each |= {"loads": model.loads(name), "parts_ms": model.parts(name)}
                each["difference"] = max(gather(float((model.layer(name) - reference).abs().max())))
            found["greatest_output"] = max(gather(float(reference.abs().max())))
            if skew != 1:
                model.leave(LEFT if dist.get_rank() else 1.0)
                note("uneven layer", timed(model.layer, list(named)))
    return found


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    record: dict[str, Any] = {}
    with one_primitive(settings["method"]):
        for phase in settings["phases"]:
            bench = Bench(baseline("padded"), shape_of(phase, settings), "forward", {"skew": 0.0, **settings})
            link = find_rate(partial(record_steps, bench.runs[STOCK], bench.cold_steps[STOCK]), settings["share"])
            del bench
            record[phase] = {
                "link": vars(link),
                "skews": [measure(phase, each, settings) for each in settings["skews"]],
            }
    return {"benchmark": "benchmarks.serving.copies", "found": record}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings = record["settings"]
    lines = [
        f"# Copies of hot experts on two nodes, all-to-all {100 * settings['share']:.0f} % of DeepSpeed's top-2 layer",
        "",
        *tables.head(record),
        f"{settings['experts']} experts, {settings['experts'] // 2} per rank, one per token; {settings['rounds']} "
        f"interleaved rounds; all-to-all of all rows: {settings['method']}. Speed-up over “{NONE}”: median (10th–90th "
        "percentile) of the ratios in rounds. “layer”: the routed branch of one MoE layer alone. Load: rows of the "
        "busier rank over the mean; without copies it is the limit of what a division of the computation can give. "
        f"“uneven layer”: the second rank has {100 * LEFT:.0f} % of its tokens, as when most of its texts have ended. "
        "Passes with an even gate are limits: of what balance can give, of what it can give when senders have all "
        "experts themselves, and of everything about experts.",
        "",
    ]
    for phase, found in record["found"].items():
        link, shape = found["link"], shape_of(phase, settings)
        lines += [
            f"## {phase}",
            "",
            f"{shape.tokens} tokens per rank, {shape.hidden_size} wide. Link {link['rate_mbit']:.0f} Mbit/s, where the "
            f"all-to-all takes {100 * link['share']:.0f} % of the baseline's MoE layer.",
            "",
        ]
        for each in found["skews"]:
            lines += [f"### {phase}, skew {each['skew']:g}", "", *_table(each), "", *_parts(each), ""]
            if each["passes"]:
                lines += [*_passes(each["passes"]), ""]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    whats = ["layer", "uneven layer"]
    cells = [
        [
            name,
            f"{2 * max(row['loads']) / sum(row['loads']):.2f}",
            *(text for what in whats for text in _cells(row.get(what))),
        ]
        for name, row in found["rows"].items()
    ]
    return tables.table(["copies", "load", *(part for what in whats for part in (f"{what} ms", "speed-up"))], cells)


def _passes(passes: dict[str, Any]) -> list[str]:
    head = ["pass with", *(text for kind in passes for text in (f"{kind} ms", "speed-up", "speed of copies over it"))]
    cells = [
        [
            name,
            *(
                text
                for timed in passes.values()
                for text in (*_cells(timed[name]), str(Spread(**timed[name]["reached"])))
            ),
        ]
        for name in OF_PASSES
    ]
    return tables.table(head, cells)


def _cells(timed: dict[str, Any] | None) -> tuple[str, str]:
    return ("–", "–") if timed is None else (f"{timed['median_ms']:.1f}", str(Spread(**timed["speedup"])))


def _parts(found: dict[str, Any]) -> list[str]:
    costs, ours = found["costs"], found["rows"][ONE]
    texts = []
    for name in (NONE, ONE):
        ranks = [
            f"rank {rank}: experts {parts['experts']:.1f}, exposed communication {parts[EXPOSED]:.1f}, rest "
            f"{sum(parts.values()) - parts['experts'] - parts[EXPOSED]:.1f}"
            for rank, parts in enumerate(found["rows"][name]["parts_ms"])
        ]
        texts.append(f"{name}: {'; '.join(ranks)}")
    return [
        f"Milliseconds of the layer. {'. '.join(texts)}. Measured before: {costs['expert_ms']:.2f} ms per expert, "
        f"{1e3 * costs['row_ms']:.0f} µs per row, {1e3 * costs['travel_ms']:.0f} µs per row that travels. Greatest "
        f"difference of an output: {ours['difference']:.1e} at values up to {found['greatest_output']:.2g}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="swin", help="of the prefill; a decode step has its own")
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of the baseline's MoE layer")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--skews", nargs="+", type=float, default=[1.0, 1.8, 4.0], help="load of one expert over mean")
    parser.add_argument("--experts", type=int, default=4, help="of both ranks together")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.serving.copies", settings)
    text = markdown(record)
    print(text)
    if args.output:
        name = f"copies_{round(100 * args.share)}" + ("" if args.experts == 4 else f"_{args.experts}_experts")
        write(args.output, name, record, text)


if __name__ == "__main__":
    main()
