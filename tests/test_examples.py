"""The files of examples/ run or are valid, and docs/replace.md quotes them as they are."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.launcher.runner import parse_args as launcher_arguments

from lab import programs
from scmoe_ds.programs.flags.gpt import parse_arguments

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUNNABLE = {
    "replace_moe": (),
    "upcycle_gpt2": (),
    "hf_trainer": (),
    "finetune_qwen3_moe": (),
    "digits_moe": ("--deepspeed", "--deepspeed_config", str(EXAMPLES / "digits_moe.json")),
}
QUOTED = ["replace_moe", "upcycle_gpt2"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_example_runs_anywhere_and_its_loss_falls(name: str, tmp_path: Path) -> None:
    run = programs.run([str(EXAMPLES / f"{name}.py"), *RUNNABLE[name]], 1, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(each) for each in re.findall(r"^(?:ScMoE, )?step.* ([\d.]+)$", run.stdout, re.MULTILINE)]
    assert len(losses) >= 6
    assert losses[-1] < 0.85 * losses[0]
    if name == "hf_trainer":  # a mean over the accumulated micro-batches, not their sum
        assert losses[0] < math.log(64) + 0.2


def test_a_vision_language_model_learns(tmp_path: Path) -> None:
    """A few steps, a checkpoint, and answers of the right length to images that it has not seen."""
    flags = ["--train-iters", "30", "--save", str(tmp_path / "checkpoints")]
    run = programs.run([str(EXAMPLES / "vision_language.py"), *flags], 1, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    first = re.search(r"^iter +1/30 +loss ([\d.]+)", run.stdout, re.MULTILINE)
    held_out = re.search(r"^held out: 480 questions, loss ([\d.]+)", run.stdout, re.MULTILINE)
    assert first is not None and held_out is not None, run.stdout
    assert float(held_out[1]) < 0.75 * float(first[1])
    assert len(re.findall(r"^\d{12}\. \S.*$", run.stdout, re.MULTILINE)) == 4
    assert (tmp_path / "checkpoints/global_step30").is_dir()


@pytest.mark.parametrize("name", QUOTED)
def test_the_page_has_what_the_example_has(name: str) -> None:
    """Every line of Python that docs/replace.md quotes under an example's name is in the file."""
    page = (ROOT / "docs/replace.md").read_text(encoding="utf-8")
    source = {line.strip() for line in (ROOT / f"examples/{name}.py").read_text(encoding="utf-8").splitlines()}
    _, _, after = page.partition(f"examples/{name}.py")
    block = re.search(r"```python\n(.*?)```", after, re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        assert line.strip() in {*source, "", "..."}, line


@pytest.mark.parametrize(("name", "slots"), [("hostfile_1x8", [8]), ("hostfile_2x8", [8, 8])])
def test_hostfiles(name: str, slots: list[int]) -> None:
    assert list(fetch_hostfile(str(EXAMPLES / name)).values()) == slots


def test_environment_file() -> None:
    """DeepSpeed splits every line at "=" and exports it: a blank line is an error there, a comment an export."""
    lines = (EXAMPLES / "deepspeed_env.example").read_text(encoding="utf-8").splitlines()
    assert lines and all(re.fullmatch(r"[A-Z][A-Z0-9_]*=[\w@%+=:,./-]+", line) for line in lines)
    assert not any(line.startswith("CUDA_DEVICE_MAX_CONNECTIONS") for line in lines)
    runner = PDSHRunner(launcher_arguments(["train.py"]), "")
    for line in lines:
        runner.add_export(*line.split("=", maxsplit=1))
    assert len(runner.exports) == len(lines)


@pytest.mark.parametrize("name", ["pretrain_gpt2_moe_medium_16xA800.sh", "pretrain_gpt2_moe_medium.slurm"])
def test_scripts(name: str) -> None:
    """Shell syntax, launcher flags and training flags, read by the parsers that will read them."""
    path = EXAMPLES / name
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    launcher, training = re.findall(r"deepspeed (--hostfile.*?) pretrain_gpt_scmoe\.py (.*?)(?:'|\"\$@\"|\n)", text)[0]
    launcher = re.sub(r"\$\{MASTER_ADDR:\+(.*?)\}", r"\1", launcher).replace('"$SLURM_NODEID"', "0")
    launcher = launcher.replace('"$MASTER_PORT"', "29500")
    assert launcher_arguments([*launcher.split(), "pretrain_gpt_scmoe.py"]).user_script == "pretrain_gpt_scmoe.py"
    flags = training.split()
    at = flags.index("--deepspeed_config") + 1
    assert flags[at] == "ds_configs/gpt2_moe_medium_16xA800.json"
    flags[at] = str(ROOT / flags[at])
    args, config = parse_arguments(flags)
    config.section.check_world(16)
    assert args.train_iters * config.whole["train_batch_size"] * args.seq_length == pytest.approx(1e9, rel=0.01)
