"""Two GPUs with NCCL, which a world of one never reaches: the cases of the acceptance run, each in its own processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.two_gpus import RANKS, check
from benchmarks.gpu.two_ranks import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    assert check(case, Setting(False, str(tmp_path), "record")) is None
