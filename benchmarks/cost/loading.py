"""What a rank's memory needs at most while a Hugging Face MoE model is loaded and AutoEP distributes it.

    python -m benchmarks.cost.loading --output benchmarks/results/loading

A Qwen3-MoE of 0.84 GB (bf16; 96 % are experts), per rank on one host: peak of the resident memory above that
before the load (VmHWM, reset before each row), files that are mapped included; then what is held, and the peak while
the engine is built (ZeRO-1 and SGD, so it keeps fp32 weights, too). transformers' own from_pretrained reads the whole
model on every rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

import scmoe_ds
from benchmarks.harness.measure import environment
from lab.distributed import run_distributed
from scmoe_ds.compat import forget_process_groups
from scmoe_ds.compat_transformers import accept_names_of_recorders

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
}


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, or VmHWM (the most since `reset`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset() -> int:
    """Lets VmHWM start anew; returns what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(directory: Path, ep: int, way: str) -> dict[str, int]:
    """One load on this rank, and the engine that is made of it; before it a small one, so that modules are imported."""
    accept_names_of_recorders()
    load(directory / "small", ep, way)
    return load(directory / "model", ep, way)


def load(directory: Path, ep: int, way: str) -> dict[str, int]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {"enabled": True, "autoep_size": ep},
    }
    before = reset()
    if way == "scmoe_ds":
        model = scmoe_ds.from_pretrained(directory, config)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    loading, held = resident("VmHWM") - before, reset() - before
    engine, *_ = deepspeed.initialize(model=model, config=config)
    distributed = resident("VmHWM") - before
    del model
    after = reset() - before
    assert engine is not None
    forget_process_groups()
    return {"loading": loading, "held": held, "distributed": distributed, "after": after}


def table(rows: list[dict[str, Any]], size: int) -> str:
    """Markdown: the rank that needs most, in units of one full copy."""
    lines = [
        "| EP | loaded by | peak while loading | held | peak until the engine exists | held by it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = {key: max(each[key] for each in row["ranks"]) / size for key in row["ranks"][0]}
        lines.append(
            f"| {row['size']} | {row['way']} | " + " | ".join(f"{value:.2f}" for value in most.values()) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes a model with random weights into a temporary directory, and loads it on 1, 2 and 4 ranks."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, help="path of the .json and .md, without the ending")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, layers in (("small", 1), ("model", SHAPE["num_hidden_layers"])):
            config = transformers.Qwen3MoeConfig(**{**SHAPE, "num_hidden_layers": layers})
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            size = sum(each.nbytes for each in model.parameters())
            model.save_pretrained(Path(directory, name), max_shard_size="100MB")
            del model
        for ep in (1, 2, 4):
            for way in ("transformers", "scmoe_ds"):
                ranks = run_distributed(measure, ep, Path(directory), ep, way, timeout_s=900)
                rows.append({"size": ep, "way": way, "ranks": ranks})
                print(table(rows[-1:], size).splitlines()[-1], flush=True)
    print(f"one full copy: {size / 1e6:.0f} MB\n{table(rows, size)}")
    if args.output:
        record = {**environment(), "benchmark": "benchmarks.cost.loading", "bytes": size, "rows": rows}
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(
            f"In units of one full copy, {size / 1e6:.0f} MB.\n\n{table(rows, size)}\n"
        )


if __name__ == "__main__":
    main()
