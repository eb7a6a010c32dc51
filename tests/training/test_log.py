"""The lines, the record and the monitors of a run; one process."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scmoe_ds
from lab import training_log
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.build import build_moe
from scmoe_ds.moe.capacity import dropped_choices
from scmoe_ds.moe.gate import route
from scmoe_ds.programs import pretrain_gpt, pretrain_swin
from scmoe_ds.training.progress import Progress
from scmoe_ds.training.record import read_record
from scmoe_ds.training.start_text import parameters_of, state_bytes
from scmoe_ds.training.step_text import duration, number, rounded, step_line
from scmoe_ds.training.utilization import peak_tflops

FLAGS = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --split 90,10,0 --data-path data "
    "--deepspeed_config ds.json --train-iters 4 --log-interval 2 --eval-iters 1 "
    "--make-vocab-size-divisible-by 1 --save run"
)


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with data and a JSON, to work in."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_indexed_dataset("data", (rng.integers(0, 256, 40) for _ in range(50)), 257)
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "job"},
        "scmoe": {"num_experts": 4, "capacity_factor": 0.5, "min_capacity": 1},
    }
    Path("ds.json").write_text(json.dumps(whole))
    return tmp_path


def test_start_line_record_and_monitors_agree(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain_gpt.main(FLAGS.split()) == 0
    text, run = capfd.readouterr().out, read_record("run")
    lines = [line for line in text.splitlines() if line.startswith("iter ")]
    assert [line[:9] for line in lines] == ["iter 1/4 ", "iter 2/4 ", "iter 4/4 "] and list(run.steps) == [1, 2, 4]
    assert all(80 <= len(line) <= 120 for line in lines), lines
    for iteration, printed in training_log.steps(text).items():
        entry = run.steps[iteration]
        assert printed["loss"] == f"{entry['lm_loss']:.3f}" and float(printed["lr"]) == entry["learning_rate"]
        assert float(printed["grad"]) == pytest.approx(entry["grad_norm"], rel=1e-3)
        # 6 sequences of 8 tokens; TFLOP/s is three forward passes of the formula.
        assert entry["tokens_per_second"] == pytest.approx(48 / entry["seconds_per_iteration"])
        assert 0.3 < entry["drop_rate"] < 0.8 and "hidden" not in entry, "one rank exchanges nothing"
        assert np.shape(entry["expert_load"]) == (2, 4) and np.sum(entry["expert_load"], 1) == pytest.approx(1)
    assert training_log.validations(text) == {4: f"{run.validations[4]['lm_loss']:.3f}"}
    known = {name for name, value in run.steps[4].items() if isinstance(value, (int, float))}
    files = {path.stem.removeprefix("Train_") for path in Path("csv/job").glob("Train_*.csv")}
    assert known - {"iteration", "time", "consumed_samples"} <= files
    rows = [line.split(",") for line in Path("csv/job/Train_tflops.csv").read_text().splitlines()[1:]]
    assert [float(value) for _, value in rows] == pytest.approx([entry["tflops"] for entry in run.steps.values()])


def test_the_start_says_what_is_trained(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain_gpt.main(FLAGS.split()) == 0
    text, facts = capfd.readouterr().out, read_record("run").start
    D, F, V, S = 16, 64, 257, 8  # bytes, and the end of a document
    attention, mlp, norm = 4 * D * D + 4 * D, 2 * D * F + D + F, 2 * D
    # Per pair: two attentions, an MLP, a shared expert, gate and coefficient, five norms (one of the shortcut).
    pair = 2 * attention + 2 * mlp + 4 * D + D + 1 + 5 * norm
    rest = V * D + S * D + norm
    assert facts["parameters"] == facts["rank_parameters"] == rest + 2 * (pair + 4 * mlp)
    assert facts["active_parameters"] == rest + 2 * (pair + mlp)
    assert (facts["samples_per_step"], facts["units_per_step"]) == (6, 48)
    assert facts["data_units"] == 45 * 40, "90 % of 50 documents of 40 tokens"
    assert facts["steps_per_epoch"] == 1800 / 48 and facts["epochs"] == 4 * 48 / 1800
    for part in (
        "training scmoe from iteration 0 to 4",
        "GPT scmoe pos2 cg1: 4 blocks of 16, vocabulary 257; 2 MoE layers of 4 experts, top-1",
        f"{rounded(facts['parameters'])} in all, {rounded(facts['active_parameters'])} active per token",
        "fp32, ZeRO stage 1, AdamW",
        "1 × CPU on 1 node: expert parallel 1 × expert data parallel 1; tensor parallel 1 × data parallel 1",
        "6 sequences, 48 tokens a step: 2 × 3 accumulated × 1 data-parallel ranks",
        "data: 1800 tokens, 37.5 steps an epoch; the run sees 10.7 % of an epoch",
        "checkpoints at the end and log.jsonl in run; CSV in csv/job",
    ):
        assert part in text, part


def test_precise_lines_have_all_digits(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain_gpt.main([*FLAGS.split(), "--log-precise"]) == 0
    text, run = capfd.readouterr().out, read_record("run")
    assert {i: float(loss) for i, loss in training_log.losses(text).items()} == {
        iteration: entry["lm_loss"] for iteration, entry in run.steps.items()
    }
    assert float(training_log.validations(text)[4]) == run.validations[4]["lm_loss"]


def test_images(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--deepspeed_config ds.json --dataset digits --img-size 8 --patch-dim 1 --window-size 4 --embed-dim 2 "
        "--depths 1 1 2 2 --num-heads 1 1 2 2 --num-classes 10 --num-channels 1 --train-iters 2 --save images"
    )
    assert pretrain_swin.main(flags.split()) == 0
    text, run = capfd.readouterr().out, read_record("images")
    assert "SwinV2-MoE scmoe pos2 cg1: 1-1-2-2 blocks from 2, 8 pixels; 2 MoE layers of 4 experts" in text
    assert "6 images a step" in text and "digits: " in text and " img/s " in text
    assert run.loss_name == "class_loss" and run.steps[2]["images_per_second"] > 0
    assert f"accuracy {100 * run.validations[2]['accuracy']:.2f} %" in text


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
def test_dropped_choices_are_those_that_the_gate_drops(k: int, factor: float) -> None:
    fields = {"num_experts": 5, "top_k": k, "capacity_factor": factor, "min_capacity": 2, "architecture": "scmoe"}
    config = ScMoEConfig.from_deepspeed({"scmoe": fields})
    gate = build_moe(config, 8, torch.nn.Linear(8, 8), 5).deepspeed_moe.gate.train()
    for tokens in (3, 17, 64):
        routing = route(gate, torch.randn(tokens, 8))
        assert dropped_choices(gate, routing.exp_counts) == (routing.expert_KT < 0).sum()


def test_numbers_and_times_as_people_read_them() -> None:
    assert [number(each) for each in (4.2170884, 12.5, 0.00123456, 1e-5, 0, 54321.9)] == [
        *("4.217", "12.50", "0.001235", "1e-05", "0", "5.432e+04")
    ]
    assert [rounded(each) for each in (3e-4, 2.9957e-5, 12345.6, 123456, 1.5e6, 7e9)] == [
        *("0.0003", "2.996e-05", "12346", "123.5k", "1.5M", "7G")
    ]
    assert [duration(each) for each in (0.4, 59, 61, 3600, 5025, 90061)] == [
        "0s",
        "59s",
        "1m01s",
        "1h00m",
        "1h23m",
        "1d01h",
    ]


def test_a_long_run_on_a_known_card_fits_the_line() -> None:
    values: dict[str, Any] = {
        "lm_loss": 2.2171, "learning_rate": 2.9957e-4, "grad_norm": 0.31416, "tokens_per_second": 2.34567e6,
        "tflops": 412.3, "mfu": 0.4169, "memory_gib": 61.27, "hidden": 0.9712, "skipped": 0, "seconds_left": 123456.0,
    }  # fmt: skip
    line = step_line(9000, 20000, "tokens", values)
    assert line == (
        "iter  9000/20000  loss 2.217  lr 0.0002996  grad 0.3142  2.346M tok/s  412 TFLOP/s  MFU 42 %  61.3 GiB  "
        "hidden 97 %  left 1d10h"
    )
    other = step_line(1, 2, "tokens", values | {"hidden": None, "mfu": None, "skipped": 3, "grad_norm": None})
    assert "grad –" in other and "hidden –" in other and "MFU" not in other and "skipped 3" in other


def test_peaks_by_the_names_that_torch_gives() -> None:
    half = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA A800-SXM4-80GB": 312,
        "NVIDIA A30": 165,
        "NVIDIA A40": 149.7,
        "NVIDIA A10G": 70,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H200": 989,
        "NVIDIA H20": 148,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 3090": 71,
        "NVIDIA GeForce RTX 3090 Ti": 80,
        "NVIDIA RTX 6000 Ada Generation": 364.2,
        "NVIDIA GeForce RTX 4080 SUPER": None,
        "NVIDIA GeForce RTX 3080 Laptop GPU": None,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "Some card of 2031": None,
    }
    assert {name: peak_tflops(name, torch.bfloat16) for name in half} == half
    v100 = "Tesla V100-SXM2-32GB"
    assert peak_tflops(v100, torch.bfloat16) is None and peak_tflops(v100, torch.float16) == 125
    assert [peak_tflops("NVIDIA A100-SXM4-80GB", torch.float32, tf32) for tf32 in (False, True)] == [19.5, 156]
    assert peak_tflops(v100, torch.float32, True) == 15.7


class Terminal(io.StringIO):
    """Shows what a terminal would: a carriage return goes back to the line's start, and what follows overwrites."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for piece in line.split("\r"):
                cells[: len(piece)] = piece
            shown.append("".join(cells).rstrip())
        return shown


def test_lines_stand_whole_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("a library")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(terminal)])
    with Progress(2, 6, terminal) as progress:
        for iteration in (3, 4, 5):
            progress.update()
            print(f"iter {iteration}", "loss", 4.0)
            logger.warning("a warning of %d", iteration)
        print("half a line", end="")
    print("the end")
    expected = [line for i in (3, 4, 5) for line in (f"iter {i} loss 4.0", f"a warning of {i}")]
    assert terminal.lines() == [*expected, "half a line", "the end", ""]
    assert "4/6" in terminal.getvalue() or "3/6" in terminal.getvalue(), "there was a bar"
    assert sys.stdout is terminal and logger.handlers[0].stream is terminal  # type: ignore[attr-defined]


def test_no_bar_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 2) as progress:
        progress.update()
        print("iter 1")
    assert capfd.readouterr() == ("iter 1\n", "")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_and_optimizer_states_take_what_the_start_says(precision: str, stage: int) -> None:
    whole = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "scmoe": {"num_experts": 4},
    }
    config = ScMoEConfig.from_deepspeed(whole)
    engine = scmoe_ds.initialize(model=GPT(GPTSettings(2, 32, 2, 64, 16), config), config=whole)[0]
    tokens = torch.randint(0, 64, (1, 16))
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    weights = list(engine.module.parameters())
    adam = engine.optimizer.optimizer
    held = weights + [each for group in adam.param_groups for each in group["params"]]
    held += [each for state in adam.state.values() for each in state.values() if each.ndim]
    total, _, own, experts = parameters_of(engine.module, 1)
    gradients = own * weights[0].element_size()
    expected = state_bytes(own - experts, experts, whole, 1, 1) - gradients
    assert total == own and sum(each.numel() * each.element_size() for each in held) == pytest.approx(
        expected, rel=0.02
    )
