"""Dropped rows on two nodes: prefill through one pair, at several skews of the gate and at several rates.

    python -m benchmarks.serving.drop --share 0.6 --output benchmarks/results

The link is set so that the all-to-all takes `--share` of the top-2 MoE layer with an even gate. Thresholds are
calibrated on the pair's own tokens, at each skew. A skew is the busiest expert's load over the mean. All rows of a
table alternate within rounds, under the schedule of the row without drops; a speed-up is the median of the ratios
within rounds. "The layer" is the step without the backbone's operators and the shared expert: gate, decision, experts,
and waiting for the all-to-alls. "Decided beforehand" has the routing ready: what deciding would leave if it took no
time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.link import find_rate
from benchmarks.harness.measure import EVICTED_BYTES, cold
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.parts import CPU, RecordedPair, parts_of, record_steps
from benchmarks.harness.skewed_gates import first_expert, skew_gates
from benchmarks.harness.variants import Shape, Variant, baseline, build
from benchmarks.serving.drop_page import AGAIN, KNOWN, LOAD_AWARE, NONE, ONE, TWO, figure, markdown
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.inference.droppable import digests_of
from scmoe_ds.inference.dropping import Dropped, attach_dropping
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.gate import Routing
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.sparse.sparsity_file import Method, Sparsity, curve_of

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
BACKBONE = ("attention", "MLP", "shared expert")
ROWS: dict[str, tuple[Method, bool] | None] = {
    NONE: None,
    AGAIN: None,
    ONE: ("1t", False),
    TWO: ("2t", False),
    ONE + LOAD_AWARE: ("1t", True),
    TWO + LOAD_AWARE: ("2t", True),
    KNOWN: ("1t", True),
}
STEPS_TO_SCHEDULE, WARM_UP = 8, 2
TRAINED = 2.6
"""Times a new gate's weights: its logits then differ by 1.5 (standard deviation), as a trained gate's about do."""


class Listener:
    """A routing rule that changes nothing and hears all criteria."""

    in_training = False

    def __init__(self) -> None:
        self.heard = torch.zeros(0)

    def apply(self, routing: Routing) -> Routing:
        """Listens."""
        self.heard = criterion(routing).flatten()
        return routing


@dataclass
class Ready:
    """A routing rule that has decided."""

    routing: Routing
    in_training = False

    def apply(self, routing: Routing) -> Routing:
        """The routing of the same tokens, as it was decided."""
        return self.routing


@dataclass(kw_only=True)
class Row(RecordedPair):
    """One way to compute the pair."""

    dropped: Dropped | None = None


class Bench:
    """Rows of one layer at one skew on this rank. Collective."""

    def __init__(self, layer: str, skew: float, settings: dict[str, Any]) -> None:
        torch.manual_seed(dist.get_rank())
        variant = LAYERS[layer]
        self.shape = replace(TWICE if variant.section.get("top_k") == 2 else SHAPE, sequences=settings["sequences"])
        self.hidden = torch.randn(self.shape.sequences, self.shape.seq_length, self.shape.hidden_size)
        self._variant, self._skew, self._method = variant, skew, settings["method"]
        self.rows = {NONE: Row(pair=self._pair()), AGAIN: Row(pair=self._pair())}
        calibrator = Calibrator([self.rows[NONE].pair], OverlapConfig(num_chunks=1), CPU, "prefill")
        for _ in range(STEPS_TO_SCHEDULE):
            dist.barrier()
            calibrator.begin()
            self.rows[NONE].step(self.hidden)
        self.rows[AGAIN].pair.schedule = self.rows[NONE].pair.schedule
        self.sparsity = self._calibrated()
        with torch.inference_mode():
            counts = self.rows[NONE].pair(self.hidden).exp_counts.tolist()
        self.rows_E = torch.tensor(gather(counts)).double().sum(0)

    def add(self, name: str, rate: float, method: Method, load_aware: bool, ready: bool = False) -> None:
        """A row that drops."""
        pair = self._pair()
        pair.schedule = self.rows[NONE].pair.schedule
        row = self.rows[name] = Row(pair=pair, dropped=attach_dropping(pair, self.sparsity, rate, method, load_aware))
        if ready:
            with decisions(pair.layer) as found:
                row.step(self.hidden)
            pair.layer.early_rule, pair.layer.routing_rule = None, Ready(found[-1])

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Times of all rows, and what they left out. Collective."""
        for row in self.rows.values():
            row.spans = []
        steps = {name: partial(row.step, self.hidden) for name, row in self.rows.items()}
        own = interleave(steps, rounds, WARM_UP, dist.barrier)
        slower = {name: over_ranks(seconds) for name, seconds in own.items()}
        layers = {}
        for name, row in self.rows.items():
            spans = (row.spans or [])[WARM_UP:]
            without = [1e-3 * sum(parts_of(each)[kind] for kind in BACKBONE) for each in spans]
            layers[name] = over_ranks([step - part for step, part in zip(own[name], without, strict=True)])
        return [
            {
                "row": name,
                **(_numbers("step", slower, name) | _numbers("layer", layers, name)),
                "shares": None if row.dropped is None else row.dropped.shares().record(),
            }
            for name, row in self.rows.items()
        ]

    def loads(self) -> dict[str, Any]:
        """Of the gate, before drops."""
        ranks_P = self.rows_E.view(dist.get_world_size(), -1).sum(1)
        return {
            "busiest_expert_over_mean": float(self.rows_E.max() / self.rows_E.mean()),
            "rank_load_over_mean": (ranks_P / ranks_P.mean()).tolist(),
        }

    def _pair(self) -> Any:
        pair: Any = build(self._variant, self.shape, 0.0, self._method)
        pair.eval().requires_grad_(False)
        pair.layer.deepspeed_moe.gate.wg.weight.mul_(TRAINED)
        if self._skew > 1:
            skew_gates([pair], partial(pair, self.hidden), first_expert(self._skew, self.shape.num_experts))
        return pair

    def _calibrated(self) -> Sparsity:
        """Thresholds of the tokens of all ranks; neurons stay as they are, which takes as long as sorted ones."""
        layer = self.rows[NONE].pair.layer
        layer.routing_rule = listener = Listener()
        self.rows[NONE].step(self.hidden)
        layer.routing_rule = None
        spread = 0.1 / layer.top_k  # as scmoe sparsify
        curve = curve_of("moe", torch.cat(gather(listener.heard.clone())), spread)
        known = {"top_k": layer.top_k, "spread": spread, "tokens": self.shape.tokens * dist.get_world_size()}
        gates, neurons = digests_of([layer])
        return Sparsity(gates=gates, neurons=neurons or "", measure="abs-gate", layers=(curve,), **known)


@contextmanager
def decisions(layer: Any) -> Iterator[list[Routing]]:
    """What the layer's early rule decides meanwhile."""
    found: list[Routing] = []
    decide = layer.early_rule.decide

    def heard(*args: Any) -> Any:
        decision = decide(*args)
        found.append(decision.routing)
        return decision

    layer.early_rule.decide = heard
    yield found
    layer.early_rule.decide = decide


def _numbers(part: str, times: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    return {
        f"{part}_ms": 1e3 * statistics.median(times[name]),
        f"{part}_speedup": vars(Spread.of_ratios(times[NONE], times[name])),
    }


def at_skew(layer: str, skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """A table of all rows at one rate. Collective."""
    bench = Bench(layer, skew, settings)
    for name, how in ROWS.items():
        if how is not None:
            bench.add(name, settings["rate"], *how, ready=name == KNOWN)
    return {**bench.loads(), "rows": bench.measure(settings["rounds"])}


def curve(layer: str, skew: float, settings: dict[str, Any]) -> dict[str, Any]:
    """A table of all rates. Collective."""
    bench = Bench(layer, skew, settings)
    for rate in settings["rates"]:
        bench.add(f"{ONE}, {rate:g}", rate, "1t", False)
        bench.add(f"{ONE}{LOAD_AWARE}, {rate:g}", rate, "1t", True)
    return {"layer": layer, "skew": skew, **bench.loads(), "rows": bench.measure(settings["rounds"])}


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """The link, and all tables. Collective."""
    variant = next(iter(baseline("exact").values()))
    torch.manual_seed(dist.get_rank())
    shape = replace(TWICE, sequences=settings["sequences"])
    hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size)
    run = build(variant, shape, 0.0, settings["method"]).eval()

    def step() -> None:
        with torch.inference_mode():
            run(hidden)

    link = find_rate(partial(record_steps, run, cold(step, torch.zeros(EVICTED_BYTES // 4))), settings["share"])
    tables = {
        layer: {f"{skew:g}": at_skew(layer, skew, settings) for skew in settings["skews"]}
        for layer in settings["layers"]
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
    parser.add_argument("--skews", type=float, nargs="+", default=[1.0, 1.8, 4.0], help="1: an even gate, nearly")
    parser.add_argument("--rate", type=float, default=0.25, help="of the computation, to leave out")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[0.1, 0.25, 0.4, 0.6], help="of the curve, of the last layer"
    )
    parser.add_argument("--curve-skew", type=float, default=1.8, help="of the gate of the curve")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--sequences", type=int, default=4, help="of 192 tokens, that each rank reads at once")
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
