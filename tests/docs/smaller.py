"""How what a page asks for is made small enough to run here: on one rank, for two steps, with a tiny model.

The words of a command stay; the flags below come behind them, and of two the last one counts. A JSON is replaced by a
copy for one rank. An absolute path becomes one of the working directory. "…" at the end of a command stands for flags
that the reader knows; those below serve.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.shell import started

GPT = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-key-value-heads 2 --ffn-hidden-size 64 "
    "--seq-length 16 --train-iters 2"
)
SWIN = (
    "--img-size 16 --patch-dim 1 --window-size 4 --embed-dim 8 --depths 1 1 2 2 --num-heads 1 1 2 2 --train-iters 1 "
    "--num-workers 0 --eval-iters 1"
)
ALONE = "--moe-expert-parallel-size 1"

FLAGS = {
    "pretrain_gpt": f"{GPT} {ALONE} --eval-iters 1",
    "pretrain_swin": f"{SWIN} {ALONE}",
    "report": f"{GPT} {ALONE}",
    "check": f"{GPT} {ALONE} --world-size 1",
    "generate": f"{ALONE} --max-new-tokens 2",
    "evaluate": ALONE,
    "evaluate --stride": "--stride 8",
    "evaluate --tasks": "--limit 2",
    "evaluate --low-precision": "--low-precision all",  # one rank is never overloaded
    "generate --expert-copies": "--expert-copies 0 --save-expert-loads loads.json",  # one rank has all experts
    "analyze similarity": "--max-tokens 64",
    "analyze gradients": "--micro-batches 2",
    "preprocess": "--workers 1",
}
"""Program, perhaps with a word of its command: the flags that make it small."""
PYTHON = {"lr_scheduler=…, mpu=…": "lr_scheduler=None, mpu=None"}
"""In a block of Python: what stands there, and what runs on one rank."""


def smaller(words: list[str]) -> list[str]:
    """A command's words, to be run in a directory that has what the reader has."""
    _, program, flags = started(words)
    name = program.rpartition(".")[2]
    if flags and flags[-1] == "…" and not (len(flags) > 1 and flags[-2].startswith("--")):
        flags = flags[:-1]
        if "--deepspeed_config" not in flags:
            flags = [*flags, "--deepspeed_config", "ds.json"]
    flags = [flag[1:] if flag.startswith("/") else flag for flag in flags]
    if "--deepspeed_config" in flags:
        at = flags.index("--deepspeed_config") + 1
        flags[at] = smaller_json(flags[at])
    for key, more in FLAGS.items():
        first, *rest = key.split()
        if first == name and all(word in flags for word in rest):
            flags = [*flags, *more.split()]
    return ["python", *([program] if program.endswith(".py") else ["-m", program]), *flags]


def smaller_json(path: str) -> str:
    """Writes a copy of a DeepSpeed JSON for one rank with a small batch; returns its name."""
    whole = json.loads(Path(path).read_text(encoding="utf-8"))
    for key in ("train_batch_size", "bf16", "fp16"):  # a CPU computes in fp32
        whole.pop(key, None)
    whole |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    whole["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed would compile its own
    section = whole["scmoe"]
    overlap = {**section.get("overlap", {}), "calibration_steps": 1}
    section |= {"expert_parallel_size": 1, "num_experts": 4, "overlap": overlap}
    copy = Path(f"small_{Path(path).name}")
    copy.write_text(json.dumps(whole), encoding="utf-8")
    return str(copy)
