"""Of several ranks one speaks: a mistake is a sentence, a fault one traceback and a sentence, without C++ frames."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lab.distributed import environment_of_one, free_port, rank_environment
from lab.programs import ranks_of
from scmoe_ds.data.indexed_writer import write_indexed_dataset

JSON = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4, "expert_parallel_size": 2, "overlap": {"calibration_steps": 0}},
}
Run = Callable[[Path, str], list[tuple[int, str]]]
FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --eval-iters 0 --split 8,1,1 "
    "--train-iters 99999 --deepspeed_config ds.json --data-path data"
).split()
PROGRAM = """
import os, sys
from scmoe_ds.programs import pretrain_gpt
from scmoe_ds.training.loop import Trainer
failing, step = os.environ["FAILING"].split(), Trainer.step
def fail(self, *args):
    if self.iteration == 2 and os.environ["RANK"] in failing:
        raise LookupError("a bug of ours")
    return step(self, *args)
Trainer.step = fail
sys.exit(pretrain_gpt.main(sys.argv[1:]))
"""
REFUSES = """
def init(**settings):
    raise RuntimeError("api_key not configured (no-tty)")
"""


def write_files(directory: Path, **changes: object) -> None:
    rng = np.random.default_rng(0)
    write_indexed_dataset(str(directory / "data"), [rng.integers(0, 256, 300).tolist() for _ in range(20)], 257)
    (directory / "ds.json").write_text(json.dumps({**JSON, **changes}))
    (directory / "program.py").write_text(PROGRAM)
    (directory / "wandb.py").write_text(REFUSES)


def run_forked(directory: Path, failing: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each of two ranks."""
    with ranks_of([str(directory / "program.py"), *FLAGS], 2, directory, {"FAILING": failing}) as ranks:
        return [(rank.wait(120), rank.stderr.read_text()) for rank in ranks]


def run_anew(directory: Path, failing: str) -> list[tuple[int, str]]:
    """The same in processes that import torch under the variables that the program sets."""
    port, processes = free_port(), []
    for rank in range(2):
        environment = {**environment_of_one(), **rank_environment(rank, 2, port), "FAILING": failing}
        environment.pop("TORCH_CPP_LOG_LEVEL", None)  # of this process: the program sets its own
        command = [sys.executable, "program.py", *FLAGS]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, cwd=directory, text=True, **pipes))  # type: ignore[call-overload]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def test_what_rank_zero_alone_finds(tmp_path: Path) -> None:
    """Monitors are rank 0's; the other rank waits in a collective of DeepSpeed's start, whose end it tells nobody."""
    write_files(tmp_path, wandb={"enabled": True})
    (code, said), (other_code, silence) = run_forked(tmp_path, "")
    assert (code, other_code) == (2, 2)
    assert re.fullmatch(r"pretrain_gpt_scmoe.py: error: wandb = .*: DeepSpeed stops at it \(RuntimeError: .*\n", said)
    assert silence == ""


@pytest.mark.parametrize(("run", "failing", "speaker"), [(run_anew, "1", 1), (run_forked, "0 1", 0)])
def test_a_fault_has_one_traceback(run: Run, failing: str, speaker: int, tmp_path: Path) -> None:
    """Of one rank while the other is in a collective, whose C++ stack nobody sees, and of both alike."""
    write_files(tmp_path)
    ranks = run(tmp_path, failing)
    assert [code for code, _ in ranks] == [1, 1]
    said, silence = ranks[speaker][1], ranks[1 - speaker][1]
    assert silence == ""
    assert said.count("Traceback") == 1 and "frame #" not in said
    assert re.fullmatch(
        rf"pretrain_gpt_scmoe.py: error: rank {speaker} \(host \S+\), iteration 3: LookupError: a bug of ours \(see the traceback .*",
        said.splitlines()[-1],
    ), said
