"""Training of a Hugging Face MoE model for benchmarks.quality.adapt: DeepSpeed's AutoEP under a "scmoe" section.

    python -m benchmarks.quality.adapt_hf TASK.json

A loop of its own, as a user of `scmoe_ds.initialize` writes it: batches of this package's data set, the model's own
loss, the engine's checkpoints. It resumes from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import scmoe_ds
from benchmarks.quality.run import held_out_rows
from benchmarks.quality.text_corpus import MARKER, Corpus
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.data.tokenizer import GPT2BPETokenizer
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.programs.run import run_program

_DECIMALS = 6
_SAVES = 8  # checkpoints on the way


@dataclass(frozen=True)
class HFTask:
    """What a run is told.

    Attributes:
        directory: of checkpoints, of the model as a Hugging Face directory ("model"), and of "result.json".
        corpus: its directory.
        shape: of `transformers.Qwen3MoeConfig`; None: the model is read from `source`.
        source: Hugging Face directory.
        seed: of the weights and of the order of the data.
        section: the "scmoe" section.
        steps, warmup, lr, batch_size, seq_length: of training.
        sequences: held-out sequences to evaluate.
    """

    directory: str
    corpus: str
    shape: dict[str, Any] | None
    source: str | None
    seed: int
    section: dict[str, Any]
    steps: int
    warmup: int
    lr: float
    batch_size: int
    seq_length: int
    sequences: int

    def save(self, path: Path) -> None:
        """As JSON, for `main`."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def train_and_evaluate(task: HFTask, _: argparse.Namespace) -> None:
    """Writes the model and the result."""
    directory = Path(task.directory)
    corpus = Corpus(Path(task.corpus), json.loads((Path(task.corpus) / MARKER).read_text(encoding="utf-8")))
    assert task.shape is not None
    model = new_model(task.shape, corpus.record["vocab_size"], task.seed)
    config = deepspeed_json(task.batch_size, task.steps, task.warmup, task.lr)
    config |= {"expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": "qwen3_moe"}}
    engine, *_ = scmoe_ds.initialize(model=model, config={**config, "scmoe": task.section})
    curve: list[list[float]] = []

    def log(step: int, loss: float) -> None:
        curve.append([step * task.batch_size * task.seq_length, round(loss, _DECIMALS)])
        if step % 50 == 0:
            print(f"step {step} of {task.steps}: {sum(each[1] for each in curve[-50:]) / 50:.4f}", flush=True)

    ids = partial(batches, corpus, directory / "cache", task.seed, task.seq_length, task.batch_size, task.steps)
    train(engine, directory / "checkpoints", task.steps, ids, log)
    rows = held_out_rows(corpus.prefix, corpus.split, task.seq_length, task.sequences)
    losses = sequence_losses(engine.module, rows, task.batch_size)
    scmoe_ds.save_pretrained(engine, directory / "model")
    files = [str(Path(task.corpus) / name) for name in ("vocab.json", "merges.txt")]
    transformers.GPT2Tokenizer(*files).save_pretrained(directory / "model")
    found = {"processor_seconds": round(time.process_time(), 1), "sequence_losses": losses, "train": curve[::50]}
    write_whole(directory / "result.json", json.dumps(found))


def deepspeed_json(batch_size: int, steps: int, warmup: int, lr: float) -> dict[str, Any]:
    """Optimizer and schedule of every run of this benchmark: AdamW, cosine to a tenth."""
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000000,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": steps, "warmup_num_steps": warmup, "cos_min_ratio": 0.1, "warmup_type": "linear",
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50000000, "allgather_bucket_size": 50000000},
    }  # fmt: skip


def new_model(shape: dict[str, Any], vocab_size: int, seed: int) -> nn.Module:
    """A Qwen3-MoE with random weights, as its class makes them."""
    torch.manual_seed(seed)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=vocab_size, **shape))


def batches(
    corpus: Corpus, cache: Path, seed: int, seq_length: int, batch_size: int, steps: int, done: int
) -> Iterator[Tensor]:
    """Token ids [batch_size, seq_length] of the training documents, in the seed's order, from step `done` on."""
    tokenizer = GPT2BPETokenizer(*(str(corpus.directory / name) for name in ("vocab.json", "merges.txt")))
    settings = DataSettings((corpus.prefix,), corpus.split, seq_length, seed, tokenizer, str(cache))
    data = build_datasets(settings, steps * batch_size, 0, 0).train
    loader = pretraining_batches(
        data, num_workers=0, micro_batch_size=batch_size, data_parallel_rank=0, data_parallel_size=1,
        consumed_samples=done * batch_size,
    )  # fmt: skip
    return (batch["tokens"] for batch in loader)


def train(
    engine: Any, directory: Path, steps: int, ids: Callable[[int], Iterator[Tensor]], log: Callable[[int, float], None]
) -> None:
    """Up to `steps` optimizer steps, from the directory's checkpoint on.

    Args:
        engine: of `scmoe_ds.initialize`; its model returns its own loss.
        directory: of checkpoints.
        ids: batches from a step on.
        log: is told the step and its loss.
    """
    done = engine.load_checkpoint(directory)[1]["steps"] if (directory / "latest").exists() else 0
    for step, tokens in zip(range(done + 1, steps + 1), ids(done), strict=False):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        log(step, loss.item())
        if step % max(1, steps // _SAVES) == 0 or step == steps:
            engine.save_checkpoint(directory, tag="last", client_state={"steps": step})


@torch.no_grad()
def sequence_losses(model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[float]:
    """Mean loss of each sequence in nats per token, without the balancing loss."""
    model.eval()
    found: list[float] = []
    for at in range(0, len(rows), batch_size):
        tokens, labels = (
            torch.stack([torch.from_numpy(getattr(row, name)) for row in rows[at : at + batch_size]])
            for name in ("tokens", "labels")
        )
        logits = model(input_ids=tokens).logits.float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        found += [round(each, _DECIMALS) for each in losses.view(labels.shape).mean(1).tolist()]
    model.train()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="JSON that benchmarks.quality.adapt has written")
    args = parser.parse_args(argv)
    task = HFTask(**json.loads(args.task.read_text(encoding="utf-8")))
    return run_program("benchmarks.quality.adapt_hf", [], partial(train_and_evaluate, task), lambda _: (args,))


if __name__ == "__main__":
    sys.exit(main())
