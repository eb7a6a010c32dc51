"""Serving a GPT on two nodes: prefill of a batch of prompts, and one decode step, under every MoE layer.

    python -m benchmarks.serving.inference --share 0.6 --output benchmarks/results

Every row is a whole model as scmoe_ds.inference runs it (embedding, blocks, key/value cache, logits of the last token,
inference mode); ScMoE rows take their schedules from the package's own timing of the first passes. The link is set for
each phase so that the all-to-all takes `--share` of DeepSpeed's top-2 MoE layer in that phase. Rows alternate
within rounds; a speed-up is the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.link import find_rate
from benchmarks.harness.no_link import LocalCopy
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.parts import record_steps
from benchmarks.harness.variants import AGAIN, SHAPES, Shape, baseline, one_primitive
from benchmarks.serving.figures import speedups
from benchmarks.speed.block import Bench
from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.inference.kv_cache import KeyValueCache
from scmoe_ds.inference.model import serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.planner.simulation import Mode

PHASES: tuple[Mode, ...] = ("prefill", "decode")
LAYERS, VOCABULARY, PROMPT = 4, 1024, 144
STOCK = "DeepSpeed top-2"
WARM_UP = 8  # passes, in which schedules are timed and chosen
DECODED = Shape("GPT2-MoE-Medium, one expert per rank, 64 sequences per rank", 1024, 16, 64, 1, 2, 2.0)


def shape_of(phase: Mode, settings: dict[str, Any]) -> Shape:
    """What a rank computes in one pass of a phase."""
    return SHAPES[settings["shape"]] if phase == "prefill" else DECODED


@dataclass(frozen=True)
class Served:
    """One row.

    Attributes:
        section: fields of the "scmoe" section.
        overlap: how the package shall schedule it; by default it times its first passes.
        communicates: False replaces the communication by a local copy.
        stock: DeepSpeed's own layer, with the capacity buffers of its evaluation.
    """

    section: dict[str, Any]
    overlap: dict[str, Any] = field(default_factory=dict)
    communicates: bool = True
    stock: bool = False


def rows() -> dict[str, Served]:
    """All rows; the first is what the others are compared with."""
    serial = {"enabled": False}
    scmoe = [Served({"architecture": "scmoe", "position": f"pos{position}"}) for position in (1, 2, 3)]
    pos2 = scmoe[1].section
    return {
        STOCK: Served({"architecture": "topk"}, stock=True),
        STOCK + AGAIN: Served({"architecture": "topk"}, stock=True),
        "DeepSpeed Residual MoE": Served({"architecture": "shared_expert"}, stock=True),
        "top-2, exact": Served({"architecture": "topk"}, serial),
        "top-2, exact, 2 chunks": Served({"architecture": "topk"}, {"num_chunks": 2, "calibration_steps": 0}),
        "top-1, exact": Served({"architecture": "topk", "top_k": 1}, serial),
        "shared expert, exact": Served({"architecture": "shared_expert"}, serial),
        "shared expert, exact, overlapped": Served({"architecture": "shared_expert"}),
        **{f"ScMoE Pos-{number}, auto": row for number, row in enumerate(scmoe, start=1)},
        "ScMoE Pos-2, serial": Served(pos2, serial),
        "ScMoE Pos-2, no communication": Served(pos2, serial, communicates=False),
        "ScMoE-2 Pos-2, auto": Served({**pos2, "top_k": 2}),
    }


class Server:
    """One row's model on this rank, and its two passes."""

    def __init__(self, row: Served, phase: Mode, shape: Shape, method: str, layers: int = LAYERS) -> None:
        ranks = dist.get_world_size()
        self._length = shape.seq_length if phase == "prefill" else PROMPT
        trained = ScMoEConfig.from_deepspeed(
            {
                "scmoe": {
                    "num_experts": shape.num_experts,
                    "expert_parallel_size": ranks,
                    **row.section,
                    "eval_capacity_factor": shape.capacity_factor,
                }
            }
        )
        config = trained
        if not row.stock:
            config = serving_config(trained, ranks)
            overlap = OverlapConfig(**{"num_chunks": 1, **row.overlap})
            config = config.model_copy(update={"overlap": overlap})
        settings = GPTSettings(layers, shape.hidden_size, shape.heads, VOCABULARY, self._length + 1)
        self.model = GPT(settings, config).eval().requires_grad_(False)
        initialize_parameters(self.model, 1, settings.init_method_std, layers)
        for run in self.model.runs:
            layer = run.blocks[-1].moe
            layer.set_deepspeed_parallelism()
            if isinstance(layer, StagedMoE):
                layer.transport = (Transport if row.communicates else LocalCopy)(layer.transport.group, method)
        self.calibrator = Calibrator(self.model.scheduled_pairs(), config.overlap, torch.device("cpu"), phase)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self._prompts = torch.randint(VOCABULARY, (shape.sequences, self._length), generator=generator)
        self._cache = KeyValueCache(self.model, shape.sequences, self._length + 1)
        self._phase = phase

    def prefill(self) -> None:
        """All prompts, up to the logits of the next token."""
        rows = len(self._prompts)
        self._cache.begin(rows)
        with torch.inference_mode(), self._cache.attached():
            self.calibrator.begin()
            hidden = self.model.hidden_states(self._prompts, self._cache.positions(self._length))
            self.model.logits(hidden[:, -1])
            self._cache.advance([self._length] * rows)

    def decode(self) -> None:
        """One token for every prompt; always the same one, so that all steps are alike."""
        with torch.inference_mode(), self._cache.attached():
            self.calibrator.begin()
            hidden = self.model.hidden_states(self._prompts[:, :1], self._cache.positions(1))
            self.model.logits(hidden[:, 0])

    def warm_up(self, passes: int = WARM_UP) -> None:
        """Until its schedules are chosen. What the prompts' keys and values are plays no part in a step's time."""
        self._cache.begin(len(self._prompts))
        self._cache.advance([self._length] * len(self._prompts))
        for _ in range(passes):
            dist.barrier()
            self.step()

    @property
    def step(self) -> Callable[[], None]:
        """The pass that is timed."""
        return self.prefill if self._phase == "prefill" else self.decode

    def slots(self) -> str:
        """Where the experts are computed in each MoE layer of this phase."""
        return ", ".join("/".join(map(str, schedule.slots)) for schedule in self.calibrator.schedules)


def serve(phase: Mode, parts: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """One phase's table. Collective."""
    shape = shape_of(phase, settings)
    bench = Bench(baseline("padded"), shape, "forward", {"rounds": 0, "skew": 0.0, **settings})
    link = find_rate(partial(record_steps, bench.runs[STOCK], bench.cold_steps[STOCK]), settings["share"])
    del bench
    servers = {
        name: Server(row, phase, shape, settings["method"])
        for name, row in rows().items()
        if name == STOCK or not parts or any(part in name for part in parts)
    }
    for server in servers.values():
        server.warm_up()
    steps = {name: server.step for name, server in servers.items()}
    times = {
        name: over_ranks(values) for name, values in interleave(steps, settings["rounds"], 2, dist.barrier).items()
    }
    found = [
        {
            "row": name,
            "median_ms": 1e3 * statistics.median(values),
            "slots": servers[name].slots(),
            "speedup": vars(Spread.of_ratios(times[STOCK], values)),
        }
        for name, values in times.items()
    ]
    return {"link": vars(link), "rows": found}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    with one_primitive(settings["method"]):
        record = {phase: serve(phase, settings["rows"], settings) for phase in settings["phases"]}
    return {"phases": record}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings = record["settings"]
    lines = [
        f"# Serving on two nodes, all-to-all {100 * settings['share']:.0f} % of DeepSpeed's top-2 layer",
        "",
        *tables.head(record),
        f"GPT of {LAYERS} layers in inference mode; {settings['rounds']} interleaved rounds; all-to-all of all "
        f"rows: {settings['method']}. Speed-up over the first row: median (10th–90th percentile) of the ratios in "
        "rounds. Slots: before which backbone operator the experts run, for each MoE layer.",
        "",
    ]
    for phase, found in record["phases"].items():
        link, shape = found["link"], shape_of(phase, settings)
        lines += [
            f"## {phase}",
            "",
            f"{shape.name}; {shape.tokens} tokens per rank and pass. Link "
            f"{link['rate_mbit']:.0f} Mbit/s, where the all-to-all takes {100 * link['share']:.0f} % of the "
            f"baseline's MoE layer ({link['all_to_all_ms']:.1f} of {link['layer_ms']:.1f} ms).",
            "",
        ]
        cells = [
            [row["row"], f"{row['median_ms']:.1f}", str(Spread(**row["speedup"])), row["slots"] or "–"]
            for row in found["rows"]
        ]
        lines += [*tables.table(["row", "ms", "speed-up", "slots"], cells), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="swin", help="of the prefill; a decode step has its own")
    parser.add_argument("--share", type=float, default=0.6, help="all-to-all share of the baseline's MoE layer")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--rows", nargs="+", default=[], metavar="PART", help="only rows whose name has a PART")
    parser.add_argument("--method", choices=METHODS, default="send_receive", help="all-to-all of all rows")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.serving.inference", settings)
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, f"inference_{round(100 * args.share)}", record, text, speedups(record))


if __name__ == "__main__":
    main()
