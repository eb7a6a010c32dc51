"""Overloaded ranks in low precision: prefill through one ScMoE pair on two nodes, at several skews of the gate.

    python -m benchmarks.serving.low_precision --share 0.6 --output benchmarks/results

The link is set so that the all-to-all takes `--share` of the top-2 MoE layer with an even gate. A skew is the busiest
expert's load over the mean. Every row tolerates low precision here: the decision looks at the loads. All rows of a
table alternate within rounds, each under the schedule of the package's own calibration; a speed-up is the median of the
ratios within rounds. "The layer" is the step without the backbone's operators and the shared expert: gate, counts,
decision, conversion, experts, and waiting for the all-to-alls. What of decision and conversion the layer waits for is
measured by itself (low_precision_exposed.py).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import tables
from benchmarks.harness.link import find_forward_rate
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.parts import CPU, RecordedPair
from benchmarks.harness.skewed_gates import first_expert, skew_gates
from benchmarks.harness.variants import Shape, Variant, build
from benchmarks.serving.low_precision_exposed import WARM_UP, layer_seconds, pair_rounds, variants
from benchmarks.serving.low_precision_exposed import measure as measure_exposed
from benchmarks.serving.low_precision_exposed import text as exposed_text
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.decisions.low_precision import Counts, LowPrecision
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks

SHAPE = Shape("GPT2-MoE-Medium cut to 512 wide, two experts per rank", 512, 8, 5, 256, 4, 2.0)
SCMOE = Variant({"architecture": "scmoe", "position": "pos2", "dispatch": "exact", "drop_tokens": False})
OFF, AGAIN, HOT, ALL = "off", "off again (A/A)", "ReaLB", "low precision everywhere"
NO_LINK = "ReaLB, no communication"


@dataclass(kw_only=True)
class Row(RecordedPair):
    """One way to compute the pair."""

    counts: Counts | None = None

    def schedule(self, hidden: Tensor) -> None:
        """Gives the pair the schedule of the package's calibration. Collective."""
        calibrator = Calibrator([self.pair], OverlapConfig(num_chunks=1), CPU, "prefill")
        while calibrator.calibrating:
            dist.barrier()
            calibrator.begin()
            with torch.inference_mode():
                self.pair(hidden)


class Bench:
    """The rows of one skew on this rank. Collective."""

    def __init__(self, skew: float, settings: dict[str, Any]) -> None:
        dtype = DTYPES[settings["dtype"]]
        torch.manual_seed(dist.get_rank())
        self.hidden = torch.randn(SHAPE.sequences, SHAPE.seq_length, SHAPE.hidden_size).to(dtype)
        make = partial(_pair, skew=skew, hidden=self.hidden, dtype=dtype, method=settings["method"])
        self.rows = {name: Row(pair=make()) for name in (OFF, AGAIN, HOT, ALL)}
        self.rows[NO_LINK] = Row(pair=make(communicates=False))
        self.plain = self.rows[HOT].pair.layer.deepspeed_moe.experts
        for name in (HOT, ALL, NO_LINK):
            use = LowPrecision("all" if name == ALL else "hot", score=1.0)
            (experts,) = use_low_precision(self.rows[name].pair, use).layers
            self.rows[name].counts = experts.counts
        for name in (OFF, HOT, ALL):
            self.rows[name].schedule(self.hidden)
        counts = self.rows[HOT].counts
        assert counts is not None and counts.hot in (0, counts.passes)
        self.is_hot = counts.hot > 0
        for name, like in ((AGAIN, OFF), (NO_LINK, HOT)):
            self.rows[name].pair.schedule = self.rows[like].pair.schedule
        with torch.inference_mode():
            rows_E = _over_world(self.rows[OFF].pair(self.hidden).exp_counts)
        self.busiest = float(rows_E.max() / rows_E.mean())
        self.load = float(rows_E.view(dist.get_world_size(), -1).sum(1)[dist.get_rank()])

    def measure(self, rounds: int, pair_rounds: int) -> dict[str, Any]:
        """Times of all rows, what they are over others, and what is exposed. Collective."""
        for row in self.rows.values():
            row.spans = []
        own = interleave(
            {name: partial(row.step, self.hidden) for name, row in self.rows.items()}, rounds, WARM_UP, dist.barrier
        )
        steps = {name: over_ranks(seconds) for name, seconds in own.items()}
        layers = {
            name: over_ranks(layer_seconds(own[name], (row.spans or [])[WARM_UP:])) for name, row in self.rows.items()
        }
        hot, loads = gather(self.is_hot), gather(self.load)
        return {
            "rows": [_row(name, steps, layers) for name in self.rows],
            "exposed": self._exposed(pair_rounds) if any(hot) else None,
            "busiest_expert_over_mean": self.busiest,
            "rank_load_over_mean": [load / statistics.mean(loads) for load in loads],
            "hot": hot,
        }

    def _exposed(self, rounds: int) -> dict[str, Any]:
        row = self.rows[HOT]
        like = row.pair.layer.deepspeed_moe.experts
        experts = variants(self.plain, row.pair.layer.slices, like.settings, like.format, self.is_hot)
        return measure_exposed(row, *experts, self.hidden, rounds)


def _row(name: str, steps: dict[str, list[float]], layers: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"row": name}
    for part, times in (("step", steps), ("layer", layers)):
        found[f"{part}_ms"] = 1e3 * statistics.median(times[name])
        found[f"{part}_speedup"] = vars(Spread.of_ratios(times[OFF], times[name]))
    return found


def _pair(skew: float, hidden: Tensor, dtype: torch.dtype, method: str, communicates: bool = True) -> StagedPair:
    """The pair in evaluation mode, with a gate that gives expert 0 `skew` times the mean load."""
    pair = build(replace(SCMOE, communicates=communicates), SHAPE, 0.0, method)
    assert isinstance(pair, StagedPair)
    pair.eval().requires_grad_(False)
    if skew > 1:
        skew_gates([pair], partial(pair, hidden.float()), first_expert(skew, SHAPE.num_experts))
    return pair.to(dtype)


def _over_world(counts_E: Tensor) -> Tensor:
    return torch.tensor(gather(counts_E.tolist())).double().sum(0)


def tables_at(settings: dict[str, Any]) -> dict[str, Any]:
    """The link, and a table for each skew. Collective."""
    dtype, rounds = DTYPES[settings["dtype"]], (settings["rounds"], settings["pair_rounds"])
    link = find_forward_rate(SHAPE, settings["share"], settings["method"], dtype, settings["rate"])
    found = {str(skew): Bench(skew, settings).measure(*rounds) for skew in settings["skews"]}
    return {"link": vars(link), "skews": found}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    return tables_at(settings)


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings, link = record["settings"], record["link"]
    lines = [
        f"# Low precision on overloaded ranks, all-to-all {100 * settings['share']:.0f} % of a top-2 layer",
        "",
        *tables.head(record),
        f"{SHAPE.name}; {SHAPE.tokens} tokens per rank and prefill, {settings['dtype']}, one ScMoE pair (Pos-2). Link "
        f"{link['rate_mbit']:.0f} Mbit/s, where the all-to-all takes {100 * link['share']:.0f} % of a top-2 MoE layer "
        f"with an even gate ({link['all_to_all_ms']:.0f} of {link['layer_ms']:.0f} ms). {settings['rounds']} "
        "interleaved rounds; speed-up over the first row: median (10th–90th percentile) of the ratios within rounds, "
        "of the slower rank. Layer: the step without attentions, MLP and shared expert. Hot ranks compute in int8.",
        "",
    ]
    for wanted, found in record["skews"].items():
        loads = " and ".join(f"{load:.2f}" for load in found["rank_load_over_mean"])
        hot = " and ".join(str(rank) for rank, is_hot in enumerate(found["hot"]) if is_hot) or "none"
        cells = [
            [row["row"], *(text for part in ("step", "layer") for text in _cells(row, part))] for row in found["rows"]
        ]
        lines += [
            f"## skew {float(wanted):g}",
            "",
            f"Busiest expert {found['busiest_expert_over_mean']:.2f} × the mean, ranks {loads} ×; hot rank: {hot}.",
            "",
            *tables.table(["row", "step ms", "speed-up", "layer ms", "speed-up"], cells),
            "",
        ]
        if found["exposed"]:
            lines += [exposed_text(found["exposed"]), ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], part: str) -> list[str]:
    return [f"{row[f'{part}_ms']:.0f}", str(Spread(**row[f"{part}_speedup"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of the top-2 MoE layer")
    parser.add_argument("--rate", type=float, help="Mbit/s of an earlier record, to repeat it at its rate")
    parser.add_argument("--skews", type=float, nargs="+", default=[1.0, 1.8, 4.0], help="1: the gate as it starts")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights and rows")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--rounds", type=int, default=15, help="of all rows")
    parser.add_argument(
        "--pair-rounds", type=pair_rounds, default=60, help="of decision and conversion, where a rank is hot; from 6"
    )
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.serving.low_precision", settings)
    text = markdown(record)
    print(text)
    if args.output:
        suffix = "" if args.dtype == "fp32" else f"_{args.dtype}"
        write(args.output, f"low_precision_{round(100 * args.share)}{suffix}", record, text)


if __name__ == "__main__":
    main()
