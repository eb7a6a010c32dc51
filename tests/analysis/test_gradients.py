"""Norms and signal-to-noise ratios of gradients against all micro-batches' gradients kept side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scmoe_ds.analysis import figures
from scmoe_ds.analysis.gradients import GradientSums, Group, measure, parameter_groups
from scmoe_ds.analysis.tokens import TokenSequences
from scmoe_ds.engine import connect
from scmoe_ds.errors import AnalysisError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import analyze as analyze_program
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(4, 16, 2, 384, 32)
SECTIONS: dict[str, dict[str, Any]] = {
    "scmoe": {},
    "post norm": {"post_norm": True, "merge": "cg2"},
    "topk": {"architecture": "topk"},
    "shared_expert": {"architecture": "shared_expert"},
    "dgmoe": {"architecture": "dgmoe"},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    streams = [torch.randint(384, (2, 17), generator=generator) for _ in range(count)]
    return [(stream[:, :-1], stream[:, 1:]) for stream in streams]


def flat_gradients(model: GPT, words: list[str]) -> Tensor:
    """All gradients of parameters whose name has one of these words, in one vector."""
    found = [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
        if any(word in name for word in words)
    ]
    return torch.cat([gradient.flatten() for gradient in found]).double()


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_against_all_gradients(section: dict[str, Any]) -> None:
    model = whole_model(SETTINGS, {"num_experts": 4, **section})
    data = batches(5)
    found = measure(model, data)
    residual = section.get("architecture", "scmoe") in ("scmoe", "shared_expert")
    routed = [".experts.", "shortcut_norm"] + ([] if residual else [f"runs.{run}.blocks.1.mlp_norm" for run in (0, 1)])
    words = {
        "attention": [".attention.", ".attention_norm."],
        "MLP": [".blocks.0.mlp."] + [f"runs.{run}.blocks.0.mlp_norm" for run in (0, 1)],
        "routed experts": routed,
        "gate": [".gate."],
        "embedding and head": ["embedding", "positions", "final_norm", "head."],
    }
    if residual:
        words["shared expert"] = [".moe.mlp."] + [f"runs.{run}.blocks.1.mlp_norm" for run in (0, 1)]
        words["merge"] = [".coefficient.", ".post_norm."]
    assert found["branches"].keys() == words.keys() and found["noise_floor"] == 0.25
    kept: dict[str, list[Tensor]] = {name: [] for name in (*words, "block 1 of run 1's gate")}
    for tokens, labels in data:
        model.zero_grad()
        model(tokens, labels=labels).loss.backward()
        for name in words:
            kept[name].append(flat_gradients(model, words[name]))
        kept["block 1 of run 1's gate"].append(flat_gradients(model, ["runs.1.blocks.1.moe.deepspeed_moe.gate"]))
    results = {
        **found["branches"],
        "block 1 of run 1's gate": next(
            each for each in found["sub_layers"] if (each["block"], each["branch"]) == (3, "gate")
        ),
    }
    for name, vectors in kept.items():
        gradient_KP = torch.stack(vectors)
        mean_P = gradient_KP.mean(0)
        snr = mean_P.square().sum() / (gradient_KP - mean_P).square().sum(1).mean()
        assert results[name]["norm"] == pytest.approx(float(gradient_KP.norm(dim=1).mean()), rel=1e-6), name
        assert results[name]["snr"] == pytest.approx(float(snr), rel=1e-6), name


def test_every_parameter_is_in_one_group() -> None:
    model = whole_model(SETTINGS, {"num_experts": 4})
    groups = parameter_groups(model)
    members = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    assert Group("routed experts", 3) in groups and Group("MLP", 0) in groups and Group("MLP", 1) not in groups


def test_noise_alone_is_at_the_floor() -> None:
    weight = torch.nn.Parameter(torch.zeros(20_000))
    sums = GradientSums({Group("gate", 0): [weight]})
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        weight.grad = torch.randn(20_000, generator=generator)
        sums.add()
    record = sums.record()
    assert record["branches"]["gate"]["snr"] == pytest.approx(record["noise_floor"], rel=0.05)


def test_gradients_that_say_nothing() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    sums = GradientSums({Group("gate", 2): [weight]})
    sums.add()
    with pytest.raises(AnalysisError, match="needs at least 2"):
        sums.record()
    sums.add()
    assert sums.record()["branches"]["gate"] == {"norm": 0.0, "snr": None}
    weight.grad = torch.tensor([1.0, torch.nan, 0])
    with pytest.raises(AnalysisError, match="gradient of the gate of block 2 is not finite in micro-batch 2"):
        sums.add()


def test_labels_are_the_next_tokens() -> None:
    sequences = TokenSequences(np.arange(25, dtype=np.uint16), 4, None, "numbers")
    found = list(sequences.labelled_batches(2, 3))
    assert [tokens.flatten().tolist() for tokens, _ in found] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]
    assert all(torch.equal(labels, tokens + 1) for tokens, labels in found)
    with pytest.raises(AnalysisError, match="numbers has 3 micro-batches of 2 sequences of 4 tokens, but 4"):
        list(sequences.labelled_batches(2, 4))
    with pytest.raises(AnalysisError, match="has 2 micro-batches"):  # the last label is missing
        list(TokenSequences(np.arange(24), 4, None, "numbers").labelled_batches(2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("gradients")
    (directory / "text.txt").write_text("gradients point uphill; " * 20)
    for name in ("scmoe", "topk"):
        model = whole_model(SETTINGS, {"num_experts": 4, "architecture": name}, std=0.1)
        write_export(directory / name, model)
        for iteration in (5, 20):  # exports in the place of checkpoints, whose files take longer to write
            write_export(directory / f"{name}_run" / f"global_step{iteration}", model)
            model.embedding.weight.data *= 2
    return str(directory)


def run(files: str, *flags: str) -> int:
    return analyze_program.main(["gradients", *(flag.replace("DIR", files) for flag in flags)])


ON_TEXT = ("--text-file", "DIR/text.txt", "--seq-length", "16", "--batch-size", "2", "--micro-batches", "4")


@pytest.mark.slow
def test_program(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--load", "DIR/scmoe", "--load", "DIR/topk", "--output", "DIR/a.json")
    assert run(files, *ON_TEXT, *flags) == 0
    out = capsys.readouterr().out
    assert "scmoe (scmoe pos2): shared expert: gradient norm" in out and "topk (topk): gate: gradient norm" in out
    record = json.loads((Path(files) / "a.json").read_text())
    first, second = record["checkpoints"]
    assert "shared expert" in first["branches"] and "shared expert" not in second["branches"]
    tokens = torch.tensor(list((Path(files) / "text.txt").read_bytes()))[:129]
    data = [(tokens[i : i + 32].view(2, 16), tokens[i + 1 : i + 33].view(2, 16)) for i in range(0, 128, 32)]
    expected = measure(whole_model(SETTINGS, {"num_experts": 4}, std=0.1), data)
    assert first["branches"]["gate"]["snr"] == pytest.approx(expected["branches"]["gate"]["snr"], rel=1e-4)
    picture = Path(files) / "a.png"
    before = picture.read_bytes()
    picture.unlink()
    assert run(files, "--from-json", "DIR/a.json") == 0
    assert picture.read_bytes() == before


@pytest.mark.slow
def test_signal_to_noise_over_steps(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--load", "DIR/scmoe_run", "--load", "DIR/topk_run", "--all-checkpoints", "--output", "DIR/steps.json")
    assert run(files, *ON_TEXT, *flags) == 0
    assert "topk_run (topk) at iteration 20: gate: gradient norm" in capsys.readouterr().out
    found = json.loads((Path(files) / "steps.json").read_text())["checkpoints"]
    assert [(each["architecture"], each["iteration"]) for each in found] == [
        ("scmoe", 5),
        ("scmoe", 20),
        ("topk", 5),
        ("topk", 20),
    ]
    assert found[0]["label"] == found[1]["label"] != found[2]["label"]
    assert run(files, *ON_TEXT, "--load", "DIR/scmoe_run/global_step20", "--output", "DIR/one.json") == 0
    (alone,) = json.loads((Path(files) / "one.json").read_text())["checkpoints"]
    assert alone["branches"] == found[1]["branches"] != found[0]["branches"]
    # A column for each run: norm above signal-to-noise ratio, a line per branch and the noise floor.
    drawn = figures.gradients(json.loads((Path(files) / "steps.json").read_text()))
    assert len(drawn.axes) == 4 and len(drawn.axes[3].lines) == 8
    assert list(drawn.axes[0].lines[0].get_ydata()) == [each["branches"]["attention"]["norm"] for each in found[:2]]


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((*ON_TEXT, "--output", "DIR/no.json"), "--load is missing"),
    "one micro-batch": ((*ON_TEXT, "--micro-batches", "1"), "--micro-batches 1: noise is between at least 2"),
    "too little text": (
        (*ON_TEXT, "--load", "DIR/topk", "--output", "DIR/no.json", "--micro-batches", "16"),
        "has 14 micro-batches of 2 sequences of 16 tokens, but 16 are asked for",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, files: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    assert run(files, *flags) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("error: ") == 1 and "Traceback" not in errors
    assert not (Path(files) / "no.json").exists()
