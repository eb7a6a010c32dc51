"""benchmarks.quality.compare in seconds: a small corpus and a tiny model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import IO

import pytest

from benchmarks.quality import compare as quality
from benchmarks.quality.text_corpus import Document
from lab import programs
from scmoe_ds.data.default_corpus import standard_library_documents

ITERATIONS, SEQUENCE = 6, 32
_SETTINGS = Path(quality.__file__).with_name("quality.json")


@cache
def some_documents(count: int = 60) -> list[Document]:
    texts = ((name, text) for name, text in standard_library_documents() if 2000 < len(text) < 15000)
    return [Document(name, text) for (name, text), _ in zip(texts, range(count), strict=False)]


def tiny_settings(path: Path) -> Path:
    """Those of benchmarks.quality.compare for a model and a corpus that take seconds."""
    whole = json.loads(_SETTINGS.read_text(encoding="utf-8"))
    cpu = whole["presets"]["cpu"]
    cpu["corpus"] = {"megabytes": 0.3, "validation_share": 0.2, "vocab_size": 300}
    cpu["evaluation"] = {"sequences": 12, "batch_size": 4}
    cpu["flags"] |= {
        "num-layers": 4,
        "hidden-size": 16,
        "num-attention-heads": 2,
        "seq-length": SEQUENCE,
        "train-iters": ITERATIONS,
        "log-interval": 1,
        "eval-interval": 3,
        "eval-iters": 1,
        "save-interval": 3,
    }
    cpu["deepspeed"]["scheduler"]["params"]["warmup_num_steps"] = 2
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def fork_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forked instead of started anew; they cannot be stopped then."""

    def wait(crew: quality.Crew, task: Path, stream: IO[str]) -> int:
        done = programs.run(["-m", "benchmarks.quality.run", str(task)], 1, task.parent)
        stream.write(done.stdout + done.stderr)
        stream.flush()
        return done.returncode

    monkeypatch.setattr(quality.Crew, "_wait", wait)
