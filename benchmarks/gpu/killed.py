"""A rank is killed in the middle of training: the other one ends in time, and its last line says why."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.setting import Setting
from lab.distributed import environment_of_one, free_port, rank_environment
from lab.training_log import step_line

RANKS, TIMEOUT_MIN = 2, 0.5
KILLED_AFTER = 3
SLACK_S = 15.0
"""The job ends within its timeout and this, as the package says of its failures."""
SECTION = {"num_experts": 4, "expert_parallel_size": RANKS, "overlap": {"calibration_steps": 0}}
FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --eval-iters 0 --split 8,1,1 "
    f"--log-interval 1 --train-iters 99999 --distributed-timeout-minutes {TIMEOUT_MIN} "
    "--deepspeed_config ds.json --data-path data"
)


def run(notes: Notes, setting: Setting) -> None:
    """The step."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        ranks = _start(directory)
        try:
            _wait_for_step(directory / "0.log", ranks)
            ranks[-1].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            code: int | None = ranks[0].wait(60 * TIMEOUT_MIN + 2 * SLACK_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            for rank in ranks:
                rank.kill()
        seconds = time.monotonic() - killed
        lines = (directory / "0.log").read_text("utf-8", errors="replace").splitlines()
    said = [line for line in lines if re.search(r"error: rank 0\b.*(\bRank 1\b|timed out)", line)]
    in_time = code not in (None, 0) and seconds <= 60 * TIMEOUT_MIN + SLACK_S
    notes.row(
        "A killed rank", **{"exit code of the other": code, "after s": f"{seconds:.0f}", "says": (said or lines)[-1]}
    )
    notes.number("killed rank: the other one ends in time and says why", float(in_time and bool(said)))


def _start(directory: Path) -> list[subprocess.Popen[bytes]]:
    from scmoe_ds.data.indexed_writer import write_indexed_dataset

    numbers = random.Random(0)
    documents = [[numbers.randrange(256) for _ in range(300)] for _ in range(50)]
    write_indexed_dataset(str(directory / "data"), documents, 257)
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "scmoe": SECTION,
    }
    (directory / "ds.json").write_text(json.dumps(whole))
    command, port = [sys.executable, str(ROOT / "pretrain_gpt_scmoe.py"), *FLAGS.split()], free_port()
    ranks = []
    for rank in range(RANKS):
        environment = environment_of_one() | rank_environment(rank, RANKS, port)
        with (directory / f"{rank}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        ranks.append(process)
    return ranks


def _wait_for_step(log: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    while re.search(step_line(KILLED_AFTER), text := log.read_text("utf-8", errors="replace")) is None:
        if any(rank.poll() is not None for rank in ranks):
            raise RuntimeError(f"a rank ended before it was killed:\n{text}")
        time.sleep(0.2)
