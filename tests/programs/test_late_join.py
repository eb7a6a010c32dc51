"""A GPT with a late join in what is done beside training it: it resumes, generates, and is analysed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scmoe_ds.analysis.probes import Capture, gpt_probes
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import offload_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap.executor import Activations
from scmoe_ds.programs import analyze
from tests.helpers.exports import greedy, whole_model, write_export
from tests.programs.test_bad_input import run

SETTINGS = GPTSettings(4, 16, 2, 384, 32)
PROMPTS = [[1, 2, 3], [5], [6] * 12]
SECTIONS: dict[str, dict[str, Any]] = {
    "two on the way": {"moe_every": 1, "position": "pos1", "top_k": 2},
    "pos3": {"position": "pos3", "merge": "cg2"},
    "dgmoe, shared": {"architecture": "dgmoe", "pairs_per_moe": 2},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.mark.parametrize("name", SECTIONS)
def test_text_with_a_cache_and_with_experts_in_files(name: str, tmp_path: Path) -> None:
    """Against whole forward passes of a model that has no cache."""
    reference = whole_model(SETTINGS, {"num_experts": 4, "join": "late", **SECTIONS[name]})
    trained = TrainedModel.open(write_export(tmp_path / "export", reference))
    expected = [greedy(reference, prompt, 8)[0] for prompt in PROMPTS]
    device, dtype = torch.device("cpu"), torch.float32
    for mode, places in (("resident", 0), ("offload", 1), ("offload-async", 3)):

        def offload(model: GPT, mode: str = mode, places: int = places) -> None:
            offload_experts(model, trained, mode, places, dtype, device)

        taken_over = None if mode == "resident" else offload
        model = load_model(trained, serving_config(trained.config), dtype, device, taken_over)
        found = TextGenerator(model, batch_size=2).generate(PROMPTS, Request(8, Sampling(temperature=0)))
        assert [completion.tokens for completion in found] == expected, mode


def test_what_an_analysis_picks_up() -> None:
    """The stream behind a pair, which does not have its routed output yet; behind the last one it has."""
    model = whole_model(SETTINGS, {"num_experts": 4, "join": "late"})
    tokens = torch.randint(384, (2, 12), generator=torch.Generator().manual_seed(1))
    probes = gpt_probes(model)
    with torch.no_grad(), Capture(probes) as capture:
        last = model.hidden_states(tokens)
        values = {probe.representation.name: value for probe, value in zip(probes, capture.take(), strict=True)}
        first, second = model.runs
        behind = first(values["input"])
        assert torch.equal(behind.hidden, values["block 1 MoE"]) and behind.late is not None
        attended = second.blocks[0].attend(Activations(behind.hidden)).hidden
        assert not torch.equal(values["block 2 attention"], attended), "the routed output has joined"
        assert torch.equal(values["block 2 attention"], behind.late(Activations(attended)).hidden)
    assert torch.equal(model.final_norm(values["block 3 MoE"]), model.final_norm(last))


def test_an_analysis_says_which_join_a_model_has(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for join in ("end", "late"):
        write_export(tmp_path / join, whole_model(SETTINGS, {"num_experts": 4, "join": join}))
    (tmp_path / "text.txt").write_text("gradients point uphill; " * 9)
    loads = ["--load", str(tmp_path / "end"), "--load", str(tmp_path / "late")]
    text = [
        "--text-file",
        str(tmp_path / "text.txt"),
        "--seq-length",
        "16",
        "--batch-size",
        "2",
        "--micro-batches",
        "2",
    ]
    assert analyze.main(["gradients", *loads, *text, "--output", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/late (scmoe pos2 late join): attention" in out and f"{tmp_path}/end (scmoe pos2): " in out


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    documents = [np.random.default_rng(0).integers(0, 256, 300).tolist() for _ in range(20)]
    data = write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix
    flags = {"--num-layers": "4", "--train-iters": "3", "--log-interval": "1"}
    whole, again = tmp_path / "whole", tmp_path / "again"
    changes = {"scmoe.join": "late"}
    assert run(tmp_path, data, changes, {**flags, "--save": str(whole), "--save-interval": "2"}) == 0
    (whole / "latest").write_text("global_step2")
    assert run(tmp_path, data, changes, {**flags, "--load": str(whole), "--save": str(again)}) == 0
    assert losses(again) == losses(whole)[2:]


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
