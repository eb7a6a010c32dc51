"""The old checkpoint and calibration file (tests/fixtures/before_0_1) on the two ranks that wrote them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.models.gpt import GPT
from scmoe_ds.programs import pretrain_gpt
from tests.checkpoint.test_old_files import EXPECTED, FIXTURES, GPT_FLAGS, check_log


def on_a_rank(directory: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code and log of the run that goes on; the slots of each pair by both files."""
    os.chdir(directory)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        flags = f"{GPT_FLAGS} --moe-expert-parallel-size 2 --eval-iters 2 --load gpt"
        code = pretrain_gpt.main(flags.split())
        return code, log.getvalue(), {"checkpoint": slots(None, "gpt"), "file": slots("times.json", None)}


def slots(calibration_file: str | None, load: str | None) -> list[dict[str, list[int]]]:
    whole = json.loads(Path("gpt.json").read_text())
    del whole["scheduler"]
    whole["scmoe"] |= {"expert_parallel_size": 2, "overlap": {"calibration_file": calibration_file}}
    config = scmoe_ds.ScMoEConfig.from_deepspeed(whole)
    saved = json.loads(Path("gpt/global_step6/scmoe.json").read_text())
    settings, _ = checkpoint.rebuild(saved)
    engine = scmoe_ds.initialize(model=GPT(settings, config, 16), config=whole)[0]
    description = checkpoint.describe(settings, config, 2, whole)
    checkpoint.load(engine, checkpoint.choose(load, None, False, description))
    assert not engine.overlap.calibrating
    return [
        {"train": list(pair.schedule.slots), "forward": list(pair.forward_schedule.slots)}
        for pair in engine.overlap.pairs
    ]


def test_old_files_on_the_ranks_that_wrote_them(tmp_path: Path) -> None:
    """Through DeepSpeed's own loader; the times of checkpoint and file are taken, and nothing is measured again."""
    shutil.copytree(FIXTURES, tmp_path / "old")
    results = run_distributed(on_a_rank, 2, str(tmp_path / "old"))
    code, log, _ = results[0]
    assert code == 0, log
    check_log(log, EXPECTED["resumed gpt"])
    for _, _, schedules in results:
        for source, pairs in schedules.items():
            assert pairs == [
                {mode: each["slots"] for mode, each in plans.items()} for plans in EXPECTED["planned"][source]
            ]
