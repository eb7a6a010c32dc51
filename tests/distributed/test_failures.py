"""How a job ends that cannot go on: on all ranks, with one sentence that says where to look."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lab.distributed import free_port, rank_environment, run_distributed
from lab.programs import Rank, ranks_of
from lab.training_log import step_line
from scmoe_ds import compat
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.errors import ExchangeError, LauncherError, TrainingError
from scmoe_ds.models.gpt import GPTOutput
from scmoe_ds.parallel import process
from scmoe_ds.parallel.agreement import run_together
from scmoe_ds.parallel.failures import failed_collective
from scmoe_ds.parallel.watch import Watch
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program
from scmoe_ds.training.health import MOST_SKIPPED_STEPS, StepHealth, is_loss_scale_exhausted
from scmoe_ds.training.log import TrainingOutput
from scmoe_ds.training.loop import Trainer

ROOT = Path(__file__).parents[2]
JSON = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {
        "num_experts": 4,
        "expert_parallel_size": 2,
        "all_to_all": "send_receive",
        "overlap": {"calibration_steps": 0},
    },
}
FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --eval-iters 1 --split 8,1,1 "
    "--log-interval 1"
).split()


def prepare(directory: Path, *flags: str) -> list[str]:
    """A data set, a JSON, and the arguments that name them."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 300).tolist() for _ in range(20)]
    prefix = write_indexed_dataset(str(directory / "data"), documents, 257).prefix
    (directory / "ds.json").write_text(json.dumps(JSON))
    return [*FLAGS, "--data-path", prefix, "--deepspeed_config", str(directory / "ds.json"), *flags]


def poisoned_run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and messages of a run whose 2nd micro-batch of iteration 3 has a bad loss on rank 1."""
    original, calls = Trainer._forward, iter(range(10**6))

    def poisoned(trainer: Trainer, batch: dict[str, torch.Tensor], *samples: Any) -> GPTOutput:
        output = original(trainer, batch, *samples)
        bad = dist.get_rank() == 1 and next(calls) == 2 * 2 + 1
        assert output.loss is not None
        return replace(output, loss=output.loss * float("nan")) if bad else output

    Trainer._forward = poisoned  # type: ignore[method-assign]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = pretrain_gpt_program.main(arguments)
    return code, errors.getvalue()


def test_a_bad_loss_stops_all_ranks_at_its_step(tmp_path: Path) -> None:
    save = tmp_path / "saved"
    arguments = prepare(tmp_path, "--train-iters", "9", "--save", str(save), "--save-interval", "1")
    (code, message), (other_code, silence) = run_distributed(poisoned_run, 2, arguments)
    assert (code, other_code) == (2, 2)
    # 8 samples an iteration; micro-batch 2 of rank 1 is the 4th of the iteration, two samples each.
    assert re.search(
        r"iteration 3: loss is nan in micro-batch 2 of 2 on data-parallel rank 1, training samples "
        r"22–23 \(documents \d+.* of .*data\); this step was not saved",
        message,
    ), message
    assert "error" not in silence, "one message for the job"
    assert (save / "latest").read_text() == "global_step2"


def fake_engine(**attributes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{"fp16_enabled": lambda: False, "skipped_steps": 0, "get_global_grad_norm": lambda: 1.0, **attributes}
    )


def test_findings_of_a_step() -> None:
    health = StepHealth(fake_engine(), micro_batches=4)
    health.note(torch.tensor(1.0), 0)
    assert int(health.finding()) == 0
    for number, loss in [(2, float("inf")), (3, float("nan"))]:
        health.note(torch.tensor(loss), number)
    assert health.explain(int(health.finding())) == ("loss is inf", 2), "the first counts"
    health.note(torch.tensor(1.0), 0)
    assert int(health.finding()) == 0, "a step's findings are its own"
    health = StepHealth(fake_engine(get_global_grad_norm=lambda: float("inf")), micro_batches=4)
    health.note(torch.tensor(1.0), 3)
    what, number = health.explain(int(health.finding()))
    assert "gradient norm is not finite" in what and number is None
    health = StepHealth(fake_engine(fp16_enabled=lambda: True), micro_batches=4)
    health.note(torch.tensor(float("nan")), 0)
    assert int(health.finding()) == 0, "left to loss scaling"


def test_fp16_that_skips_every_step_ends() -> None:
    engine = fake_engine(fp16_enabled=lambda: True)
    health = StepHealth(engine, micro_batches=1)
    for step in range(MOST_SKIPPED_STEPS - 1):
        engine.skipped_steps += 1
        health.check_skipped_steps(step)
    health.check_skipped_steps(100)  # one that was not skipped
    with pytest.raises(TrainingError, match=rf"iteration 7: the last {MOST_SKIPPED_STEPS} steps were skipped"):
        for _ in range(MOST_SKIPPED_STEPS):
            engine.skipped_steps += 1
            health.check_skipped_steps(7)


def test_deepspeeds_own_words_for_an_exhausted_loss_scale() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=1, scale_window=10, min_scale=1, delayed_shift=1, consecutive_hysteresis=False, dtype=torch.float32
    )
    with pytest.raises(Exception, match="minimum") as raised:
        scaler.update_scale(True)
    assert is_loss_scale_exhausted(raised.value)


@contextlib.contextmanager
def ranks_of_a_job(arguments: Sequence[str], directory: Path) -> Iterator[list[Rank]]:
    """Two processes of the main job; yielded when they have trained a few iterations."""
    with ranks_of([str(ROOT / "pretrain_gpt_scmoe.py"), *arguments], 2, directory) as processes:
        processes[0].wait_for(step_line(3))
        yield processes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_sentence(victim: int, tmp_path: Path) -> None:
    with ranks_of_a_job(prepare(tmp_path, "--train-iters", "100000"), tmp_path) as processes:
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[1 - victim].wait(60) == 1
        lines = processes[1 - victim].stderr.read_text().splitlines()
    assert any(line.startswith("Traceback") for line in lines)
    found = re.match(
        r"pretrain_gpt_scmoe.py: error: rank (\d) \(host \S+\), iteration \d+: (.*) ranks 0, 1 failed: "
        r".*(?:Connection|connection).*\. Rank (\d) \(host \S+\).* look at the end of its log.*--load",
        lines[-1],
    )
    assert found, lines[-1]
    assert (int(found[1]), int(found[3])) == (1 - victim, victim)
    assert re.match(r"(the part with rank \d of )?the all-to-all of expert-parallel|all_reduce over", found[2])


def test_a_stopped_process_is_named_and_ended(tmp_path: Path) -> None:
    """Rank 0, which keeps the store: nothing of torch.distributed answers any more."""
    flags = ["--train-iters", "100000", "--distributed-timeout-minutes", "0.08"]
    with ranks_of_a_job(prepare(tmp_path, *flags), tmp_path) as processes:
        processes[0].send_signal(signal.SIGSTOP)
        assert processes[1].wait(60) == 1
        assert processes[0].wait(60) == -signal.SIGKILL
        last = processes[1].stderr.read_text().splitlines()[-1]
        assert re.search(r"rank 1 .* failed: .*\. Rank 0 \(host \S+\) has not said why \(.*\): look at", last), last
        assert "(it is stopped) and was killed" in processes[0].stderr.read_text()


def run_with_a_signal_in_a_validation(arguments: list[str]) -> tuple[int, list[int]]:
    """Exit code, and the iteration of each forward pass in a validation; rank 1 alone gets the signal."""
    original, passes = Trainer._forward, list[int]()

    def forward(trainer: Trainer, batch: dict[str, torch.Tensor], *samples: Any) -> TrainingOutput:
        if not trainer.engine.module.training:
            passes.append(trainer.iteration)
            if dist.get_rank() == 1 and len(passes) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, batch, *samples)

    Trainer._forward = forward  # type: ignore[method-assign]
    return pretrain_gpt_program.main(arguments), passes


def test_a_signal_in_a_validation_is_obeyed_in_it(tmp_path: Path) -> None:
    flags = ["--train-iters", "9", "--eval-interval", "2", "--eval-iters", "40", "--save", str(tmp_path / "saved")]
    for code, passes in run_distributed(run_with_a_signal_in_a_validation, 2, prepare(tmp_path, *flags)):
        assert code == 0 and passes == [2], "one batch, and no further step or validation"
    assert (tmp_path / "saved" / "latest").read_text() == "global_step2"


def long_step_under_a_short_limit() -> str:
    """The result of a step that takes twice the limit of collectives on rank 0."""
    compat.set_world_timeout(timedelta(seconds=2))
    with Watch("test", timeout_s=2.0) as watch:
        watch.join()
        return str(run_together(lambda: time.sleep(4.0 * (dist.get_rank() == 0)) or "done"))


def test_long_steps_are_waited_for_and_ranks_meet_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_distributed(long_step_under_a_short_limit, 2) == ["done", "done"]
    monkeypatch.setattr(process, "_LATE_START_S", 0.0)
    with socket.create_server(("", 0)) as server:
        busy = str(server.getsockname()[1])
        for port, message in (
            (str(free_port()), "rank 0 did not meet all 2 ranks at 127.0.0.1:.* within 1 s: look"),
            (busy, rf"MASTER_PORT\) = {busy}: another process of .* listens on this port; end"),
        ):
            for name, value in rank_environment(0, 2, port).items():
                monkeypatch.setenv(name, value)
            with pytest.raises(LauncherError, match=message):
                process.connect(timedelta(seconds=1))


def test_ctrl_c_is_no_error(tmp_path: Path) -> None:
    with ranks_of_a_job(prepare(tmp_path, "--train-iters", "100000"), tmp_path) as processes:
        for process in processes:
            process.send_signal(signal.SIGINT)
        assert [process.wait(60) for process in processes] == [130, 130]
        errors = [process.stderr.read_text() for process in processes]
    assert errors[0].splitlines()[-1] == "pretrain_gpt_scmoe.py: interrupted"
    assert not any("Traceback" in text for text in errors)


def test_words_and_peers_of_a_failure() -> None:
    error = ExchangeError(
        "the all-to-all of expert-parallel ranks",
        [2, 3],
        [3],
        "[/x/pair.cc:5] Connection closed by peer [10.0.0.1]:5. This is typically caused by a remote worker crashing",
    )
    wrapped = RuntimeError("while training")
    wrapped.__cause__ = error
    found = failed_collective(wrapped)
    assert found is not None
    assert (found.ranks, found.peers, found.reason) == ([2, 3], [3], "Connection closed by peer [10.0.0.1]:5")
    second = failed_collective(ExchangeError("an exchange", [0, 1], [1], "Application timeout caused pair closure"))
    assert second is not None
    assert second.reason == "timed out, as another exchange with the same rank did just before"
    assert failed_collective(RuntimeError("shape '[2]' is invalid")) is None
    assert failed_collective(ValueError("timed out")) is None
    assert failed_collective(RuntimeError("DataLoader timed out after 9 seconds")) is None, "its workers hang"


class OtherBytes(Tokenizer):
    """As many ids as ByteTokenizer, with other meanings."""

    name = "ByteTokenizer"

    def __init__(self) -> None:
        self.vocab_size, self.eod = 257, 256
        self._describe([b"latin-1"])

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("latin-1")


def build_with_differences(directory: str) -> list[str]:
    """The errors of data sets that differ between ranks in content, then in vocabulary, and in nothing else."""
    rank, errors = dist.get_rank(), []
    for difference in ("content", "vocabulary"):
        os.makedirs(f"{directory}/{difference}{rank}", exist_ok=True)
        os.chdir(f"{directory}/{difference}{rank}")
        first = rank if difference == "content" else 0
        write_indexed_dataset("data", [[first + token for token in range(200)]] * 20, 257)
        tokenizer = OtherBytes() if difference == "vocabulary" and rank == 1 else ByteTokenizer()
        with pytest.raises(ValueError) as raised:
            build_datasets(DataSettings(("data",), "8,1,1", 16, 1, tokenizer), 8, 0, 0)
        errors.append(str(raised.value))
    return errors


def test_ranks_with_other_data_or_vocabulary(tmp_path: Path) -> None:
    for content, vocabulary in run_distributed(build_with_differences, 2, str(tmp_path)):
        assert content.startswith("the training data differs between ranks") and "rank 1:" in content
        assert vocabulary.startswith("the tokenizer differs between ranks") and "rank 1:" in vocabulary
