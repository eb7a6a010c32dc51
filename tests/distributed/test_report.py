"""`scmoe report`: what a user reads before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

from lab import programs
from tests.distributed.test_pretrain import CONFIG

FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64".split()


def report(directory: Path, ranks: int, *flags: str, **changes: object) -> CompletedProcess[str]:
    whole = {**CONFIG, "tensorboard": {"enabled": False}, "scmoe": {**CONFIG["scmoe"], **changes}}
    (directory / "ds.json").write_text(json.dumps(whole))
    words = ["-m", "scmoe_ds.programs.report", "--deepspeed_config", str(directory / "ds.json"), *FLAGS, *flags]
    return programs.run(words, ranks, directory)


def test_report_says_what_overlap_is_worth(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    done = report(tmp_path, 2, "--details", overlap={"calibration_steps": 3, "calibration_file": str(file)})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    pattern = r"overlap hides \d+ % of the communication; a step .* DeepSpeed's top-2(, measured)?"
    assert re.fullmatch(pattern, lines[0]), done.stdout  # what it is worth is a matter of the measured times
    for part in (
        r"  in all a step .*DeepSpeed's top-2 \(\d\.\d+–\d\.\d+ × in \d+ rounds\)",
        r"  with overlap a step .* the same without overlap",
        r"  scmoe +\d+\.\d  \(\d",
        r"forward: \d+ % of the communication hidden",
        r"overlap (pays|gains|costs).*, predicted",
        "one chunk hides all-to-alls of up to",
        "break-even with top-1 MoE without a shared expert",
    ):
        assert re.search(part, done.stdout), part
    # Which number of chunks is chosen is a matter of the measured times: the others are told in any case.
    assert len(re.findall(r"^choice for .*\(others: .*[24] chunks of experts at", done.stdout, re.MULTILINE)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds.json", "times.json"], "it keeps the times alone"
    identity = json.loads(file.read_text())[0]["identity"]
    assert identity["hidden_size"] == 32 and identity["moe_blocks"] == [1] and identity["num_experts"] == [4]


def test_a_bad_setting_is_one_message(tmp_path: Path) -> None:
    done = report(tmp_path, 1)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("scmoe report: error: scmoe.expert_parallel_size = 2")
