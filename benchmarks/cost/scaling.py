"""How the layer's cost grows with tokens, experts and expert-parallel size, and what a training step keeps in memory.

    python -m benchmarks.cost.scaling --output benchmarks/results/scaling

Writes a figure, a JSON with fitted slopes (of log time over log size), and prints both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn

from benchmarks.harness.measure import environment
from benchmarks.harness.variants import SHAPES, STOCK, ablation_table, build
from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.figure_style import WIDTH, plain_log_axis, save, styled
from scmoe_ds.planner.rounds import interleave

TOKENS = [256, 512, 1024, 2048, 4096, 8192, 16384]
EXPERTS = [4, 8, 16, 32, 64, 128]
HIDDEN = 128
MEMORY = [
    STOCK,
    "+ shared expert (DeepSpeed Residual MoE)",
    "top-2, exact dispatch, full duplex",
    "+ full-duplex all-to-all = ScMoE Pos-2",
]


def layer_times(sizes: list[tuple[int, int]], rounds: int) -> list[float]:
    """Median milliseconds of a training step of the layer for each (tokens per rank, experts)."""
    torch.set_num_threads(1)
    units = {}
    for tokens, num_experts in sizes:
        expert = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
        layer = ScMoE(HIDDEN, expert, num_experts, dist.get_world_size(), capacity_factor=2.0)
        layer.set_deepspeed_parallelism()
        x = torch.randn(tokens, HIDDEN, requires_grad=True)

        def step(layer: ScMoE = layer, x: torch.Tensor = x) -> None:
            output, l_aux, _ = layer(x)
            (output.mean() + l_aux).backward()

        units[f"{tokens} {num_experts}"] = step
    times = interleave(units, rounds, before=dist.barrier)
    return [1e3 * statistics.median(times[name]) for name in units]


def slope(sizes: list[int], times: list[float]) -> float:
    """Exponent of a power law fitted to the upper half of the sizes, where fixed costs no longer show."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])


def peak_bytes(variant: str, sequences: int) -> int:
    """Peak of live tensor bytes (weights, gradients, activations) of one training step of a pair, on one process."""
    from torch.distributed._tools.mem_tracker import MemTracker

    shape = replace(SHAPES["gpt"], sequences=sequences)
    run = build(ablation_table()[variant], shape, 0.0)
    hidden = torch.randn(shape.sequences, shape.seq_length, shape.hidden_size, requires_grad=True)
    tracker = MemTracker()
    tracker.track_external(run, hidden)
    with tracker:
        output = run(hidden)
        (output.hidden.square().mean() + output.l_aux).backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def measure_memory(variants: list[str], sequences: list[int]) -> dict[str, dict[str, float]]:
    """Megabytes per variant and tokens per process, and the share of DeepSpeed's top-2."""
    torch.set_num_threads(1)
    record: dict[str, dict[str, float]] = {}
    for count in sequences:
        peaks = {variant: peak_bytes(variant, count) for variant in variants}
        tokens = count * SHAPES["gpt"].seq_length
        for variant, peak in peaks.items():
            row = {f"MB at {tokens} tokens": peak / 1e6, f"share at {tokens} tokens": peak / peaks[STOCK]}
            record[variant] = record.get(variant, {}) | row
    return record


@styled
def figure(record: dict[str, Any]) -> Figure:
    """Time against tokens, experts and expert-parallel size on logarithmic axes."""
    drawn = Figure(figsize=(WIDTH, 3.6))
    panels = drawn.subplots(1, 3, sharey=True)
    labels = {"tokens": "tokens per rank", "experts": "experts", "ep": "expert-parallel size"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        part = record[key]
        axes.plot(part["sizes"], part["ms"])
        slope = f"time ∝ {key}^{part['slope']:.2f}" if "slope" in part else "all ranks on two cores"
        axes.set(xlabel=label, title=slope)
        plain_log_axis(axes, "y")
        axes.set_xscale("log")
        rare = part["sizes"][:: -(-len(part["sizes"]) // 4)]
        axes.set_xticks(rare, [f"{size:g}" for size in rare])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel("ms per training step of the layer")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="directory for scaling.json and scaling.png")
    args = parser.parse_args()
    tokens = run_distributed(layer_times, 1, [(n, 8) for n in TOKENS], args.rounds, timeout_s=1800)[0]
    experts = run_distributed(layer_times, 1, [(2048, n) for n in EXPERTS], args.rounds, timeout_s=1800)[0]
    ep = [run_distributed(layer_times, n, [(2048, 8)], args.rounds, timeout_s=1800)[0][0] for n in (1, 2, 4)]
    memory = run_distributed(measure_memory, 1, MEMORY, [4, 16], timeout_s=1800)[0]
    record = {
        "environment": environment(),
        "settings": {
            "hidden_size": HIDDEN,
            "rounds": args.rounds,
            "experts at varying tokens": 8,
            "tokens at varying experts and EP": 2048,
        },
        "tokens": {"sizes": TOKENS, "ms": tokens, "slope": slope(TOKENS, tokens)},
        "experts": {"sizes": EXPERTS, "ms": experts, "slope": slope(EXPERTS, experts)},
        "ep": {"sizes": [1, 2, 4], "ms": ep},
        "peak_memory": memory,
    }
    print(json.dumps(record, indent=1))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
        save(figure(record), args.output / "scaling.png")


if __name__ == "__main__":
    main()
