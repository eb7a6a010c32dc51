"""Training of a Hugging Face MoE model for benchmarks.quality.adapt: DeepSpeed's AutoEP under a "scmoe" section.

    python -m benchmarks.quality.adapt_hf TASK.json

A loop of its own, as a user of `scmoe_ds.initialize` writes it: batches of this package's data set, the model's own
loss, the engine's checkpoints. It resumes from them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

import scmoe_ds
from benchmarks.quality.adapt_layers import by_similarity
from benchmarks.quality.run import held_out_rows
from benchmarks.quality.text_corpus import MARKER, Corpus
from scmoe_ds.analysis.subjects import hugging_face_subject
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.data.tokenizer import GPT2BPETokenizer
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.programs.run import run_program

_DECIMALS = 6
_EMBEDDING_STD = 0.5
_NOTED_STEPS = 50
_SAVES = 8  # checkpoints on the way


@dataclass(frozen=True)
class HFTask:
    """What a run is told.

    Attributes:
        directory: of checkpoints, of a teacher as a Hugging Face directory ("model"), and of "result.json".
        corpus: its directory.
        shape: of `transformers.Qwen3MoeConfig`: a teacher is trained from random weights. None: `source` is trained on.
        source: Hugging Face directory of a teacher.
        seed: of the weights and of the order of the data.
        section: the "scmoe" section; its "adapt" is what becomes of the source.
        steps, warmup, lr, batch_size, seq_length: of training.
        sequences: held-out sequences to evaluate before (with a source) and after training.
        order_at: position whose ends order the layers, the most similar ones first; None: as `section` says.
        layers: how many of them are converted; 0: all.
        on_the_way: steps after which the first `sequences_on_the_way` of them are evaluated, too.
    """

    program: ClassVar[str] = "benchmarks.quality.adapt_hf"
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
    order_at: str | None = None
    layers: int = 0
    on_the_way: Sequence[int] = ()
    sequences_on_the_way: int = 0

    def save(self, path: Path) -> None:
        """As JSON, for `main`."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def train_and_evaluate(task: HFTask, _: argparse.Namespace) -> None:
    """Writes the result, and a teacher's weights."""
    directory = Path(task.directory)
    corpus = Corpus(Path(task.corpus), json.loads((Path(task.corpus) / MARKER).read_text(encoding="utf-8")))
    config = deepspeed_json(task.batch_size, task.steps, task.warmup, task.lr)
    config |= {"expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": "qwen3_moe"}}
    config |= {"scmoe": task.section}
    rows = held_out_rows(corpus.prefix, corpus.split, task.seq_length, task.sequences)
    if task.order_at:
        subject = hugging_face_subject(transformers.AutoModelForCausalLM.from_pretrained(task.source))
        layers = by_similarity(subject, rows[: task.sequences_on_the_way], task.batch_size, task.order_at)
        task.section["adapt"]["layers"] = layers[: task.layers or None]
    if task.shape is None:
        assert task.source is not None
        model = scmoe_ds.from_pretrained(task.source, config)
    else:
        model = new_model(task.shape, corpus.record["vocab_size"], task.seed)
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    notes = Notes(engine, task, rows, directory / "notes.json")
    ids = partial(batches, corpus, directory / "cache", task.seed, task.seq_length, task.batch_size, task.steps)
    train(engine, directory / "checkpoints", task.steps, ids, notes)
    losses = sequence_losses(engine.module, rows, task.batch_size)
    if task.shape is not None:
        scmoe_ds.save_pretrained(engine, directory / "model")
        files = [str(Path(task.corpus) / name) for name in ("vocab.json", "merges.txt")]
        transformers.GPT2Tokenizer(*files).save_pretrained(directory / "model")
    found = {"processor_seconds": round(time.process_time(), 1), "sequence_losses": losses, **notes.found}
    found |= {"layers": task.section["adapt"]["layers"]} if task.order_at else {}
    write_whole(directory / "result.json", json.dumps(found))


class Notes:
    """What a run finds on its way: "before" (losses of a source right after surgery), "on_the_way" (losses by step),
    and "train" ([tokens, training loss] of every 50th step). In a file, for a run that is resumed."""

    def __init__(self, engine: Any, task: HFTask, rows: Sequence[Row], path: Path) -> None:
        self.engine, self.task, self.rows, self.path = engine, task, rows, path
        self.found: dict[str, Any] = {"train": []}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        elif task.source is not None:
            self.found["before"] = sequence_losses(engine.module, rows, task.batch_size)

    def __call__(self, step: int, loss: float) -> None:
        task = self.task
        if step % _NOTED_STEPS == 0:
            self.found["train"].append([step * task.batch_size * task.seq_length, round(loss, _DECIMALS)])
            print(f"step {step} of {task.steps}: {loss:.4f}", flush=True)
        if step in task.on_the_way:
            rows = self.rows[: task.sequences_on_the_way]
            self.found.setdefault("on_the_way", {})[str(step)] = sequence_losses(
                self.engine.module, rows, task.batch_size
            )

    def save(self) -> None:
        """Beside a checkpoint."""
        write_whole(self.path, json.dumps(self.found))


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
    """A Qwen3-MoE with random weights. Its class draws all of them alike, and a block's output then drowns the token's
    embedding: short trainings waste half of their steps. So embeddings are larger, and outputs smaller, as GPT-2's.
    """
    torch.manual_seed(seed)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=vocab_size, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, _EMBEDDING_STD)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.mul_(1 / math.sqrt(2 * shape["num_hidden_layers"]))
    return model


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


def train(engine: Any, directory: Path, steps: int, ids: Callable[[int], Iterator[Tensor]], notes: Notes) -> None:
    """Up to `steps` optimizer steps, from the directory's checkpoint on.

    Args:
        engine: of `scmoe_ds.initialize`; its model returns its own loss.
        directory: of checkpoints.
        ids: batches from a step on.
        notes: are told each step and its loss.
    """
    done = engine.load_checkpoint(directory)[1]["steps"] if (directory / "latest").exists() else 0
    for step, tokens in zip(range(done + 1, steps + 1), ids(done), strict=False):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        notes(step, loss.item())
        if step % max(1, steps // _SAVES) == 0 or step == steps:
            engine.save_checkpoint(directory, tag="last", client_state={"steps": step})
            notes.save()


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
