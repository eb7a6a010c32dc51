"""A block pair on two nodes: stock DeepSpeed MoE, ScMoE, and what each part of it gives.

    python -m benchmarks.block --shape gpt --share 0.6 --rounds 30 --output benchmarks/results/block

Two nodes are made in this machine (root, Linux), one pinned rank on each, joined by a link whose rate is searched so
that the all-to-all takes the wanted share of DeepSpeed's top-2 MoE layer, in the mode that is measured. All variants
run in every round in rotating order; a speed-up is the median of the ratios within rounds, with its 10th and 90th
percentile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster.nodes import TwoNodes, available, shape_own_end
from benchmarks.measure import Ratio, environment, interleave
from benchmarks.variants import MAIN, SHAPES, SLOTS, STOCK, Shape, build, unit

TABLES = {"main": MAIN, "slots": SLOTS}


def slowest(seconds: list[float]) -> list[float]:
    """The slower rank's times."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return times.tolist()


def timed(function: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of the slower rank."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(slowest(times[1:]))[repeats // 2]


def find_rate(shape: Shape, share: float, mode: str) -> dict[str, float]:
    """Sets the link so that the all-to-all takes `share` of the time of DeepSpeed's top-2 layer in this mode."""
    layer = build(MAIN[STOCK], shape, 0.0).blocks[-1].moe
    tokens = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size, requires_grad=mode == "train")
    capacity = int(2 * shape.capacity_factor * shape.sequences * shape.seq_length / shape.num_experts)
    buffer = torch.randn(shape.num_experts * capacity, shape.hidden_size)

    def communicate() -> None:
        for _ in range(4 if mode == "train" else 2):
            dist.all_to_all_single(torch.empty_like(buffer), buffer)

    def whole_layer() -> None:
        with torch.set_grad_enabled(mode == "train"):
            output, l_aux, _ = layer(tokens)
            if mode == "train":
                (output.sum() + l_aux).backward()
                layer.zero_grad(set_to_none=True)

    rate, found = 400.0, {}
    for _ in range(6):
        shape_own_end(rate)
        communication, total = timed(communicate), timed(whole_layer)
        found = {"rate_mbit": rate, "share": communication / total, "all_to_all_ms": 1e3 * communication,
                 "layer_ms": 1e3 * total}  # fmt: skip
        if abs(found["share"] - share) < 0.015:
            break
        wanted = share / (1 - share) * max(total - communication, 0.02 * total)
        rate = min(max(rate * communication / wanted, 5.0), 8000.0)
    return found


def rank_main(settings: dict[str, Any]) -> None:
    """What each of the two processes runs."""
    from scmoe_ds.engine import connect

    torch.set_num_threads(1)
    connect()
    shape = SHAPES[settings["shape"]]
    record: dict[str, Any] = {"links": {}, "rows": []}
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size)
    for mode in settings["modes"]:
        record["links"][mode] = find_rate(shape, settings["share"], mode)
        for skew, table in itertools.product(settings["skew"], settings["tables"]):
            runs = {name: build(variant, shape, skew) for name, variant in TABLES[table].items()}
            with torch.no_grad():
                counts = runs[STOCK](hidden).exp_counts.float()
            units = {name: unit(run, hidden.clone(), mode == "train") for name, run in runs.items()}
            times = interleave(units, settings["rounds"], warm_up=2, before=dist.barrier)
            times = {name: slowest(values) for name, values in times.items()}
            load = float(counts.max() / counts.mean())
            for name, values in times.items():
                row = {"table": table, "mode": mode, "skew": skew, "load_max_over_mean": load, "variant": name}
                row |= {"median_ms": 1e3 * sorted(values)[len(values) // 2]}
                record["rows"].append(row | {"speedup": vars(Ratio.of(times[STOCK], values))})
    if dist.get_rank() == 0:
        print("RECORD " + json.dumps(record), flush=True)
    dist.destroy_process_group()


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings, links = record["settings"], record["links"]
    share = " and ".join(f"{100 * link['share']:.0f} % ({mode})" for mode, link in links.items())
    rates = "; ".join(
        f"{mode}: {link['rate_mbit']:.0f} Mbit/s, all-to-all {link['all_to_all_ms']:.0f} of {link['layer_ms']:.0f} ms"
        for mode, link in links.items()
    )
    hardware = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    lines = [
        f"# {SHAPES[settings['shape']].name}: all-to-all {share} of DeepSpeed's top-2 MoE layer",
        "",
        f"`{record['command']}`",
        "",
        f"{hardware}. Two network namespaces, one pinned rank each, linked at: {rates}. "
        f"{settings['rounds']} interleaved rounds; speed-up over DeepSpeed's top-2: median (10th–90th percentile) of "
        "the ratios within rounds.",
    ]
    keys = sorted({(row["table"], row["skew"]) for row in record["rows"]}, key=lambda key: (key[0] != "main", key[1]))
    for table, skew in keys:
        rows = [row for row in record["rows"] if (row["table"], row["skew"]) == (table, skew)]
        modes = list(dict.fromkeys(row["mode"] for row in rows))
        routing = "fresh gate" if not skew else "skewed gate"
        lines += ["", f"## {table}, {routing} (busiest expert {rows[0]['load_max_over_mean']:.2f} × the mean)", ""]
        lines += ["| variant | " + " | ".join(f"{mode} ms | speed-up" for mode in modes) + " |"]
        lines += ["|---|" + "---:|---|" * len(modes)]
        for name in dict.fromkeys(row["variant"] for row in rows):
            cells = [row for mode in modes for row in rows if (row["variant"], row["mode"]) == (name, mode)]
            text = " | ".join(f"{cell['median_ms']:.0f} | {Ratio(**cell['speedup'])}" for cell in cells)
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt")
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of DeepSpeed's top-2 MoE layer")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["main"])
    parser.add_argument("--modes", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0], help="added to expert 0's logit, about")
    parser.add_argument("--output", type=Path, help="directory for the Markdown table and the JSON")
    parser.add_argument("--rank-settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_settings:
        rank_main(json.loads(args.rank_settings))
        return
    if (reason := available()) is not None:
        sys.exit(f"two nodes cannot be made here: {reason}")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "rank_settings")}
    with TwoNodes(high_priority=True) as nodes:
        program = [sys.executable, "-m", "benchmarks.block", "--rank-settings", json.dumps(settings)]
        output = nodes.launch(program, timeout_s=3600)[0].stdout
    found = next(line for line in output.splitlines() if line.startswith("RECORD "))
    command = "python -m benchmarks.block " + " ".join(sys.argv[1:])
    record: dict[str, Any] = {"command": command, "environment": environment(), "settings": settings}
    record |= json.loads(found.removeprefix("RECORD "))
    text = markdown(record)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = f"block_{args.shape}_{round(100 * args.share)}" + ("_slots" if args.tables == ["slots"] else "")
        (args.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.output / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
