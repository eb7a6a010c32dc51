"""What each rank keeps in memory, against the formulas of the ZeRO paper (arXiv 1910.02054, section 5).

    python -m benchmarks.cost.memory --output benchmarks/results/memory

Counts the bytes of all live tensors on every rank of small gloo runs: parameters; optimizer state (all else that is
left after a step); gradients (what is there on top after a backward pass, the larger of two that accumulate).
Activations, what a backward pass needs while it runs, and communication buffers come on top.

Formulas, for a rank with D parameters of dense layers on Nd data-parallel ranks and E parameters of routed experts on
Ne expert-data-parallel ranks, b bytes per parameter:

    parameters  b (D + E)
    gradients   b (D / Nd + E / Ne): ZeRO-2's. DeepSpeed 0.19 keeps no more under ZeRO-1 either, where the paper has
                b (D + E): each backward pass reduces, and leaves a rank its piece.
    optimizer   12 (D / Nd + E / Ne): fp32 weights and Adam's two moments
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

import scmoe_ds
from benchmarks.harness.measure import environment
from lab.distributed import run_distributed
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel import tensor

SHAPE, EXPERTS, BUCKET = GPTSettings(16, 128, 4, 512, 32), 8, 10_000
"""Many small parameters: under ZeRO-2 a gradient that lies across the border of two ranks' pieces is whole on both."""
LAYOUTS = [(2, 1, 1), (2, 1, 2), (4, 1, 2), (2, 2, 1), (4, 2, 2), (4, 2, 4)]
"""(ranks, tensor-parallel size, expert-parallel size)."""


def live() -> dict[int, int]:
    """Bytes of every tensor storage that Python can reach, by address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.layout == torch.strided]
    storages = [each.untyped_storage() for each in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure_all(tp: int, ep: int) -> list[dict[str, Any]]:
    """Every precision and ZeRO stage on this rank."""
    tensor.start_tensor_parallel(tp)
    return [measure(ep, stage, precision) for precision in ("fp32", "bf16") for stage in (1, 2)]


def measure(ep: int, stage: int, precision: str) -> dict[str, Any]:
    """Bytes on this rank, and what they depend on."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        # DeepSpeed holds a buffer of one bucket, by default 5e8 elements: here next to nothing, to see the rest.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "bf16": {"enabled": precision == "bf16"},
        "scmoe": {"num_experts": EXPERTS, "expert_parallel_size": ep, "overlap": {"calibration_steps": 0}},
    }
    model = GPT(SHAPE, scmoe_ds.ScMoEConfig.from_deepspeed(config), group=tensor.tensor_parallel_group())
    initialize_parameters(model, 1, 0.02, SHAPE.num_layers)
    others = live().keys() - {each.untyped_storage().data_ptr() for each in model.parameters()}
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    kept: dict[int, int] = {}
    gradients = 0
    for _ in range(2):  # the first step makes the moments
        gradients = 0
        for _ in range(2):
            tokens = torch.zeros(1, SHAPE.max_position_embeddings + 1, dtype=torch.int64)
            engine.backward(engine(tokens[:, :-1], labels=tokens[:, 1:]).loss)
            gradients = max(gradients, sum(size for address, size in live().items() if address not in kept))
            engine.step()
        kept = live()
    parameters = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in engine.module.parameters()
    }
    optimizer = sum(size for address, size in kept.items() if address not in parameters.keys() | others)
    routed = sum(each.numel() for each in engine.module.parameters() if is_moe_param(each))
    dense = sum(each.numel() for each in engine.module.parameters()) - routed
    return {
        "stage": stage,
        "precision": precision,
        "parameters": sum(parameters.values()),
        "gradients": gradients,
        "optimizer": optimizer,
        "dense": dense,
        "routed": routed,
    }


def formulas(row: dict[str, Any], ranks: int, tp: int, ep: int) -> dict[str, float]:
    """Bytes as the ZeRO paper counts them."""
    size, dense, routed = {"bf16": 2, "fp32": 4}[row["precision"]], row["dense"], row["routed"]
    part = dense / (ranks // tp) + routed / (ranks // ep)
    return {"parameters": size * (dense + routed), "gradients": size * part, "optimizer": 12 * part}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: MB measured, and the ratio to the formula."""
    lines = [
        "| ranks | TP | EP | ZeRO | precision | parameters | gradients | optimizer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row['measured'][kind] / 1e6:.2f} ({row['measured'][kind] / row['formula'][kind]:.3f})"
            for kind in ("parameters", "gradients", "optimizer")
        ]
        layout = [row["ranks"], row["tp"], row["ep"], row["measured"]["stage"], row["measured"]["precision"]]
        lines.append("| " + " | ".join(map(str, [*layout, *cells])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures all layouts; the rank that is furthest from its formula stands for the layout."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, help="path of the .json and .md, without the ending")
    args = parser.parse_args()
    rows = []
    for ranks, tp, ep in LAYOUTS:
        for found in zip(*run_distributed(measure_all, ranks, tp, ep, timeout_s=900), strict=True):
            by_rank = [
                {"ranks": ranks, "tp": tp, "ep": ep, "measured": each, "formula": formulas(each, ranks, tp, ep)}
                for each in found
            ]
            rows.append(max(by_rank, key=distance))
    print(table(rows))
    print(f"\nfurthest from its formula: {100 * max(map(distance, rows)):.2f} %")
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(rows) + "\n")


def distance(row: dict[str, Any]) -> float:
    """The largest deviation of a row from its formulas, relative."""
    return max(abs(row["measured"][kind] / value - 1) for kind, value in row["formula"].items())


if __name__ == "__main__":
    main()
