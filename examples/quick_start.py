"""`make pretrain`: trains a small ScMoE GPT by the deepspeed command that it prints, and shows what came of it.

Ctrl-C ends the training with a checkpoint.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from scmoe_ds.errors import MissingPackageError, imports_of
from scmoe_ds.figure_style import GREY, WIDTH, save, styled
from scmoe_ds.training.record import RunRecord, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SAVE, RUN, CORPUS = "checkpoints/quick_start", "runs/quick_start", "data/python_stdlib"
SPLIT, ITERATIONS, TRACED = "90,5,5", 300, 225
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
    f"--hidden-dropout 0 --attention-dropout 0 --split {SPLIT}"
).split()
LOOP = (
    f"--train-iters {ITERATIONS} --log-interval 50 --eval-interval 150 --eval-iters 10 --save {SAVE} "
    f"--scmoe-trace {TRACED} --scmoe-trace-dir {RUN}"
).split()
DEFAULT_PORT = 29500
"""Of the deepspeed launcher."""
PROMPT = "def main("


def with_own_log(config: str) -> str:
    """A copy of a JSON whose TensorBoard log has a directory of its own, which `make clean` can remove."""
    whole = json.loads((ROOT / config).read_text())
    whole["tensorboard"].update(enabled=has("tensorboard"), job_name=Path(RUN).name)
    copy = Path(RUN, Path(config).name)
    (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / copy).write_text(json.dumps(whole, indent=2) + "\n")
    return str(copy)


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def command(gpus: int) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line and environment for a number of GPUs; 0 means two CPU processes."""
    launcher = [str(BIN / "deepspeed"), "--quiet", *port()]  # without the launcher's own log; its errors are shown
    script = ["pretrain_gpt_scmoe.py", *MODEL, *LOOP]
    if gpus:
        ranks = ["--num_gpus", str(gpus)]
        # The largest power of two up to the 4 experts that divides the GPUs.
        ep_size = max(size for size in (1, 2, 4) if gpus % size == 0)
        config = with_own_log("ds_configs/gpt_small_gpu.json")
        parallel = ["--moe-expert-parallel-size", str(ep_size)]
        return [*launcher, *ranks, *script, "--deepspeed_config", config, *parallel], {}
    config = with_own_log("ds_configs/gpt_small_cpu.json")
    ranks = ["--num_accelerators", "2"]
    return [*launcher, *ranks, *script, "--deepspeed_config", config], {"DS_ACCELERATOR": "cpu"}


def port() -> list[str]:
    """The launcher's flag for another port, if a process on this machine listens on its default one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
            return []
        except OSError:
            probe.bind(("", 0))
            return ["--master_port", str(probe.getsockname()[1])]


def run(line: list[str]) -> int:
    """Runs a command and returns its exit code. Ctrl-C reaches the command, which says itself what comes of it."""
    process = subprocess.Popen(line, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def output_of(line: list[str]) -> str:
    """What a command prints to stdout; to stderr, if it fails."""
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stderr if done.returncode else done.stdout).rstrip()


def held_out_text() -> bytes:
    """The documents on which the run validates."""
    from scmoe_ds.data.tokenizer import ByteTokenizer
    from scmoe_ds.evaluation.documents import IndexedDocuments  # imports DeepSpeed, which looks for a card

    documents = IndexedDocuments(str(ROOT / CORPUS), SPLIT, ByteTokenizer())
    tokens = np.concatenate([documents.tokens(number) for number in range(len(documents.lengths))])
    return tokens[tokens < 256].astype(np.uint8).tobytes()


def yardsticks(text: bytes) -> dict[str, float]:
    """Nats per byte of such a text that others need."""
    shares = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    return {
        "knowing nothing": math.log(256),
        "knowing only how often each byte occurs": -float((shares[shares > 0] * np.log(shares[shares > 0])).sum()),
        "gzip": 8 * math.log(2) * len(gzip.compress(text)) / len(text),
    }


def meaning(loss: float, text: bytes) -> str:
    """What a validation loss in nats per byte means for such a text, in a sentence."""

    def bits(nats: float) -> str:
        return f"{nats / math.log(2):.4g}"

    known = yardsticks(text)
    below = [f"{bits(nats)} ({name})" for name, nats in known.items() if loss < nats]
    above = [f"{bits(nats)} ({name})" for name, nats in known.items() if loss >= nats]
    sides = [f"{word} than {', '.join(each)}" for word, each in (("fewer", below), ("more", above)) if each]
    return f"{loss:.4g} nats are {bits(loss)} bits per byte of unseen text: {', but '.join(sides)}"


@styled
def loss_figure(record: RunRecord, text: bytes) -> Figure:
    """The curves of training and validation loss, beside what others need for the same text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    axes.plot(*record.curve("lm_loss"), label="training")
    axes.plot(*record.curve("lm_loss", "validations"), label="validation")
    for name, nats in list(yardsticks(text).items())[1:]:
        axes.axhline(nats, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(name, (1, nats), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(title="loss of make pretrain", xlabel="iteration", ylabel="nats per byte")
    axes.legend()
    return figure


def show_result() -> None:
    """What the run has led to: its loss in words, a text by the model, and where to look on."""
    record, text = read_record(ROOT / SAVE), held_out_text()
    for loss in record.curve("lm_loss", "validations")[1][-1:]:
        print(f"\n{meaning(loss, text)}")
    generate = ["scmoe", "generate", "--load", SAVE]
    prompt = ["--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0.9"]
    print(f"\n{shlex.join([*generate, *prompt])}", flush=True)
    print(output_of([str(BIN / "scmoe"), *generate[1:], *prompt]))
    curve, trace = f"{RUN}/loss.png", f"{RUN}/scmoe_trace_iteration_{TRACED}"
    try:
        with imports_of("plots", "the loss curve"):
            save(loss_figure(record, text), ROOT / curve)
    except MissingPackageError as error:
        curve = str(error)
    board = f"tensorboard --logdir {RUN}" if has("tensorboard") else 'pip install "scmoe_ds[plots]", and train again'
    print(f"\nnext, with the programs in {BIN}:")
    print(f"  loss curve   {curve}")
    print(f"  dashboard    scmoe dashboard {SAVE}")
    if (ROOT / f"{trace}.json").is_file():
        print(f"  trace        {trace}.png; {trace}.json opens in https://ui.perfetto.dev")
    print(f"  TensorBoard  {board}")
    print(f"  generate     {shlex.join(generate)} --interactive")


def main() -> int:
    gpus = torch.cuda.device_count()
    line, environment = command(gpus)
    where = f"{gpus} GPU(s)" if gpus else "two CPU processes: about 4 minutes on two cores"
    print(f"{ITERATIONS} iterations of a small ScMoE GPT on Python's own library, on {where}")
    shown = [f"{key}={value}" for key, value in environment.items()] + ["deepspeed", *line[1:]]
    print(shlex.join(shown), flush=True)
    if (ROOT / SAVE).is_dir():  # a run does not write over the checkpoints of another
        print(f"removing {SAVE}, which the last `make pretrain` left", flush=True)
        shutil.rmtree(ROOT / SAVE)
    os.environ.update(environment)  # also for the programs that show the result
    code = run(line)
    if code == 0 and (last := max(read_record(ROOT / SAVE).steps, default=0)) < ITERATIONS:
        print(f"\nstopped at iteration {last} of {ITERATIONS}. To go on:\n{shlex.join([*shown, '--auto-resume'])}")
    elif code == 0:
        show_result()
    return code


if __name__ == "__main__":
    sys.exit(main())
