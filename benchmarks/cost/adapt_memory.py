"""Peak memory of training a converted model alone, with its teacher in memory, and with the teacher's logits on disk.

    python -m benchmarks.cost.adapt_memory --output benchmarks/results/adapt_memory

Two ranks share the experts. Counts the bytes of all tensors that are alive at the same time in a training step, on the
rank that has more: parameters, the optimizer's state, gradients, activations, logits, and the teacher's copies. What
operators and gloo take and return inside is left out, and so is Python's own memory.

    alone           trained on the text
    teacher         loss KL(teacher ‖ student), the teacher's pass before each of the student's
    with match      the same, and the output of every MoE block is compared, too
    stored          the same KL, from the teacher's most probable tokens on disk

This package's GPT reads them as `scmoe pretrain --teacher-logits` does. Hugging Face's models are driven by their own
loops, which have no numbers of samples; for them the loop hands over what was stored.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import scmoe_ds
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from lab.distributed import run_distributed
from lab.moe_families import tiny
from scmoe_ds.check.storages import Storages
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.distill import Distillation
from scmoe_ds.engine.teacher import as_source
from scmoe_ds.models.divergence import BestTokens, best_tokens
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.training.distillation import distil

VOCABULARY, SEQUENCE, BATCH, WIDTH = 4096, 256, 2, 256
SHAPE = GPTSettings(4, WIDTH, 4, VOCABULARY, SEQUENCE)
QWEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "max_position_embeddings": SEQUENCE,
}
DISTILL: dict[str, Any] = {
    "alone": None,
    "teacher": {"alpha": 1.0},
    "with match": {"alpha": 1.0, "gamma": 1.0},
    "stored": {"alpha": 1.0},
}
LIMITS = {"teacher": 1.35, "stored": 1.02}
WARM_UP, STEPS = 1, 1  # the first step makes the optimizer's state
Step = Callable[[int], None]


def config(stage: int, precision: str, **more: Any) -> dict[str, Any]:
    """DeepSpeed's JSON; its buffers of one bucket are small beside the rest, as they are in a large model."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000},
        "bf16": {"enabled": precision == "bf16"},
        **more,
    }


def samples() -> list[dict[str, torch.Tensor]]:
    """Random tokens, the same on every rank."""
    torch.manual_seed(1)
    drawn = torch.randint(VOCABULARY, ((WARM_UP + STEPS) * BATCH * dist.get_world_size(), SEQUENCE))
    return [{"tokens": each} for each in drawn]


def places_of(step: int) -> range:
    """This rank's samples."""
    first = (step * dist.get_world_size() + dist.get_rank()) * BATCH
    return range(first, first + BATCH)


def gpt(whole: dict[str, Any], kind: str, directory: str) -> Step:
    """A top-2 model that has become a ScMoE."""
    distill = dict(DISTILL[kind] or {})
    if kind == "stored":
        distill["teacher_logits"] = directory
    adapt = {"base": {"architecture": "pipelined_topk", "top_k": 2}, "distill": distill or None}
    overlap = {"calibration_steps": 0}
    whole |= {"scmoe": {"num_experts": 8, "expert_parallel_size": 2, "overlap": overlap, "adapt": adapt}}
    section = ScMoEConfig.from_deepspeed(whole)
    model = GPT(SHAPE, section)
    initialize_parameters(model, 1, 0.02, SHAPE.num_layers)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    data = samples()
    distillation = distil(engine, section, data, BATCH, {"corpus": "random"})

    def step(number: int) -> None:
        places = places_of(number)
        tokens = torch.stack([data[place]["tokens"] for place in places])
        given = {} if distillation is None else {"targets": distillation.teach(tokens, samples=places)}
        engine.backward(engine(tokens, labels=tokens.roll(-1, 1), **given).loss)
        engine.step()

    return step


def qwen3(whole: dict[str, Any], kind: str, directory: str) -> Step:
    """Its routed experts read the preceding block; their result joins late."""
    adapt = {"distill": None if kind == "stored" else DISTILL[kind]}
    scmoe = {"architecture": "scmoe", "position": "pos1", "join": "late", "merge": "add"}
    whole["expert_parallel"] = {"enabled": True, "autoep_size": 2}
    whole["scmoe"] = {**scmoe, "overlap": {"calibration_steps": 0}, "adapt": adapt}
    engine, *_ = scmoe_ds.initialize(model=tiny("qwen3_moe", **QWEN), config=whole)
    data = torch.stack([each["tokens"] for each in samples()])
    batches = [data[places_of(number)] for number in range(WARM_UP + STEPS)]
    distillation = _stored(engine, whole, batches) if kind == "stored" else None

    def step(number: int) -> None:
        tokens = batches[number]
        if distillation is None:
            loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        else:
            distillation.begin(tokens, samples=range(number, number + 1))
            loss = distillation.loss(engine(input_ids=tokens, use_cache=False).logits)
        engine.backward(loss)
        engine.step()

    return step


def _stored(engine: Any, whole: dict[str, Any], batches: Any) -> Distillation:
    adapt = {"distill": DISTILL["stored"]}
    section = ScMoEConfig.from_deepspeed({**whole, "scmoe": {**whole["scmoe"], "adapt": adapt}})
    assert section.adapt is not None and section.adapt.distill is not None
    count, kept = section.adapt.distill.teacher_top_n, []
    for tokens in batches:
        with as_source(engine, engine.conversion):
            kept.append(best_tokens(engine.module(input_ids=tokens, use_cache=False).logits, count))
    return Distillation(engine, engine.conversion, section, lambda places, _: BestTokens(*kept[places.start]))


MODELS = {"GPT, top-2 → ScMoE Pos-2": gpt, "Qwen3-MoE → ScMoE Pos-1, late join": qwen3}


def peak(make: Callable[[], Step]) -> int:
    """Bytes of a training step behind the first ones, with all that is there at its start."""
    gc.collect()
    with Storages("cpu") as storages:
        step = make()
        for number in range(WARM_UP):
            step(number)
        gc.collect()
        storages.reset()
        for number in range(WARM_UP, WARM_UP + STEPS):
            step(number)
        return storages.peak


def measured(name: str, directory: str) -> list[dict[str, Any]]:
    """A row for each precision and ZeRO stage, on this rank."""
    rows = []
    for precision in ("fp32", "bf16"):
        for stage in (1, 2):
            row: dict[str, Any] = {"model": name, "precision": precision, "stage": stage}
            for kind in DISTILL:
                whole, place = config(stage, precision), f"{directory}/{precision}{stage}"
                row[kind] = peak(partial(MODELS[name], whole, kind, place))
            rows.append(row)
    return rows


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [
        [row["model"], row["precision"], f"{row['stage']}", f"{row['alone'] / 2**20:.0f}"]
        + [f"{row[kind] / 2**20:.0f} ({row[kind] / row['alone']:.3f} ×)" for kind in DISTILL if kind != "alone"]
        for row in record["rows"]
    ]
    largest = {kind: max(row[kind] / row["alone"] for row in record["rows"]) for kind in LIMITS}
    said = [f"{kind} at most {largest[kind]:.3f} × (aim: {limit} ×)" for kind, limit in LIMITS.items()]
    shape = f"hidden {WIDTH}, vocabulary {VOCABULARY}, {BATCH} × {SEQUENCE} tokens a rank, 4 blocks, two ranks, EP 2"
    return "\n".join(
        [
            "# Peak memory of a converted model's training step, MiB of the rank that has more",
            "",
            "`python -m benchmarks.cost.adapt_memory`",
            "",
            environment_text({key: value for key, value in record.items() if key != "rows"}),
            "",
            f"{shape}. In brackets: over the model alone. {'; '.join(said)}.",
            "",
            *table(["model", "precision", "ZeRO", *DISTILL], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="path of the .json and .md, without the ending")
    args = parser.parse_args()
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            by_rank = run_distributed(measured, 2, name, directory, timeout_s=1800)
        rows += [
            {**first, **{kind: max(first[kind], second[kind]) for kind in DISTILL}}
            for first, second in zip(*by_rank, strict=True)
        ]
    record = {**environment(), "rows": rows}
    print(page(record))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        args.output.with_suffix(".md").write_text(page(record), "utf-8")


if __name__ == "__main__":
    main()
