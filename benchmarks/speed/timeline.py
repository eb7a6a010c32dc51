"""What a training step of a pair looks like on two nodes: without overlap, with it, in two chunks.

    python -m benchmarks.speed.timeline --share 0.6 --output benchmarks/results

Measured spans of one step each, at the rate that benchmarks.speed.block finds for that share, as a record and figures
with one scale.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.on_nodes import on_nodes, parse
from benchmarks.harness.parts import record_steps
from benchmarks.harness.variants import SHAPES, main_table, one_primitive
from benchmarks.speed.block import Bench, link
from scmoe_ds.figure_style import save
from scmoe_ds.trace.recorder import Span
from scmoe_ds.trace.spans import gather_spans
from scmoe_ds.trace.timeline_figure import figure, phases_ms

DRAWN = ("serial", "overlapped", "chunked")


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The spans; each of the two processes runs it."""
    shape = SHAPES[settings["shape"]]
    names = {kind: f"ScMoE Pos-{settings['position']}, {kind}" for kind in DRAWN}
    with one_primitive(settings["method"]):
        rate = link(shape, "train", settings)
        whole = main_table(settings["dispatch"])
        bench = Bench({name: whole[name] for name in names.values()}, shape, "train", settings)
        bench.calibrate()
        spans = {}
        for kind, name in names.items():
            *_, last = record_steps(bench.runs[name], bench.steps[name], 5)
            spans[kind] = [[vars(span) for span in rank] for rank in gather_spans(last) or []]
    return {"link": vars(rate), "spans": spans}


def draw(record: dict[str, Any], stem: Path) -> list[Path]:
    """Writes a figure for each schedule of a record; returns their paths."""
    spans = {kind: [[Span(**span) for span in rank] for rank in ranks] for kind, ranks in record["spans"].items()}
    until_ms = max(map(phases_ms, spans.values()))
    paths = {kind: stem.with_name(f"{stem.name}_{kind}.png") for kind in spans}
    for kind, ranks in spans.items():
        title = f"ScMoE Pos-{record['settings']['position']}, {kind}, {record['link']['rate_mbit']:.0f} Mbit/s: "
        save(figure(ranks, title, until_ms=until_ms), paths[kind])
    return list(paths.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="swin")
    parser.add_argument("--position", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--dispatch", choices=["padded", "exact"], default="padded")
    parser.add_argument("--method", choices=["collective", "send_receive"], default="send_receive")
    parser.add_argument("--output", type=Path, default=Path("."), help="directory for the record and the figures")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.speed.timeline", settings | {"rounds": 1, "skew": 0.0})
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"timeline_{args.shape}_{round(100 * args.share)}"
    stem.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(f"{stem}.json", *draw(record, stem))


if __name__ == "__main__":
    main()
