"""`make pretrain`: the deepspeed command that trains a small ScMoE GPT on this machine, printed and run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
    "--hidden-dropout 0 --attention-dropout 0 --split 90,5,5"
).split()
SAVE = "checkpoints/quick_start"
LOOP = f"--train-iters 300 --log-interval 20 --eval-interval 100 --eval-iters 10 --save {SAVE}".split()


def with_own_log(config: str) -> str:
    """A copy of a JSON whose TensorBoard log has a directory of its own, which `make clean` can remove."""
    whole = json.loads((ROOT / config).read_text())
    whole["tensorboard"]["job_name"] = Path(SAVE).name
    copy = Path("runs", Path(SAVE).name, Path(config).name)
    (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / copy).write_text(json.dumps(whole, indent=2) + "\n")
    return str(copy)


def command(gpus: int) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line and environment for a number of GPUs; 0 means two CPU processes."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    script = ["pretrain_gpt_scmoe.py", *MODEL, *LOOP]
    if gpus:
        ranks = ["--num_gpus", str(gpus)]
        # The largest power of two up to the 4 experts that divides the GPUs.
        ep_size = max(size for size in (1, 2, 4) if gpus % size == 0)
        config = with_own_log("ds_configs/gpt_small_gpu.json")
        parallel = ["--moe-expert-parallel-size", str(ep_size)]
        return [launcher, *ranks, *script, "--deepspeed_config", config, *parallel], {}
    config = with_own_log("ds_configs/gpt_small_cpu.json")
    ranks = ["--num_accelerators", "2"]
    return [launcher, *ranks, *script, "--deepspeed_config", config], {"DS_ACCELERATOR": "cpu"}


def main() -> int:
    line, environment = command(torch.cuda.device_count())
    shown = [f"{key}={value}" for key, value in environment.items()] + ["deepspeed", *line[1:]]
    print(shlex.join(shown), flush=True)
    if (ROOT / SAVE).is_dir():  # a run does not write over the checkpoints of another
        print(f"removing {SAVE}, which the last `make pretrain` left", flush=True)
        shutil.rmtree(ROOT / SAVE)
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
