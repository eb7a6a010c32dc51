"""LongCat-Flash under a schedule against transformers' own model: decoder layers, and training.

    python -m benchmarks.quality.longcat_parity --output benchmarks/results/longcat_parity

The reference is one process that computes the tokens of all ranks. DeepSpeed alone does not compute LongCat-Flash.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from lab.distributed import run_distributed
from lab.longcat_parity import differences, train, train_alone

LAYOUTS = [(1, 1), (2, 2), (4, 2)]
"""Ranks, and how many of them share the experts."""
STAGES, STEPS = (1, 2, 3), 20


def layers() -> list[dict[str, Any]]:
    """A row for each number of ranks and dtype."""
    rows = []
    for ranks in (1, 2):
        for dtype in (torch.float32, torch.float64):
            found = run_distributed(differences, ranks, ranks, dtype)
            worst = {name: max(each[name] for each in found) for name in found[0]}
            rows.append({"expert_parallel": ranks, "dtype": str(dtype).removeprefix("torch."), **worst})
    return rows


def training() -> list[dict[str, Any]]:
    """A row for each layout and ZeRO stage: largest differences of the losses, and of the norms relative to them."""
    rows = []
    for ranks, expert_parallel in LAYOUTS:
        alone = train_alone(ranks, STEPS)
        for stage in STAGES:
            found = run_distributed(train, ranks, expert_parallel, stage, STEPS)[0]
            both = list(zip(found, alone, strict=True))
            row = {"ranks": ranks, "expert_parallel": expert_parallel, "zero": stage, "last_loss": found[-1][0]}
            row["loss"] = max(abs(a - b) for (a, _), (b, _) in both)
            rows.append({**row, "norm": max(abs(a - b) / b for (_, a), (_, b) in both)})
    return rows


def page(of_layers: list[dict[str, Any]], of_training: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The record in words."""
    names = ["output", "gradients", "gradients of experts"]
    cells = [[str(row["expert_parallel"]), row["dtype"], *(f"{row[name]:.1e}" for name in names)] for row in of_layers]
    trained = [
        [
            f"{row['ranks']} × {row['expert_parallel']}",
            str(row["zero"]),
            f"{row['loss']:.1e}",
            f"{row['norm']:.1e}",
            f"{row['last_loss']:.6f}",
        ]
        for row in of_training
    ]
    return "\n".join(
        [
            "# LongCat-Flash under a schedule against transformers",
            "",
            environment_text(facts),
            "",
            "Decoder layers, largest absolute difference under five schedules (slots 1 to 4, one and two chunks). The",
            "routing is the same, bit by bit. In fp64 transformers' norms and router still compute in fp32, and the",
            "weights of several identity experts add up in fp32.",
            "",
            *table(["EP", "dtype", *names], cells),
            "",
            f"Training, {STEPS} steps in fp32 (AdamW, clipping), largest difference over all steps; norms relative.",
            "",
            *table(["ranks × EP", "ZeRO", "loss", "gradient norm", "last loss"], trained),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    of_layers, of_training, facts = layers(), training(), environment()
    record = {**facts, "layers": of_layers, "training": of_training}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    args.output.with_suffix(".md").write_text(page(of_layers, of_training, facts), "utf-8")


if __name__ == "__main__":
    main()
