"""Experts over tensor-parallel ranks on two nodes: divided, whole, or in parts that rows are sent to (S-ETP).

    python -m benchmarks.speed.expert_parts --output benchmarks/results

A pair of blocks, tensor-parallel over one pinned rank on each of two nodes. The three rows of an architecture have the
same weights, compute the same, and differ in how the routed experts lie on the ranks:

    divided   "expert_tensor_parallelism": true, as DeepSpeed and Megatron: half of each expert, an all-reduce behind it
    whole     false: half of the experts; each rank sends a slice of the tokens that both have
    parts     "partition": half of each expert, as an expert of its own

All-reduces of attention and dense MLPs are the same in all rows. The link's rate is searched so that a step of the
divided top-2 pair waits for `--share` of its time. Speed-ups are over the divided row of the same architecture: medians
of the ratios within interleaved rounds, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import tables
from benchmarks.harness.link import next_rate
from benchmarks.harness.on_nodes import on_nodes, parse, write
from benchmarks.harness.variants import SHAPES, Shape, unit
from lab.nodes import shape_own_end
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.parallel import tensor
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks

MODELS: dict[str, dict[str, Any]] = {
    "top-2": {"architecture": "pipelined_topk", "top_k": 2},
    "ScMoE Pos-2": {"architecture": "scmoe", "position": "pos2"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "divided": {"expert_tensor_parallelism": True},
    "divided again (A/A)": {"expert_tensor_parallelism": True},
    "whole": {"expert_parallel_size": 2},
    "parts": {"expert_tensor_parallelism": "partition"},
}
FIRST_MBIT, SEARCHES, WARM_UP = 400.0, 4, 2
Steps = dict[str, Callable[[], None]]


def build(shape: Shape, model: dict[str, Any], layout: dict[str, Any]) -> StagedPair:
    """A pair on this rank. The experts run behind the first operator of the backbone's last block."""
    slots = {"expert_slot": 2 if model["architecture"] == "scmoe" else "auto", "num_chunks": 1}
    section = ScMoEConfig(num_experts=shape.num_experts, drop_tokens=False, overlap=slots, **model, **layout)
    config = section.over_tensor_parallel(dist.get_world_size())
    tokens = shape.seq_length
    settings = GPTSettings(
        2, shape.hidden_size, shape.heads, 64, tokens, swiglu=True, hidden_dropout=0.0, attention_dropout=0.0
    )
    run = make_pair(settings, config, shape.num_experts, config.position, tokens, tensor.tensor_parallel_group())
    assert isinstance(run, StagedPair)
    initialize_parameters(run, 1, 0.02, 2)
    run.layer.set_deepspeed_parallelism()
    return run


def slowest(steps: Steps, name: str, rounds: int = 4) -> float:
    """Median seconds of a step of the slower rank."""
    return statistics.median(over_ranks(interleave({name: steps[name]}, rounds, 1, before=dist.barrier)[name]))


def find_rate(steps: Steps, share: float) -> dict[str, float]:
    """Sets the link, and says how; the time without a link is that of an unshaped one."""
    name, rate = "top-2, divided", FIRST_MBIT
    shape_own_end(None)
    free = slowest(steps, name)
    for _ in range(SEARCHES):
        shape_own_end(rate)
        total = slowest(steps, name)
        found = {"rate_mbit": rate, "share": 1 - free / total, "step_ms": 1e3 * total, "unshaped_ms": 1e3 * free}
        if abs(found["share"] - share) < 0.03:
            break
        rate = next_rate(rate, total - free, total, share)
    return found


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    """The record; each of the two processes runs it."""
    tensor.start_tensor_parallel(dist.get_world_size())
    shape = SHAPES[settings["shape"]]
    hidden = torch.randn(
        shape.sequences, shape.seq_length, shape.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    runs = {
        f"{model}, {layout}": build(shape, MODELS[model], LAYOUTS[layout]) for model in MODELS for layout in LAYOUTS
    }
    with torch.no_grad():
        outputs = {name: run(hidden).hidden for name, run in runs.items()}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs[f"{name.partition(', ')[0]}, divided"], rtol=1e-4, atol=1e-5)
    found = []
    for mode in ("forward", "train"):
        steps = {name: unit(run, hidden.clone(), mode == "train") for name, run in runs.items()}
        for share in settings["shares"]:
            link = find_rate(steps, share)
            times = interleave(steps, settings["rounds"], WARM_UP, before=dist.barrier)
            seconds = {name: over_ranks(values) for name, values in times.items()}
            found.append({"mode": mode, "link": link, "rows": [row(name, seconds) for name in seconds]})
    return {"links_and_rows": found}


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The median, and the speed-up over the divided row of the same architecture."""
    base = seconds[f"{name.partition(', ')[0]}, divided"]
    speedup = Spread.of_ratios(base, seconds[name])
    return {"row": name, "median_ms": 1e3 * statistics.median(seconds[name]), "speedup": vars(speedup)}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = [
        "# Experts over two tensor-parallel ranks: divided, whole, or in parts",
        "",
        *tables.head(record),
        f"{SHAPES[record['settings']['shape']].name}; SwiGLU, fp32. {record['settings']['rounds']} interleaved rounds; "
        "speed-up over the divided row: median (10th–90th percentile) of the ratios within rounds.",
        "",
    ]
    for each in record["links_and_rows"]:
        link = each["link"]
        cells = [[row["row"], f"{row['median_ms']:.0f}", str(Spread(**row["speedup"]))] for row in each["rows"]]
        lines += [
            f"## {each['mode']}, {100 * link['share']:.0f} % of the divided top-2 pair is waiting "
            f"({link['rate_mbit']:.0f} Mbit/s)",
            "",
            *tables.table(["pair", "ms", "speed-up"], cells),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="swin-2")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.15], help="of waiting, see above")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    args, settings = parse(parser, rank_main)
    record = on_nodes("benchmarks.speed.expert_parts", settings)
    text = markdown(record)
    print(text)
    if args.output:
        write(args.output, "expert_parts", record, text)


if __name__ == "__main__":
    main()
