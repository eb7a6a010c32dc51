"""The main job as users run it: two expert-parallel processes, a JSON, real text."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab import programs
from lab.distributed import free_port
from lab.training_log import losses, step_line, steps, validations
from scmoe_ds.training.record import read_record

ROOT = Path(__file__).parents[2]
CONFIG = json.loads((ROOT / "ds_configs" / "gpt_small_cpu.json").read_text())
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --hidden-dropout 0.1 "
    "--split 90,5,5 --log-interval 1 --log-precise --eval-iters 2"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


def train(
    directory: Path, corpus: str, *flags: str, ranks: int = 2, accumulation: int = 1, **changes: Any
) -> subprocess.CompletedProcess[str]:
    return programs.run(job(directory, corpus, *flags, accumulation=accumulation, **changes), ranks, directory)


def job(directory: Path, corpus: str, *flags: str, accumulation: int = 1, **changes: object) -> list[str]:
    """Script and flags of a training job; `changes` are fields of the "scmoe" section."""
    whole = {
        **CONFIG,
        "tensorboard": {"enabled": True, "output_path": str(directory / "board"), "job_name": "job"},
        "csv_monitor": {"enabled": True, "output_path": str(directory / "csv"), "job_name": "job"},
        "gradient_accumulation_steps": accumulation,
        "scmoe": {**CONFIG["scmoe"], **changes},
    }
    (directory / "ds.json").write_text(json.dumps(whole))
    arguments = ["--deepspeed_config", str(directory / "ds.json"), "--corpus-dir", corpus, *FLAGS, *flags]
    return [str(ROOT / "pretrain_gpt_scmoe.py"), *arguments]


def test_resume_is_bitwise_the_run_that_never_stopped(tmp_path: Path, corpus: str) -> None:
    directories = {name: tmp_path / name for name in ("whole", "first", "second")}
    for directory in directories.values():
        directory.mkdir()
    save = str(tmp_path / "saved")
    # The number of chunks would change the last bits of sums, and two runs may measure and choose differently.
    overlap = {"num_chunks": 1, "calibration_steps": 2}
    whole = train(directories["whole"], corpus, "--train-iters", "8", "--scmoe-trace", "2", overlap=overlap)
    first = train(
        directories["first"], corpus, "--train-iters", "8", "--save", save, "--exit-interval", "4", overlap=overlap
    )
    second = train(directories["second"], corpus, "--train-iters", "8", "--save", save, "--load", save, overlap=overlap)
    for done in (whole, first, second):
        assert done.returncode == 0, done.stdout + done.stderr
    assert list(losses(first.stdout)) == [1, 2, 3, 4] and list(losses(second.stdout)) == [5, 6, 7, 8]
    assert losses(first.stdout) | losses(second.stdout) == losses(whole.stdout)
    assert len(set(losses(whole.stdout).values())) == 8
    assert validations(whole.stdout)[8] == validations(second.stdout)[8]
    record = read_record(save)
    assert [entry["iteration"] for entry in record.starts] == [0, 4] and list(record.steps) == [*range(1, 9)]
    assert [repr(loss) for loss in record.curve("lm_loss")[1]] == list(losses(whole.stdout).values())
    assert set(record.start["summary"]) >= {"model", "parameters", "batch", "data", "memory"}
    assert {span["name"] for span in record.schedules[0]["timeline"]} >= {"gate", "mlp", "attention", "shared"}
    check_report(whole, directories["whole"])
    check_trace(directories["whole"] / "traces")
    assert "schedule: chosen by times, which micro-batches 2 to 3 measure without overlap" in first.stdout
    assert "nothing is measured again" in second.stdout and "nothing is measured again" not in first.stdout
    assert choices(second.stdout) == choices(first.stdout), "the times came with the checkpoint"


def choices(output: str) -> list[str]:
    found = re.findall(r"^schedule of MoE layer 0, by measured times: .*", output, re.MULTILINE)
    assert len(found) == 1
    return found


def check_trace(directory: Path) -> None:
    """Iteration 2 was still timed; the first with its final schedule is the fifth."""
    assert sorted(path.name for path in directory.iterdir()) == [
        f"scmoe_trace_iteration_5.{kind}" for kind in ("json", "png")
    ]
    events = json.loads((directory / "scmoe_trace_iteration_5.json").read_text())["traceEvents"]
    for rank in (0, 1):
        names = [event["name"] for event in events if event["pid"] == rank and event["ph"] == "X"]
        for name, times in {
            "mlp": 2,
            "experts": 2,
            "dispatch": 2,
            "wait: combine": 2,
            "attention before tap": 2,
        }.items():
            assert names.count(name) == times, (name, names)


def check_report(done: subprocess.CompletedProcess, directory: Path) -> None:
    """The log names what a user looks for, and the files it names exist."""
    last = steps(done.stdout)[7]  # the eighth is one without overlap, for comparison
    assert last.keys() == {"loss", "lr", "grad", "tok/s", "TFLOP/s", "GiB", "hidden", "left"}
    assert 0 < float(last["TFLOP/s"]) < 10 and 0.05 < float(last["GiB"]) < 50 and 0 <= int(last["hidden"]) <= 100
    assert "schedule: chosen by times, which micro-batches" in done.stdout
    assert re.search(r"times: experts [\w ]+ \(slot [1-4]\) \| \d+ % of the communication hidden \| ", done.stdout)
    assert re.search(r"validation loss +\d+\.\d+ nats per token, perplexity", done.stdout)
    assert re.search(r"unigram entropy +3\.\d+ nats", done.stdout)
    assert list((directory / "board" / "job").glob("events.out.tfevents.*"))
    assert (directory / "csv" / "job" / "Train_lm_loss.csv").read_text().count("\n") >= 8


def test_one_process_that_accumulates_prints_what_two_processes_print(tmp_path: Path, corpus: str) -> None:
    """The loop's own sums, means over ranks, random numbers and data order."""
    columns = ("lm_loss", "moe_loss", "grad_norm", "expert_load_min", "expert_load_max", "drop_rate")
    noted: list[list[float]] = []
    validated: list[float] = []
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        flags = ("--train-iters", "6", "--log-interval", "2", "--save", str(directory / "saved"))
        done = train(directory, corpus, *flags, ranks=ranks, accumulation=4 // ranks, expert_parallel_size=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        record = read_record(directory / "saved")
        noted.append([entry[name] for entry in record.steps.values() for name in columns])
        validated.append(record.validations[6]["lm_loss"])
    assert len(noted[0]) == 4 * 6
    assert noted[1] == pytest.approx(noted[0], rel=2e-4, abs=1e-3)
    assert validated[1] == pytest.approx(validated[0], rel=0.1), "validation reads other batches on two ranks"


def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path, corpus: str) -> None:
    """Under the launcher, which then ends with 0."""
    save = tmp_path / "saved"
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    words = job(tmp_path, corpus, "--train-iters", "100000", "--save", str(save))
    command, environment = [sys.executable, *launcher, *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(re.match(step_line(3), line) for line in lines)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "--local_rank=1" in child.cmdline()
        ]
        assert len(ranks) == 1
        ranks[0].send_signal(signal.SIGTERM)
        rest = "".join(lines)
        assert process.wait(60) == 0, rest
    check_stopped(rest, "SIGTERM", save)


def test_another_signal_to_one_rank(tmp_path: Path, corpus: str) -> None:
    save = tmp_path / "saved"
    words = job(tmp_path, corpus, "--train-iters", "100000", "--save", str(save))
    with programs.ranks_of(words, 2, tmp_path) as (first, second):
        first.wait_for(step_line(3))
        second.send_signal(signal.SIGUSR1)
        assert [first.wait(60), second.wait(60)] == [0, 0]
        check_stopped(first.stdout.read_text(), "SIGUSR1", save)


def check_stopped(output: str, name: str, save: Path) -> None:
    stopped = re.search(rf"stopping at iteration (\d+): {name} received", output)
    assert stopped, output
    assert (save / "latest").read_text() == f"global_step{stopped[1]}"
    assert "validation" not in output.split("finished at")[0], "whoever wants the machine back is not kept waiting"


def test_a_limit_of_time(tmp_path: Path, corpus: str) -> None:
    save = str(tmp_path / "saved")
    done = train(tmp_path, corpus, "--train-iters", "100000", "--save", save, "--exit-duration-in-mins", "0.0001")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopping at iteration 1: --exit-duration-in-mins is over" in done.stdout
    assert (tmp_path / "saved" / "latest").read_text() == "global_step1"


def test_validation_loss_falls_below_the_unigram_entropy(tmp_path: Path, corpus: str) -> None:
    flags = ("--train-iters", "150", "--hidden-size", "64", "--seq-length", "128", "--hidden-dropout", "0")
    done = train(tmp_path, corpus, *flags, "--eval-iters", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    loss = float(re.search(r"validation loss +(\S+)", done.stdout)[1])  # type: ignore[index]
    entropy = float(re.search(r"unigram entropy +(\S+)", done.stdout)[1])  # type: ignore[index]
    assert loss < entropy - 0.2


def test_a_file_that_is_missing_on_one_rank_is_one_message(tmp_path: Path, corpus: str) -> None:
    save = str(tmp_path / "saved")
    assert train(tmp_path, corpus, "--train-iters", "1", "--save", save).returncode == 0
    (tmp_path / "saved" / "global_step1" / "layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    done = train(tmp_path, corpus, "--train-iters", "2", "--load", save)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "pretrain_gpt_scmoe.py: error" in line]
    assert len(errors) == 1 and "layer_0_expert_3_mp_rank_00_model_states.pt is missing" in errors[0]


@pytest.mark.parametrize("architecture", ["scmoe", "shared_expert", "topk", "dgmoe", "pipelined_topk"])
def test_one_line_of_json_changes_the_architecture(architecture: str, tmp_path: Path, corpus: str) -> None:
    done = train(tmp_path, corpus, "--train-iters", "30", architecture=architecture)
    assert done.returncode == 0, done.stdout + done.stderr
    values = [float(loss) for loss in losses(done.stdout).values()]
    assert values[-1] < values[0] - 0.5, "30 steps on real text"


def test_a_bad_setting_ends_the_job_with_one_message(tmp_path: Path, corpus: str) -> None:
    done = train(tmp_path, corpus, "--train-iters", "1", expert_parallel_size=4)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "pretrain_gpt_scmoe.py: error" in line]
    assert len(errors) == 1 and "scmoe.expert_parallel_size = 4: must divide the world size 2" in errors[0]


def test_help() -> None:
    command = [sys.executable, str(ROOT / "pretrain_gpt_scmoe.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0
    for flag in (
        "--num-layers",
        "--tensor-model-parallel-size",
        "--data-path",
        "--train-iters",
        "--scmoe-position",
        "--deepspeed_config",
    ):
        assert flag in done.stdout
