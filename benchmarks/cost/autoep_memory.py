"""Peak memory of one MoE layer's forward and backward pass: AutoEP's own, and the same layer under schedules.

    python -m benchmarks.cost.autoep_memory --output benchmarks/results/autoep_memory

Counts the bytes of all tensors that operators make and that are alive at the same time on rank 0. Parameters, their
gradients, and the layer's input are no part of it; both kinds have the same.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

import scmoe_ds
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from lab.distributed import run_distributed
from lab.moe_families import tiny
from scmoe_ds.check.storages import Storages
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.autoep import ScheduledAutoEP

TOKENS = 4096
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 512, "num_experts_per_tok": 2},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts": 32, "num_experts_per_tok": 8},
    "deepseek_v3": {"hidden_size": 256, "moe_intermediate_size": 176, "n_routed_experts": 32, "num_experts_per_tok": 6},
}
SCHEDULES = {
    "without overlap": Schedule(1, overlap=False),
    "overlap": Schedule(1),
    "2 chunks": Schedule(1, 2),
    "4 chunks": Schedule(1, 4),
}


def config(expert_parallel: int) -> dict[str, Any]:
    """One rank's share of the tokens in one micro-batch."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": expert_parallel},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "scmoe": {"overlap": {"calibration_steps": 0}},
    }


def peak(layer: AutoEPMoELayer, forward: Any, dtype: torch.dtype) -> int:
    """Bytes of a forward and a backward pass, without the gradients of parameters."""
    tokens = torch.randn(1, TOKENS, layer.hidden_size, dtype=dtype, requires_grad=True)
    toward = torch.randn_like(tokens)
    parameters = [each for each in layer.parameters() if each.requires_grad]
    gc.collect()
    with Storages("cpu") as storages:
        output = forward(tokens)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(output, [tokens, *parameters], toward)
    return storages.peak


def measured(expert_parallel: int) -> list[dict[str, Any]]:
    """A row for each family and dtype, on every rank."""
    rows = []
    for family, sizes in SHAPES.items():
        model = tiny(family, **sizes)
        engine, *_ = scmoe_ds.initialize(model=model, config=config(expert_parallel))
        layer = next(each for each in engine.module.modules() if isinstance(each, ScheduledAutoEP))
        for dtype in (torch.float32, torch.bfloat16):
            layer.to(dtype)
            row = {"family": family, "ranks": dist.get_world_size(), "dtype": str(dtype).removeprefix("torch.")}
            row["AutoEP"] = peak(layer, lambda tokens, layer=layer: AutoEPMoELayer.forward(layer, tokens), dtype)
            for name, schedule in SCHEDULES.items():
                layer.pair.schedule = schedule
                row[name] = peak(layer, layer, dtype)
            rows.append(row)
        engine.destroy()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for ranks in (1, 2) for row in run_distributed(measured, ranks, ranks)[0]]
    facts, columns = environment(), ["AutoEP", *SCHEDULES]
    args.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", "utf-8")
    cells = [
        [row["family"], f"{row['ranks']}", row["dtype"], *(f"{row[name] / 2**20:.1f}" for name in columns)]
        for row in rows
    ]
    lines = ["# Peak memory of an AutoEP layer's forward and backward pass, MiB", "", environment_text(facts), ""]
    text = "\n".join([*lines, *table(["family", "ranks", "dtype", *columns], cells), ""])
    args.output.with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
