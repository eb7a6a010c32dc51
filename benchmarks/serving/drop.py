"""Dropped rows on two nodes: prefill through one pair, with several loads of the experts and at several rates.

    python -m benchmarks.serving.drop --share 0.6 --output benchmarks/results

The link is set so that the all-to-all takes `--share` of the top-2 MoE layer with an even gate. Thresholds are
calibrated on the pair's own tokens, for each gate. An *expert's* skew is the busiest expert's load over the mean: at 4,
with two choices among 16 experts, its rank is only 1.2 times as busy as the mean. A *rank's* skew is the busier rank's
load over the mean: load-aware thresholds follow that. All rows of a table alternate within rounds, under the schedule
of the row without drops; a speed-up is the median of the ratios within rounds. "The layer" is the step without the
backbone's operators and the shared expert: gate, decision, experts, and waiting for the all-to-alls. "Decided
beforehand" has the routing ready: what deciding would leave if it took no time.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.harness.link import find_forward_rate
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.skewed_gates import Shares, first_expert, first_rank
from benchmarks.harness.variants import Shape, Variant
from benchmarks.serving.drop_page import AGAIN, HALF, KNOWN, LOAD_AWARE, NONE, ONE, PAPER, TWO, figure, markdown
from benchmarks.serving.dropped_pair import Bench, Drops
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.sparse.calibration import default_spread

_WIDE = "GPT2-MoE-Medium cut to 512 wide"
SHAPE = Shape(f"{_WIDE}, four experts per rank, eight for two choices", 512, 8, 2, 192, 8, 2.0)
TWICE = replace(SHAPE, num_experts=16)
"""With two choices among 8 experts, one with four times the mean load would be every token's: no threshold could touch
it."""
_EXACT = {"dispatch": "exact", "drop_tokens": False}
_POS2 = {"architecture": "scmoe", "position": "pos2", **_EXACT}
LAYERS = {
    "top-2": Variant({"architecture": "pipelined_topk", "top_k": 2, **_EXACT}),
    "ScMoE": Variant(_POS2),
    "ScMoE-2": Variant({**_POS2, "top_k": 2}),
}
_ALL: dict[str, Drops | None] = {NONE: None, ONE: Drops("1t"), TWO: Drops("2t")}
_FOLLOWING: dict[str, Drops | None] = {
    ONE + LOAD_AWARE: Drops("1t", load_aware=True),
    TWO + LOAD_AWARE: Drops("2t", load_aware=True),
}
ROWS: dict[str, dict[str, Drops | None]] = {
    "even": {
        NONE: None,
        AGAIN: None,
        **_ALL,
        HALF: Drops("2t", spread=lambda top_k: default_spread(top_k) / 2),
        PAPER: Drops("2t", spread=lambda top_k: 0.01),
    },
    "expert": {**_ALL, **_FOLLOWING},
    "rank": {**_ALL, **_FOLLOWING, KNOWN: Drops("1t", load_aware=True, ready=True)},
}
"""By what is skewed. Where loads are even, thresholds have none to follow; spread and noise are alike everywhere."""


def shares_of(kind: str, skew: float, experts: int) -> Shares | None:
    """What the gate is asked for; None: it stays as it is, nearly even."""
    if kind == "rank":
        return first_rank(skew, experts, dist.get_world_size())
    return first_expert(skew, experts) if kind == "expert" else None


def bench(layer: str, kind: str, skew: float, settings: dict[str, Any]) -> Bench:
    """A layer whose gate is skewed. Collective."""
    variant = LAYERS[layer]
    shape = replace(TWICE if variant.section.get("top_k") == 2 else SHAPE, sequences=settings["sequences"])
    return Bench(variant, shape, shares_of(kind, skew, shape.num_experts), settings["method"])


def at_skew(layer: str, kind: str, skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """A table of all rows at one rate. Collective."""
    rows = bench(layer, kind, skew, settings)
    for name, drops in ROWS[kind].items():
        rows.add(name, drops, settings["rate"])
    return rows.measure(settings["rounds"])


def curve(layer: str, skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """A table of all rates. Collective."""
    rows = bench(layer, "expert", skew, settings)
    rows.add(NONE, None, 0.0)
    for rate in settings["rates"]:
        for name in (ONE, TWO):
            rows.add(f"{name}, {rate:g}", _ALL[name], rate)
    return {"layer": layer, "skew": skew, **rows.measure(settings["rounds"])}


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """The link, and all tables. Collective."""
    shape = replace(TWICE, sequences=settings["sequences"])
    link = find_forward_rate(shape, settings["share"], settings["method"])
    gates = {"even": ("even", 1.0)}
    for kind in ("expert", "rank"):
        gates |= {f"{kind} {skew:g}": (kind, skew) for skew in settings[f"{kind}_skews"]}
    tables = {
        layer: {title: at_skew(layer, *gate, settings) for title, gate in gates.items()} for layer in settings["layers"]
    }
    found: dict[str, Any] = {"link": vars(link), "layers": tables}
    if settings["rates"]:
        found["curve"] = curve(settings["layers"][-1], settings["curve_skew"], settings)
    return found


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    return measured(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of the top-2 MoE layer")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--expert-skews", type=float, nargs="*", default=[4.0], help="busiest expert / mean")
    parser.add_argument("--rank-skews", type=float, nargs="*", default=[1.8], help="busier rank / mean, at most 2")
    parser.add_argument("--rate", type=float, default=0.25, help="of the computation, to leave out")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[0.1, 0.25, 0.4, 0.6], help="of the curve, of the last layer"
    )
    parser.add_argument("--curve-skew", type=float, default=1.8, help="of the busiest expert of the curve")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--sequences", type=int, default=3, help="of 192 tokens, that each rank reads at once")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="directory for JSON, table and figure")
    args, settings = parse(parser, rank_main)
    record = {"benchmark": "benchmarks.serving.drop"} | on_nodes("benchmarks.serving.drop", settings)
    record["shape"] = f"{SHAPE.name}; {args.sequences * SHAPE.seq_length} tokens per rank and prefill, fp32"
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, f"drop_{round(100 * args.share)}", record, text, figure(record))


if __name__ == "__main__":
    main()
