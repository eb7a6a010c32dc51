"""The trained models of benchmarks.quality.sparse: a ScMoE-2, a top-2 and a top-1 ScMoE GPT, and a Qwen3-MoE.

    python -m benchmarks.quality.sparse_models --output data/sparse --only scmoe2 top2 qwen3

Sizes are in benchmarks/quality/sparse.json, seven processor minutes a model. One process after the other; the same
command goes on where it stood. Beside the models lies README, with their commands and held-out losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.adapt_hf import HFTask, deepspeed_json
from benchmarks.quality.crew import ROOT
from benchmarks.quality.entropy import entropies
from benchmarks.quality.run import Task
from benchmarks.quality.text_corpus import Corpus, CorpusSettings, describe, prepare_corpus
from scmoe_ds.data.durable_files import write_whole

SETTINGS = Path(__file__).with_name("sparse.json")
"""Of `settings`."""
_EVALUATED_TOGETHER = 16
_README = "README"


def settings() -> dict[str, Any]:
    """Sizes and models."""
    return dict(json.loads(SETTINGS.read_text(encoding="utf-8")))


def corpus_of(directory: Path) -> Corpus:
    """The text of all models below a directory."""
    return prepare_corpus(directory / "corpus", CorpusSettings(**settings()["corpus"]))


def checkpoint_of(directory: Path, name: str) -> Path:
    """What `scmoe sparsify --load` reads of a model."""
    return directory / name / ("model" if "shape" in settings()["models"][name] else "checkpoints")


def task_of(place: Path, model: dict[str, Any], corpus: Corpus) -> HFTask | Task:
    """A model's training."""
    sizes = settings()
    schedule = {"steps": model["steps"], "warmup": sizes["warmup"], "lr": model["lr"]}
    common = {"batch_size": sizes["batch_size"], "seq_length": sizes["seq_length"], "sequences": sizes["sequences"]}
    if "shape" in model:
        shape, seed = model["shape"], sizes["seed"]
        return HFTask(str(place), str(corpus.directory), shape, None, seed, model["section"], **schedule, **common)
    config = deepspeed_json(sizes["batch_size"], **schedule)
    config["scmoe"] = sizes["gpt_section"] | model["section"]
    (place / "deepspeed.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    flags = sizes["gpt_flags"] | {
        "seq-length": sizes["seq_length"],
        "train-iters": model["steps"],
        "seed": sizes["seed"],
        "data-path": corpus.prefix,
        "split": corpus.split,
        "data-cache-path": place / "cache",
        "save": place / "checkpoints",
        "keep-last": 1,
        "deepspeed_config": place / "deepspeed.json",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [*corpus.tokenizer_flags, "--auto-resume"]
    return Task(words, sizes["sequences"], _EVALUATED_TOGETHER, 0, str(place / "result.json"))


def train(directory: Path, name: str, corpus: Corpus) -> float:
    """Trains a model, unless it is; returns its mean loss of the held-out sequences, nats per token.

    Raises:
        CalledProcessError: the training ended with an error; see log.txt.
    """
    place = directory / name
    place.mkdir(parents=True, exist_ok=True)
    task, result = task_of(place, settings()["models"][name], corpus), place / "result.json"
    if not result.is_file():
        task.save(place / "task.json")
        command = [sys.executable, "-m", task.program, str(place / "task.json")]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (place / "log.txt").open("a", encoding="utf-8") as stream:
            subprocess.run(command, env=environ, cwd=place, stdout=stream, stderr=subprocess.STDOUT, check=True)
    return statistics.fmean(json.loads(result.read_text(encoding="utf-8"))["sequence_losses"])


def main(argv: Sequence[str] | None = None) -> int:
    models = settings()["models"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the corpus and the models")
    parser.add_argument("--only", nargs="+", choices=list(models), default=list(models), help="these models")
    args = parser.parse_args(argv)
    directory = args.output.resolve()
    corpus = corpus_of(directory)
    lines = [
        f"python -m benchmarks.quality.sparse_models --output {directory}",
        describe(corpus.record),
        f"Entropies of the validation text, nats per token: {entropies(corpus)}",
    ]
    for name in args.only:
        lines.append(f"{checkpoint_of(directory, name)}: {models[name]['title']}, {train(directory, name, corpus):.4f}")
        write_whole(directory / _README, "\n".join(lines) + "\n")
        print(lines[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
