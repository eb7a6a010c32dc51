"""One-process training on a CUDA device: bf16 under ZeRO, activation checkpointing, resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab.training_log import losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --hidden-dropout 0.1 "
    "--split 90,5,5 --log-interval 1 --log-precise --eval-iters 2 --train-iters 8"
).split()


def train(directory: Path, stage: int, *flags: str) -> tuple[str, dict[int, str]]:
    """What a run prints, and its losses with all digits."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "scmoe": {"num_experts": 4, "capacity_factor": 1.0, "overlap": {"num_chunks": 1}},
    }
    (directory / "ds.json").write_text(json.dumps(whole))
    command = [
        sys.executable,
        str(ROOT / "pretrain_gpt_scmoe.py"),
        "--deepspeed_config",
        str(directory / "ds.json"),
        "--corpus-dir",
        str(directory.parent / "corpus"),
        *FLAGS,
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, losses(done.stdout)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_learns_and_recomputation_changes_no_bit(tmp_path: Path, stage: int) -> None:
    _, plain = train(tmp_path / "plain", stage)
    assert float(plain[8]) < float(plain[1])
    for granularity in ("full", "selective"):
        _, again = train(tmp_path / granularity, stage, "--recompute-granularity", granularity)
        assert again == plain, granularity


def test_a_resumed_run_is_the_one_that_never_stopped(tmp_path: Path) -> None:
    _, whole = train(tmp_path / "whole", 1)
    save = ["--save", str(tmp_path / "saved"), "--auto-resume"]
    _, first = train(tmp_path / "first", 1, *save, "--exit-interval", "4")
    _, second = train(tmp_path / "second", 1, *save)
    assert first | second == whole
