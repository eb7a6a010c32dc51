"""`scmoe report`: what a user reads before training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab.distributed import free_port
from tests.distributed.test_pretrain import CONFIG, ROOT

FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --train-iters 1".split()


def report(directory: Path, ranks: int, *flags: str, **changes: object) -> subprocess.CompletedProcess:
    whole = {**CONFIG, "tensorboard": {"enabled": False}, "scmoe": {**CONFIG["scmoe"], **changes}}
    (directory / "ds.json").write_text(json.dumps(whole))
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    program = ["--module", "scmoe_ds.programs.report"] if ranks > 1 else ["-m", "scmoe_ds.programs.report"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *program]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--deepspeed_config", str(directory / "ds.json"), *FLAGS, *flags],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_report_says_what_overlap_is_worth(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    overlap = {"calibration_steps": 3, "calibration_file": str(file)}
    done = report(tmp_path, 2, overlap=overlap)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        "overlap ",
        "one chunk hides all-to-alls of up to",
        "break-even with top-1 MoE without a shared expert",
        "choice for training",
        "choice for forward alone",
    ):
        assert part in done.stdout, part
    # Which number of chunks is chosen is a matter of the measured times: the others are told in any case.
    assert len(re.findall(r"^choice for .*\(others: .*[24] chunks of experts at", done.stdout, re.MULTILINE)) == 2
    assert re.search(r"measured with the schedules in use.*hidden \d+ % forward .* \d+ % backward", done.stdout)
    assert not list(tmp_path.glob("*step*")), "it trains nothing and saves nothing else"
    # A second call has nothing to measure, and says the same.
    again = report(tmp_path, 2, overlap=overlap)
    assert again.returncode == 0, again.stdout + again.stderr
    pattern = re.compile(r"^(?:  .*|choice .*)$", re.MULTILINE)
    assert pattern.findall(again.stdout) == pattern.findall(done.stdout)
    assert f"from the times in {file}" in again.stdout


@pytest.mark.parametrize("changes", [{"expert_parallel_size": 1}, {"architecture": "shared_expert"}])
def test_nothing_to_hide(changes: dict, tmp_path: Path) -> None:
    done = report(tmp_path, 1, **{"expert_parallel_size": 1, **changes})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no communication to hide" in done.stdout


def test_a_bad_setting_is_one_message(tmp_path: Path) -> None:
    done = report(tmp_path, 1)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("scmoe report: error: scmoe.expert_parallel_size = 2")
