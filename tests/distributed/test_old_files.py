"""The old checkpoint and calibration file (tests/fixtures/before_0_1) on the two ranks that wrote them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.models.gpt import GPT
from scmoe_ds.programs import pretrain_gpt, pretrain_swin
from tests.checkpoint.test_old_files import EXPECTED, FIXTURES, GPT_FLAGS, SWIN_FLAGS, check_record, succeed


def on_a_rank(directory: str) -> dict[str, Any]:
    """The slots of each pair by the times of checkpoint and file; the run that goes on leaves its record in "new"."""
    os.chdir(directory)
    ranks = "--moe-expert-parallel-size 2"
    succeed(pretrain_gpt.main, f"{GPT_FLAGS} {ranks} --eval-iters 2 --load gpt --save new")
    by = {"checkpoint": slots(None, "gpt"), "times.json": slots("times.json", None)}
    # A file whose description is not the run's would be refused.
    flags = f"{ranks} --train-iters 2 --eval-iters 0"
    succeed(pretrain_gpt.main, f"{GPT_FLAGS} --num-layers 6 --deepspeed_config far.json {flags}")
    succeed(pretrain_swin.main, f"{SWIN_FLAGS} --deepspeed_config hooked.json {flags}")
    return by


def write_json(directory: Path, source: str, name: str, **section: Any) -> None:
    """A DeepSpeed JSON of the fixtures with other fields in its section."""
    whole = json.loads((directory / source).read_text())
    whole["scmoe"] |= section
    (directory / name).write_text(json.dumps(whole))


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
    old = tmp_path / "old"
    shutil.copytree(FIXTURES, old)
    far = {"moe_every": 3, "shortcut_distance": 2, "position": "pos3", "first_layer_position": None}
    write_json(old, "gpt.json", "far.json", **far, overlap={"calibration_file": "times_far.json"})
    write_json(old, "swin.json", "hooked.json", overlap={"calibration_file": "times_swin.json"})
    results = run_distributed(on_a_rank, 2, str(old))
    check_record(old / "new", EXPECTED["resumed gpt"])
    for by in results:
        for source, pairs in by.items():
            assert pairs == [
                {mode: each["slots"] for mode, each in plans.items()} for plans in EXPECTED["planned"][source]
            ]
