"""One run of benchmarks.quality.compare: pretrain_gpt_scmoe.py's training, then the losses of the held-out sequences.

    python -m benchmarks.quality.run TASK.json

In one process, because a start takes seconds. Training resumes from the run's own checkpoints; the result appears only
when all of it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from scmoe_ds.analysis.similarity import measure
from scmoe_ds.analysis.subjects import gpt_subject
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.splits import split_ranges
from scmoe_ds.engine import device
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.programs.flags.gpt import parse_arguments
from scmoe_ds.programs.pretrain_gpt import pretrain
from scmoe_ds.programs.run import run_program
from scmoe_ds.training.record import RunRecord

_DECIMALS = 6
_SIMILARITY_DECIMALS = 4


@dataclass(frozen=True)
class Task:
    """What a run is told.

    Attributes:
        flags: of pretrain_gpt_scmoe.py, with --save, --data-path and --split.
        sequences: held-out sequences to evaluate, the first of the validation documents.
        batch_size: sequences that are evaluated together.
        similarity_sequences: how many of them the similarity of representations is taken over; 0: it is not.
        result: path of the JSON with their losses.
    """

    program: ClassVar[str] = "benchmarks.quality.run"
    flags: list[str]
    sequences: int
    batch_size: int
    similarity_sequences: int
    result: str

    def save(self, path: Path) -> None:
        """As JSON, for `main`."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def train_and_evaluate(task: Task, args: argparse.Namespace, config: LoadedConfig) -> None:
    """Writes the result; a training that a signal has stopped leaves a checkpoint and no result."""
    summary = pretrain(args, config)
    if summary.iteration < args.train_iters:
        return
    rows = held_out_rows(args.data_path[0], args.split, args.seq_length, task.sequences)
    trained = TrainedModel.open(args.save)
    # fp32 whatever was trained in: the differences of interest are smaller than bf16's steps.
    model = load_model(trained, serving_config(trained.config), torch.float32, device())
    losses = sequence_losses(model, rows, task.batch_size)
    # What a run costs where others share the machine; of the last session only.
    found = {"processor_seconds": round(time.process_time(), 1), "sequence_losses": losses}
    if task.similarity_sequences:
        found["similarity"] = similarity_of(model, rows[: task.similarity_sequences], task.batch_size)
    write_whole(Path(task.result), json.dumps(found))


def held_out_rows(prefix: str, split: str, seq_length: int, most: int) -> list[Row]:
    """The validation documents, joined and cut into sequences: the same for every variant and every seed."""
    from scmoe_ds.data.sequences import Sequences

    dataset = Sequences(prefix)
    _, validation, _ = split_ranges(split, len(dataset))
    tokens = np.concatenate([np.asarray(dataset.get(sequence), dtype=np.int64) for sequence in validation])
    starts = islice(range(0, len(tokens) - seq_length, seq_length), most)
    return [Row(tokens[start : start + seq_length], tokens[start + 1 : start + 1 + seq_length]) for start in starts]


def sequence_losses(model: GPT, rows: Sequence[Row], batch_size: int) -> list[float]:
    """Mean loss of each sequence in nats per token; no token is dropped by the model of `serving_config`."""
    nats = Scorer(model, batch_size).score_all(rows)[:, 0].tolist()
    return [round(total / len(row.labels), _DECIMALS) for total, row in zip(nats, rows, strict=True)]


def similarity_of(model: GPT, rows: Sequence[Row], batch_size: int) -> dict[str, Any]:
    """Names, norms, cosine similarity and L2 distance of all representations."""
    subject = gpt_subject(model)
    starts = range(0, len(rows), batch_size)
    found = measure(
        subject, (torch.from_numpy(np.stack([row.tokens for row in rows[at : at + batch_size]])) for at in starts)
    )
    record = found.record()
    return {
        "tokens": record["tokens"],
        "names": record["names"],
        "norm": [round(each, 4) for each in record["norm"]],
        **{
            key: [[round(value, _SIMILARITY_DECIMALS) for value in row] for row in record[key]]
            for key in ("cosine", "l2")
        },
    }


def curves(run: RunRecord, tokens_per_iteration: int) -> dict[str, Any]:
    """What training has recorded, over all its sessions.

    Returns:
        "train", "validation": [[tokens so far, nats per token], …], by tokens; "tokens_per_second": median of the steps
        but the first of each session, which pays for lazy set-up; "sessions": starts of the process.
    """
    found: dict[str, Any] = {}
    for name, kind in (("train", "steps"), ("validation", "validations")):
        points = zip(*run.curve("lm_loss", kind), strict=True)
        found[name] = [[iteration * tokens_per_iteration, round(loss, _DECIMALS)] for iteration, loss in points]
    firsts = {next((step for step in run.steps if step > start["iteration"]), None) for start in run.starts}
    speeds = [entry["tokens_per_second"] for step, entry in run.steps.items() if step not in firsts]
    speed = round(statistics.median(speeds)) if speeds else None
    return {**found, "tokens_per_second": speed, "sessions": len(run.starts)}


def active_parameters(model: GPT) -> float:
    """Parameters that one token is multiplied with: of the routed experts its own, of tied embeddings the head."""
    config, total = model.config, 0.0
    # DGMoE chooses once for each of two layers, and pairs that share a MoE pass it once each.
    twice = 2 * config.pairs_per_moe if config.architecture == "dgmoe" else 1
    assert isinstance(config.num_experts, int) and isinstance(config.top_k, int)
    for name, parameter in model.named_parameters():
        looked_up = name.startswith("positions.") or (name.startswith("embedding.") and model.head is not None)
        if "deepspeed_experts" in name:
            total += parameter.numel() * twice * config.top_k / config.num_experts
        elif not looked_up:
            total += parameter.numel() * (twice if ".gate." in name else 1)
    return total


def forward_flops(model: GPT) -> float:
    """Floating-point operations per token: two per active parameter, and the causal half of the attention scores."""
    settings = model.settings
    scores = 2 * model.sequence * settings.num_attention_heads * settings.head_size
    return 2 * active_parameters(model) + settings.num_layers * scores


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="JSON that benchmarks.quality.compare has written")
    task = Task(**json.loads(parser.parse_args(argv).task.read_text(encoding="utf-8")))
    return run_program("benchmarks.quality.run", task.flags, partial(train_and_evaluate, task), parse_arguments)


if __name__ == "__main__":
    sys.exit(main())
