"""Whole GPT training iterations on two nodes: DeepSpeed's MoE, the strong baselines, and ScMoE with its own schedules.

    python -m benchmarks.speed.end_to_end --share 0.6 --output benchmarks/results

Every variant is a DeepSpeed engine (ZeRO-1, Adam) from `scmoe_ds.initialize`; "auto" calibrates in its first
micro-batches, as in any training. All engines live in one process per node; each round runs some micro-batches and one
evaluation of every variant in rotating order.

On links as slow as these the all-reduce of the dense gradients, which no MoE schedule touches, takes as long as several
micro-batches. It comes once per iteration, with the optimizer step, in the last micro-batch. So there are columns for
the micro-batches before it, for what the last one takes beyond them, and for whole iterations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.link import find_rate, rates_in
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.pace import References
from benchmarks.harness.parts import record_steps
from benchmarks.harness.variants import AGAIN, BASELINES, Shape, baseline, one_primitive
from benchmarks.speed.block import Bench
from scmoe_ds.comm.transport import METHODS
from scmoe_ds.planner.rounds import Spread, over_ranks

LAYERS, VOCABULARY = 4, 1024
SHAPE = Shape("GPT, 4 layers, 384 wide, 2 experts, 2 × 144 tokens per rank", 384, 12, 2, 144, 2, 2.0)
PER_ROUND = 2
WARM_UP = 8
Times = dict[str, list[float]]


def architectures(dispatch: str) -> dict[str, dict[str, Any]]:
    """The sections that are compared, by name; the baseline first."""
    one_chunk = {"overlap": {"num_chunks": 1}}
    found: dict[str, dict[str, Any]] = {}
    if dispatch == "exact":
        found = {name: {"architecture": "pipelined_topk", **one_chunk} for name in ("top-2", "top-2" + AGAIN)}
    stock = "" if dispatch == "padded" else " (stock, padded)"
    found[f"DeepSpeed top-2{stock}"] = {"architecture": "topk"}
    if dispatch == "padded":
        found["DeepSpeed top-2" + AGAIN] = {"architecture": "topk"}
    return found | {
        f"DeepSpeed Residual MoE{stock}": {"architecture": "shared_expert"},
        "top-2, pipelined (auto)": {"architecture": "pipelined_topk"},
        "shared expert, overlapped (auto)": {"architecture": "overlapped_shared_expert"},
        **{f"ScMoE Pos-{p}, auto": {"architecture": "scmoe", "position": f"pos{p}"} for p in (1, 2, 3)},
        "DGMoE Pos-2, auto": {"architecture": "dgmoe"},
        "DGMoE-Share Pos-2, auto": {"architecture": "dgmoe", "pairs_per_moe": 2},
    }


def make_engine(section: Mapping[str, Any], settings: dict[str, Any]) -> Any:
    """An engine for a model with this section, on this rank."""
    import scmoe_ds
    from scmoe_ds.config.section import ScMoEConfig
    from scmoe_ds.models.gpt import GPT
    from scmoe_ds.models.initialization import initialize_parameters
    from scmoe_ds.models.layers import GPTSettings

    ranks = dist.get_world_size()
    whole = {
        "train_micro_batch_size_per_gpu": SHAPE.sequences,
        "gradient_accumulation_steps": settings["accumulation"],
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
        "scmoe": {
            "num_experts": SHAPE.num_experts,
            "expert_parallel_size": ranks,
            "all_to_all": settings["method"],
            "capacity_factor": SHAPE.capacity_factor,
            "eval_capacity_factor": SHAPE.capacity_factor,
            "dispatch": settings["dispatch"],
            **section,
        },
    }
    config = ScMoEConfig.from_deepspeed(whole)
    shape = GPTSettings(LAYERS, SHAPE.hidden_size, SHAPE.heads, VOCABULARY, SHAPE.seq_length)
    model = GPT(shape, config)
    initialize_parameters(model, 1, shape.init_method_std, LAYERS)
    return scmoe_ds.initialize(model=model, config=whole)[0]


class Training:
    """One engine and what is timed of it.

    Attributes:
        calibration_s: this rank's seconds of the calibrating micro-batches. The very first, which the calibration runs
            but does not time, is among them.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.calibration_s: list[float] = []
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.tokens = torch.randint(VOCABULARY, (SHAPE.sequences, SHAPE.seq_length), generator=generator)

    def micro_batch(self) -> float:
        """Forward and backward, and in the last one of an iteration all-reduce and optimizer step; seconds."""
        started = time.perf_counter()
        self.engine.backward(self.engine(self.tokens, labels=self.tokens).loss)
        self.engine.step()
        return time.perf_counter() - started

    def evaluation(self) -> float:
        """Seconds of a forward pass with its loss."""
        started = time.perf_counter()
        self.engine.eval()
        with torch.no_grad():
            self.engine(self.tokens, labels=self.tokens)
        self.engine.train()
        return time.perf_counter() - started

    def warm_up(self) -> None:
        """`WARM_UP` micro-batches, in which a calibration begins and ends, and one evaluation."""
        for _ in range(WARM_UP):
            dist.barrier()
            calibrating = self.engine.overlap.calibrating
            seconds = self.micro_batch()
            # The micro-batch that ends the calibration finds its schedules before it starts to compute.
            if calibrating and self.engine.overlap.calibrating:
                self.calibration_s.append(seconds)
        assert not self.engine.overlap.calibrating
        self.engine.overlap.settle()
        self.evaluation()


def measure(trainings: Mapping[str, Training], rounds: int, references: References) -> tuple[Times, Times]:
    """Seconds of the slower rank: of `PER_ROUND` micro-batches in every round, and of an evaluation in every round."""
    names = list(trainings)
    micro_batches: Times = {name: [] for name in names}
    evaluations: Times = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        references.sample()
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            micro_batches[name] += over_ranks([trainings[name].micro_batch() for _ in range(PER_ROUND)])
            evaluations[name] += over_ranks([trainings[name].evaluation()])
    return micro_batches, evaluations


@dataclass(frozen=True)
class Timed:
    """One variant's micro-batches, sorted; seconds.

    Attributes:
        of_rounds: for each round, the mean of its micro-batches that do not end an iteration.
        boundaries: of the micro-batches that do.
        iterations: of those iterations that were timed from their first micro-batch to their last.
    """

    of_rounds: list[float]
    boundaries: list[float]
    iterations: list[float]

    @classmethod
    def of(cls, seconds: Sequence[float], accumulation: int, first_place: int = WARM_UP) -> Timed:
        """
        Args:
            seconds: of all micro-batches, `PER_ROUND` for each round.
            accumulation: micro-batches per iteration.
            first_place: place of the first one in its iteration, from 0.
        """
        places = [(first_place + number) % accumulation for number in range(len(seconds))]
        plain = [None if place == accumulation - 1 else value for place, value in zip(places, seconds, strict=True)]
        rounds = [
            [value for value in plain[start : start + PER_ROUND] if value is not None]
            for start in range(0, len(plain), PER_ROUND)
        ]
        begins = [number for number, place in enumerate(places) if place == 0]
        return cls(
            [statistics.mean(values) for values in rounds],
            [value for place, value in zip(places, seconds, strict=True) if place == accumulation - 1],
            [sum(seconds[begin : begin + accumulation]) for begin in begins if begin + accumulation <= len(seconds)],
        )


def rows_of(micro_batches: Times, evaluations: Times, calibrations: Times, accumulation: int) -> list[dict[str, Any]]:
    """Medians, and speed-ups over the first variant within rounds; of variants that calibrated, what it cost."""
    timed = {name: Timed.of(seconds, accumulation) for name, seconds in micro_batches.items()}
    base = next(iter(timed))
    rows = []
    for name, each in timed.items():
        usual_s = statistics.median(each.of_rounds)
        row: dict[str, Any] = {
            "variant": name,
            **_ms("micro_batch", each.of_rounds),
            "micro_batch_speedup": vars(Spread.of_ratios(timed[base].of_rounds, each.of_rounds)),
            **_ms("evaluation", evaluations[name]),
            "evaluation_speedup": vars(Spread.of_ratios(evaluations[base], evaluations[name])),
        }
        if each.boundaries:
            row["boundary_extra_ms"] = 1e3 * (statistics.median(each.boundaries) - usual_s)
        if each.iterations:
            row |= _ms("iteration", each.iterations)
            row["iteration_speedup"] = vars(Spread.of_ratios(timed[base].iterations, each.iterations))
        if calibrations[name]:
            row["calibration_micro_batches"] = len(calibrations[name])
            row["calibration_cost_micro_batches"] = sum(calibrations[name]) / usual_s - len(calibrations[name])
        rows.append(row)
    return rows


def _ms(kind: str, seconds: Sequence[float]) -> dict[str, float]:
    spread = Spread.of([1e3 * each for each in seconds])
    return {f"{kind}_ms": spread.median, f"{kind}_p10_ms": spread.p10, f"{kind}_p90_ms": spread.p90}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    with one_primitive(settings["method"]):
        bench = Bench(baseline(settings["dispatch"]), SHAPE, "train", {"rounds": 0, "skew": 0.0, **settings})
        name = BASELINES[settings["dispatch"]]
        steps = partial(record_steps, bench.runs[name], bench.cold_steps[name])
        link = find_rate(steps, settings["share"], settings["rates_of"].get("train"))
        trainings = {}
        for name, section in architectures(settings["dispatch"]).items():
            trainings[name] = Training(make_engine(section, settings))
            trainings[name].warm_up()
        references = References()
        micro_batches, evaluations = measure(trainings, settings["rounds"], references)
    calibrations = {name: over_ranks(each.calibration_s) for name, each in trainings.items()}
    found = rows_of(micro_batches, evaluations, calibrations, settings["accumulation"])
    return {
        "links": {"train": vars(link)},
        "rows": found,
        "pace": references.pace(),
        "reports": {name: each.engine.overlap.report() for name, each in trainings.items()},
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings = record["settings"]
    lines = []
    for row in record["rows"]:
        cells = [row["variant"]]
        for kind in ("micro_batch", "evaluation", "iteration"):
            found = f"{kind}_ms" in row
            cells += [f"{row[f'{kind}_ms']:.0f}", str(Spread(**row[f"{kind}_speedup"]))] if found else ["", ""]
        cells.append(f"{row['boundary_extra_ms']:.0f}" if "boundary_extra_ms" in row else "")
        cost = row.get("calibration_cost_micro_batches")
        cells.append(f"{cost:.1f} (of {row['calibration_micro_batches']})" if cost is not None else "")
        lines.append(cells)
    header = [
        "variant",
        "micro-batch ms",
        "speed-up",
        "evaluation ms",
        "speed-up",
        f"iteration of {settings['accumulation']} ms",
        "speed-up",
        "all-reduce and step ms",
        "calibration's cost in micro-batches",
    ]
    note = (
        f"{settings['rounds']} interleaved rounds of {PER_ROUND} micro-batches and an evaluation; speed-up over the "
        "first row: median (10th–90th percentile) of the ratios within rounds, of iterations within those that were "
        f"timed from end to end. Vocabulary {VOCABULARY}, capacity factor {SHAPE.capacity_factor}, ZeRO-1, Adam. "
        "Micro-batch: forward and backward, without the last of an iteration; evaluation: a forward pass at the same "
        "rate; all-reduce and step: of dense gradients, once per iteration: what its last micro-batch takes beyond a "
        "usual one. Calibration's cost: what its micro-batches take beyond as many with the schedules found."
    )
    title = f"# {SHAPE.name}: whole iterations, {settings['dispatch']} dispatch"
    return "\n".join([title, "", *tables.head(record), note, "", *tables.table(header, lines), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--share", type=float, default=0.6, help="all-to-all share of the baseline's MoE layer, training"
    )
    parser.add_argument(
        "--rates-of", type=rates_in, default={}, metavar="RECORD", help="repeats a record at its rate, not at --share"
    )
    parser.add_argument("--dispatch", choices=BASELINES, default="padded")
    parser.add_argument("--method", choices=METHODS, default="collective")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--accumulation", type=int, default=16, help="micro-batches per iteration")
    parser.add_argument("--output", type=Path, help="directory for JSON and Markdown table")
    args, settings = parse(parser, rank_main)
    if args.accumulation <= WARM_UP:
        parser.error(
            f"--accumulation {args.accumulation}: the first {WARM_UP} micro-batches, in which schedules are "
            "calibrated, must not end an iteration"
        )
    record = on_nodes("benchmarks.speed.end_to_end", settings)
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, f"end_to_end_{round(100 * args.share)}_{args.dispatch}", record, text)


if __name__ == "__main__":
    main()
