"""Whether a Hugging Face MoE model trains under the "scmoe" section as it does under DeepSpeed's AutoEP alone.

    python -m benchmarks.quality.autoep_parity --output benchmarks/results/autoep_parity

Each family's small model trains for some steps twice from the same weights on the same tokens: once through
`deepspeed.initialize`, once through `scmoe_ds.initialize` with an empty section, whose calibration runs in the same
steps. All families run in one process group for each number of ranks. The gradient norm of the first step is also
compared with that of the model as transformers computes it, in one process on the tokens of all ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import scmoe_ds
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from lab.distributed import run_distributed
from lab.moe_families import FAMILIES, batch, tiny
from scmoe_ds.engine.attach import prepare_autoep

LAYOUTS = [(1, 1), (2, 2), (4, 2)]
"""Ranks, and how many of them share the experts."""
COMPARED = [family for family in FAMILIES if family != "longcat_flash"]
"""DeepSpeed alone does not compute LongCat-Flash's identity experts."""
STAGES, STEPS, LEARNING_RATE = (1, 2, 3), 20, 1e-3
LOSS_LIMIT, NORM_LIMIT = 1e-5, 1e-3


def config(expert_parallel: int, stage: int) -> dict[str, Any]:
    """The JSON for DeepSpeed alone."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "expert_parallel": {"enabled": True, "autoep_size": expert_parallel},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
    }


def trained(family: str, settings: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    """Loss of this rank, and gradient norm, of every step."""
    model, found = tiny(family), []
    prepare_autoep(model, settings)
    initialize = scmoe_ds.initialize if "scmoe" in settings else deepspeed.initialize
    engine, *_ = initialize(model=model, config=settings)
    for step in range(steps):
        loss = engine(**batch(step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        found.append((loss.item(), float(engine.get_global_grad_norm())))
    engine.destroy()
    return found


def norm_of_one_process(model: nn.Module, ranks: int) -> float:
    """The gradient norm of the first step, on the tokens of all ranks."""
    batches = [batch(0, rank) for rank in range(ranks)]
    model(**{key: torch.cat([each[key] for each in batches]) for key in batches[0]}).loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(map(float, squares)))


def compared(families: Sequence[str], expert_parallel: int, stages: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """A row for each family and ZeRO stage; on every rank of a group."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for family in families:
        one = norm_of_one_process(tiny(family), dist.get_world_size())
        for stage in stages:
            settings = config(expert_parallel, stage)
            theirs, ours = (trained(family, each, steps) for each in (settings, {**settings, "scmoe": {}}))
            loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(theirs, ours, strict=True)) for i in (0, 1))
            row = {"family": family, "ranks": dist.get_world_size(), "expert_parallel": expert_parallel, "zero": stage}
            row |= {"loss_difference": loss, "norm_difference": norm, "last_loss": ours[-1][0]}
            rows.append({**row, "norm": ours[0][1], "norm_autoep": theirs[0][1], "norm_one_process": one})
            gc.collect()
    return rows


def worst_of_ranks(found: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rank 0's rows with the largest differences of all ranks."""
    worst = ("loss_difference", "norm_difference")
    return [
        {**of_ranks[0], **{key: max(row[key] for row in of_ranks) for key in worst}}
        for of_ranks in zip(*found, strict=True)
    ]


def mistakes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows beyond the limits: the loss against AutoEP's, the norm against that of one process."""
    return [
        row
        for row in rows
        if row["loss_difference"] > LOSS_LIMIT or abs(row["norm"] / row["norm_one_process"] - 1) > NORM_LIMIT
    ]


def page(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The record in words."""
    head = ["family", "ranks × EP, ZeRO", "loss, most", "norm, most", "norm AutoEP", "norm ours", "norm one process"]
    cells = [
        [
            row["family"],
            f"{row['ranks']} × {row['expert_parallel']}, {row['zero']}",
            f"{row['loss_difference']:.1e}",
            f"{row['norm_difference']:.1e}",
            *(f"{row[key]:.5f}" for key in ("norm_autoep", "norm", "norm_one_process")),
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "# AutoEP's training, and the same under a schedule",
            "",
            f"Largest differences over {STEPS} steps and all ranks, fp32. Gradient norms are of the first step.",
            environment_text(facts),
            "",
            *table(head, cells),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=COMPARED, choices=COMPARED)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks, expert_parallel in LAYOUTS:
        given = args.families, expert_parallel, STAGES, STEPS
        rows += worst_of_ranks(run_distributed(compared, ranks, *given, timeout_s=3000))
    facts = environment()
    args.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", "utf-8")
    args.output.with_suffix(".md").write_text(page(rows, facts), "utf-8")
    print(page(mistakes(rows), facts) if mistakes(rows) else f"{len(rows)} rows, all within the limits")


if __name__ == "__main__":
    main()
