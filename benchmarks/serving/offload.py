"""Experts outside of the memory: what one token costs in time and memory, resident, fetched late, fetched early.

    python -m benchmarks.serving.offload --output benchmarks/results

Each row is a model of random weights, written as an export: SHAPE:DTYPE of the file:POSITION of the ScMoE, or top2 for
a standard MoE, whose experts are guessed, too. A process with resident and one with offloaded experts load it and
generate token by token (one sequence; every token needs one of eight experts in each MoE layer, which nearly always
migrates). The modes take turns, a few tokens each, in rotating order. All figures are of the decode steps of a turn,
and per pair of blocks; embedding and vocabulary are left out. They are compared within a round, and the median of the
rounds is reported with its 10th and 90th percentile.

What can be hidden of a migration is the window, which the backbone computes between tap and join. It is measured in the
resident row, and the migration, with nothing beside it, as what the blocking row waits for an expert:

    limit    the share of the migration that the window is as long as
    reached  the share of the blocking row's extra time that the early row does not have

Where less than the limit is reached, the table says what went: the computation takes longer beside a migration, or the
migration beside the computation.

Experts come from a file past the page cache (O_DIRECT), or on a machine with a GPU from pinned host memory. Memory is
the highest resident set of a process (VmHWM), loading included; on a GPU the most that torch has allocated there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import environment
from benchmarks.harness.on_nodes import write
from benchmarks.serving.figures import latencies
from benchmarks.serving.offload_worker import AGAIN, GUESSED, MODES, RESIDENT, SHAPES, measure, write_model
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.inference.model import DTYPES, TrainedModel
from scmoe_ds.planner.rounds import Spread

ROWS = ("medium:fp32:pos2", "medium:bf16:pos2", "medium:bf16:pos3", "xl:bf16:pos2")
WINDOW_KEYS = (
    "window_ms",
    "migration_ms",
    "gigabytes_per_s",
    "limit_percent",
    "reached_percent",
    "share_percent",
    "computation_slowed_ms",
    "migration_slowed_ms",
    "again_percent",
)


def table(found: dict[str, Any], family: str) -> list[dict[str, Any]]:
    """One entry per mode; all compute the same, and resident is what they are compared with."""
    times = {mode: [answer["pair_ms"] for answer in answers] for mode, answers in found["answers"].items()}
    resident, late = times["resident"], times["offload"]
    entries = []
    for mode, own in times.items():
        extra = [100 * (mine / base - 1) for mine, base in zip(own, resident, strict=True)]
        counts = Counter[str]()
        for answer in found["answers"][mode]:
            counts.update(answer["counts"])
        reached = [_reached(mine, base, slow) for mine, base, slow in zip(own, resident, late, strict=True)]
        entries.append(
            {
                "row": f"{family} {mode}",
                "pair_ms": vars(Spread.of(own)),
                "extra_percent": vars(Spread.of(extra)),
                "removed_percent": vars(Spread.of(reached)) if mode not in (*RESIDENT, "offload") else None,
                "peak_bytes": found["peaks"][mode],
                "memory_of_resident": found["peaks"][mode] / found["peaks"]["resident"],
                "counts": dict(counts),
                "same_text": found["texts"][mode] == found["texts"]["resident"],
            }
        )
    return entries


def _reached(early: float, resident: float, late: float) -> float:
    """Of the extra time of a mode that waits for every expert, the percentage that another one does not have."""
    return 100 * (1 - (early - resident) / (late - resident))


def window(found: dict[str, Any], family: str) -> dict[str, Any]:
    """What the window of a row allows and what was reached, each of `WINDOW_KEYS` as a spread over the rounds."""
    values: dict[str, list[float]] = {key: [] for key in WINDOW_KEYS}
    modes = (found["answers"][mode] for mode in ("resident", AGAIN, "offload", "offload-async"))
    for resident, again, late, early in zip(*modes, strict=True):
        window_ms, base = again["window_ms"], resident["pair_ms"]
        migration = 1e3 * late["counts"]["waited_s"] / late["counts"]["migrations"]
        per_pair = early["counts"]["migrations"] / late["counts"]["migrations"]
        waited = per_pair * 1e3 * early["counts"]["waited_s"] / early["counts"]["migrations"]
        limit, reached = 100 * min(1.0, window_ms / migration), _reached(early["pair_ms"], base, late["pair_ms"])
        own_work = late["pair_ms"] - base - migration  # of a mode with offloaded experts, whatever it waits for
        slowed = early["pair_ms"] - base - own_work - waited
        gigabytes = late["counts"]["migrated_bytes"] / late["counts"]["waited_s"] / 1e9
        lost = waited - max(0.0, migration - window_ms - slowed)
        share = 100 * reached / limit if limit else 0.0
        rounds = (
            window_ms,
            migration,
            gigabytes,
            limit,
            reached,
            share,
            slowed,
            lost,
            100 * (again["pair_ms"] / base - 1),
        )
        for key, value in zip(WINDOW_KEYS, rounds, strict=True):
            values[key].append(value)
    return {"row": family, **{key: vars(Spread.of(own)) for key, own in values.items()}}


def _spread(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value['median']:.{digits}f} ({value['p10']:.{digits}f}–{value['p90']:.{digits}f})"


def markdown(record: dict[str, Any]) -> str:
    """Both tables as a person reads them."""
    where = record["environment"]
    lines = [
        f"# Experts from {record['tier']}: what the window of a shortcut allows",
        "",
        f"{code(record['command'])}, {where['date']}, {where['device']}, torch {where['torch']}, commit "
        f"{where['commit']}; computed in {record['dtype']}, {record['rounds']} rounds of {record['tokens']} tokens, "
        f"one sequence; room for {record['places']} experts (top-2: twice as many). Medians, 10th to 90th percentile.",
        "",
        "| | window / migration, ms | the disk's GB/s | limit, % | reached, % | **share of the limit, %** | "
        "computation slowed by, ms | migration slowed by, ms | resident against itself, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["windows"]:
        cells = [
            f"{_spread(row['window_ms'], 1)} / {_spread(row['migration_ms'], 1)}",
            _spread(row["gigabytes_per_s"], 2),
        ]
        cells += [_spread(row[key], 0) for key in ("limit_percent", "reached_percent", "share_percent")]
        cells += [_spread(row[key], 2) for key in ("computation_slowed_ms", "migration_slowed_ms")]
        lines.append(f"| {escape(row['row'])} | {' | '.join(cells)} | {_spread(row['again_percent'], 1)} |")
    lines += [
        "",
        "| | ms per pair of blocks | against resident, % | of offload's extra time removed, % | peak memory, GB | of "
        "resident | experts used / found there / migrated / guessed / guessed right | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in record["rows"]:
        names = ("used", "hits", "migrations", "predicted", "confirmed")
        used = " / ".join(str(entry["counts"][name]) for name in names) if entry["counts"] else "–"
        lines.append(
            f"| {escape(entry['row'])} | {_spread(entry['pair_ms'], 2)} | {_spread(entry['extra_percent'], 0)} | "
            f"{_spread(entry['removed_percent'], 0)} | {entry['peak_bytes'] / 1e9:.2f} | "
            f"{entry['memory_of_resident']:.2f} | {used} | {'yes' if entry['same_text'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def models(rows: Sequence[str], exports: Sequence[str], scratch: Path | None) -> Iterator[tuple[str, bool, Path]]:
    """The rows' name, whether it is a standard MoE, and an export of it; one at a time, several would not fit."""
    for path in map(Path, exports):
        architecture = TrainedModel.open(path, contents=False).config.architecture
        yield architecture, architecture == "topk", path
    for row in rows if not exports else ():
        shape, dtype, position = row.split(":")
        standard = position == "top2"
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            path = Path(directory) / "model"
            write_model(shape, "topk" if standard else "scmoe", "pos2" if standard else position, dtype, path)
            yield f"{shape}, {dtype} file, {position}", standard, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="shapes: " + ", ".join(SHAPES))
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the computation")
    parser.add_argument("--places", type=int, default=2, help="experts that fit into memory, of all layers together")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the models are written; default: the temporary directory")
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    parser.add_argument(
        "--exports", nargs="+", default=[], help="trained models instead of random weights, each in rows of its own"
    )
    args = parser.parse_args()
    entries: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    for family, standard, path in models(args.rows, args.exports, args.scratch):
        flags = {"path": str(path), "dtype": args.dtype, "places": args.places * (1 + standard)}
        modes = ["resident", AGAIN, *MODES[1:], *([GUESSED] if standard else [])]
        found = measure(flags, modes, args.rounds, args.tokens)
        entries += table(found, family)
        windows += [] if standard else [window(found, family)]
    said = " ".join(sys.argv[1:]).replace(f" --scratch {args.scratch}", "")  # where, is no part of the record
    shapes = dict.fromkeys(SHAPES[row.split(":")[0]][1] for row in args.rows)
    record = {
        "command": f"python -m benchmarks.serving.offload {said}",
        "environment": environment(),
        "model": "trained models" if args.exports else ", ".join(shapes),
        "tier": "pinned host memory" if torch.cuda.is_available() else "a file, past the page cache",
        "dtype": args.dtype,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "places": args.places,
        "windows": windows,
        "rows": entries,
    }
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, "offload_trained" if args.exports else "offload_window", record, text, latencies(record))


if __name__ == "__main__":
    main()
