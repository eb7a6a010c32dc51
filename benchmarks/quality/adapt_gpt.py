"""A student of this package's GPT for benchmarks.quality.adapt: surgery, then scmoe pretrain's own training.

    python -m benchmarks.quality.adapt_gpt TASK.json

Training resumes from the run's own checkpoints, which are also what is evaluated on the way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.quality.adapt_layers import by_similarity
from benchmarks.quality.run import held_out_rows, sequence_losses
from scmoe_ds.analysis.subjects import gpt_subject
from scmoe_ds.checkpoint.export import export
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.engine import device
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.programs.flags.gpt import parse_arguments
from scmoe_ds.programs.pretrain_gpt import pretrain
from scmoe_ds.programs.run import run_program


@dataclass(frozen=True)
class StudentTask:
    """What a run is told.

    Attributes:
        flags: of scmoe pretrain, with --save, --data-path and --split, without --deepspeed_config.
        source: directory of the teacher's checkpoints.
        config: DeepSpeed JSON, whose "scmoe" section has "adapt"; without it the source itself is trained on.
        sequences, batch_size: held-out sequences to evaluate before and after training, and how many at a time.
        result: path of the JSON.
        order_at: position whose ends order the layers, the most similar ones first; None: as `config` says.
        layers: how many of them are converted; 0: all.
        on_the_way: iterations whose checkpoints are evaluated on the first `sequences_on_the_way` of them.
    """

    program: ClassVar[str] = "benchmarks.quality.adapt_gpt"
    flags: list[str]
    source: str
    config: dict[str, Any]
    sequences: int
    batch_size: int
    result: str
    order_at: str | None = None
    layers: int = 0
    on_the_way: Sequence[int] = ()
    sequences_on_the_way: int = 0

    def save(self, path: Path) -> None:
        """As JSON, for `main`."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def train_and_evaluate(task: StudentTask, _: argparse.Namespace) -> None:
    """Writes the result; a training that a signal has stopped leaves a checkpoint and no result."""
    place = Path(task.result).parent
    teacher = TrainedModel.open(task.source)
    flags = [*task.flags, "--deepspeed_config", str(place / "deepspeed.json")]
    adapt = task.config["scmoe"].get("adapt")
    if adapt is None:
        export(Path(task.source), place / "source") if not (place / "source").exists() else None
        flags += ["--load", str(place / "source")]
    elif task.order_at:
        adapt["layers"] = _in_order(teacher, task)
    (place / "deepspeed.json").write_text(json.dumps(task.config, indent=1) + "\n", encoding="utf-8")
    args, config = parse_arguments(flags)
    rows = held_out_rows(args.data_path[0], args.split, args.seq_length, task.sequences)
    first = teacher if adapt is None else after_surgery(teacher, task.source, config.section)
    before = losses_of(first, rows, task.batch_size)
    if pretrain(args, config).iteration < args.train_iters:
        return
    some = rows[: task.sequences_on_the_way]
    steps = {str(step): TrainedModel.open(Path(args.save, f"global_step{step}")) for step in task.on_the_way}
    found = {
        "before": before,
        "on_the_way": {step: losses_of(each, some, task.batch_size) for step, each in steps.items()},
        "sequence_losses": losses_of(TrainedModel.open(args.save), rows, task.batch_size),
        "processor_seconds": round(time.process_time(), 1),
        **({"layers": adapt["layers"]} if task.order_at else {}),
    }
    write_whole(Path(task.result), json.dumps(found))


def after_surgery(teacher: TrainedModel, source: str, section: ScMoEConfig) -> TrainedModel:
    """What a student is before its training."""
    model = SourceModel.open(Path(source))
    config = model.with_base(section)
    return TrainedModel(teacher.path, model.surgery(config), teacher.settings, config, teacher.dtype)


def losses_of(trained: TrainedModel, rows: Sequence[Row], batch_size: int) -> list[float]:
    """Of each sequence, fp32, without drops."""
    return sequence_losses(_loaded(trained), rows, batch_size)


def _loaded(trained: TrainedModel) -> GPT:
    return load_model(trained, serving_config(trained.config), torch.float32, device())


def _in_order(teacher: TrainedModel, task: StudentTask) -> list[int]:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in (("--data-path", str), ("--split", str), ("--seq-length", int)):
        flags.add_argument(name, type=kind, required=True)
    args, _ = flags.parse_known_args(task.flags)
    rows = held_out_rows(args.data_path, args.split, args.seq_length, task.sequences_on_the_way)
    assert task.order_at is not None
    layers = by_similarity(gpt_subject(_loaded(teacher)), rows, task.batch_size, task.order_at)
    return layers[: task.layers or None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="JSON that benchmarks.quality.adapt has written")
    args = parser.parse_args(argv)
    task = StudentTask(**json.loads(args.task.read_text(encoding="utf-8")))
    return run_program("benchmarks.quality.adapt_gpt", [], partial(train_and_evaluate, task), lambda _: (args,))


if __name__ == "__main__":
    sys.exit(main())
