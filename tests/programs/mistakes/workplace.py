"""A directory in which the mistakes are made: data, a DeepSpeed JSON, a checkpoint, an export, and things that are none."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.programs import __main__ as scmoe
from tests.helpers.json_files import changed

JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4, "overlap": {"calibration_steps": 0}},
}
TRAIN = (
    "pretrain --deepspeed_config ds.json --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 "
    "--train-iters 1 --eval-iters 1"
)
DATA = "--data-path data --split 8,1,1"
_PROGRESS = re.compile(r"loading \S+$|\d+ documents|scmoe preprocess: |.*(is given \d times|left out)")


def furnish(place: Path) -> None:
    """Makes everything in the current directory, which is `place`."""
    rng = np.random.default_rng(0)
    write_indexed_dataset("data", [rng.integers(0, 256, 300).tolist() for _ in range(20)], 257)
    write_json("ds.json", {})
    assert run(f"{TRAIN} {DATA} --save saved") == 0
    assert run("convert export saved export") == 0
    for name, content in {
        "lone.bin": b"\0" * 64,
        "text.txt": b"some words, and some more. " * 40,
        "empty.txt": b"",
        "latin.txt": "für immer".encode("latin-1"),
        "binary.txt": bytes(range(256)),
        "other_key.jsonl": b'{"content": "a"}\n',
        "broken.jsonl": b'{"text": "a"}\nno JSON\n',
        "list.jsonl": b'[{"text": "a"}]',
        "number.jsonl": b'{"text": 3}\n',
        "no.json.gz": gzip.compress(b"no JSON\n"),
        "cut.jsonl.gz": gzip.compress(b'{"text": "abc"}\n' * 999)[:-20],
        "vocab.json": b'{"a": 0}',
        "merges.txt": b"#version: 0.2\n",
        "hf/config.json": b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
        "megatron/latest_checkpointed_iteration.txt": b"100",
        "nothing/.keep": b"",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    Path("nothing/.keep").unlink()
    save_file({"wte.weight": np.zeros((4, 4), np.float32)}, "hf/model.safetensors")


def write_json(name: str, changes: dict[str, Any]) -> None:
    """`JSON` with other values; None removes a key."""
    Path(name).write_text(json.dumps(changed(JSON, changes)))


def run(command: str) -> int | str | None:
    """The exit code of a `scmoe` command in this process."""
    try:
        return scmoe.main(shlex.split(command))
    except SystemExit as ended:  # argparse's
        return ended.code


def expect(command: str, message: str, capfd: pytest.CaptureFixture[str], code: int = 2) -> None:
    """Makes a mistake: stderr has one sentence, beside lines of progress, and it matches."""
    capfd.readouterr()
    assert run(command) == code
    said = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line.strip()]
    errors = [line for line in said if not _PROGRESS.match(line) or "error:" in line]
    assert len(errors) == 1, said
    assert re.match(rf"(scmoe[ \w-]*|pretrain_gpt_scmoe\.py): error: {message}", errors[0]), errors[0]
