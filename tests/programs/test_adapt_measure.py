"""scmoe adapt --measure: its losses against exports with that layer alone converted, its similarity against scmoe
analyze, its choice against all sets, and what a user can get wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scmoe_ds.engine import connect
from scmoe_ds.inference.load import load_trained
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import adapt, analyze
from scmoe_ds.programs import evaluate as evaluate_program
from tests.analysis.test_feasibility import entry
from tests.helpers.exports import whole_model, write_export

TEXT = "def similarity(a, b):\n    return a @ b / (norm(a) * norm(b))\n" * 4
SETTINGS = GPTSettings(num_layers=6, hidden_size=16, num_attention_heads=2, vocab_size=257, max_position_embeddings=32)
TOP2 = {"architecture": "topk", "num_experts": 4, "top_k": 2, "moe_every": 2}
IDENTITY = {"num_layers": 6, "hidden_size": 16, "moe_blocks": [1, 3, 5], "num_experts": [4, 4, 4]}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measure")
    (directory / "text.txt").write_text(TEXT)
    (directory / "short.txt").write_text("short")
    write_export(directory / "top2", trained())
    entries = [{**entry("mlp", "attention", "shared"), "identity": IDENTITY}]
    (directory / "times.json").write_text(json.dumps(entries))
    (directory / "alone.json").write_text(json.dumps([{**entry("shared"), "identity": IDENTITY}]))
    other = {**IDENTITY, "hidden_size": 32}
    (directory / "other.json").write_text(json.dumps([{**entries[0], "identity": other}]))
    return directory


def trained() -> GPT:
    """A model that has learnt the text a bit, so that another input of the experts costs something."""
    model = whole_model(SETTINGS, TOP2, std=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor(list(TEXT.encode()[:225])).view(1, -1)
    inputs, labels = tokens[:, :-1].view(7, 32), tokens[:, 1:].reshape(7, 32)
    for _ in range(60):
        loss = model(inputs, labels=labels).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def measured(files: Path, out: Path, *flags: object) -> dict[str, Any]:
    words = [files / "top2", "--measure", files / "text.txt", "--output-prefix", out / "costs", *flags]
    assert adapt.main(list(map(str, words))) == 0
    assert {each.suffix for each in out.glob("costs.*")} == {".json", ".md", ".html", ".png"}
    found: dict[str, Any] = json.loads((out / "costs.json").read_text())
    return found


def evaluated(model: Path, files: Path, out: Path) -> float:
    flags = ["--load", model, "--text-file", files / "text.txt", "--stride", 32, "--output", out / "loss.json"]
    assert evaluate_program.main(list(map(str, flags))) == 0
    return float(json.loads((out / "loss.json").read_text())["results"]["loss"])


@torch.no_grad()
def plain_loss(model: Path) -> float:
    """The same by whole passes over each window: the text's 244 tokens are 7 of 32 and one of 20 more."""
    gpt, tokens, nats = load_trained(model).model, [256, *TEXT.encode()], 0.0
    for first in range(0, len(tokens) - 1, 32):
        stop = min(first + 32, len(tokens) - 1)
        begin = max(stop - 32, 0)
        logits = gpt(torch.tensor([tokens[begin:stop]])).logits
        assert logits is not None
        labels = torch.tensor(tokens[first + 1 : stop + 1])
        nats += float(F.cross_entropy(logits[0, first - begin :].double(), labels, reduction="sum"))
    return nats / (len(tokens) - 1)


def converted(files: Path, out: Path, *flags: object) -> Path:
    target = out / f"student{len(list(out.glob('student*')))}"
    assert adapt.main(list(map(str, [files / "top2", "--output", target, *flags]))) == 0
    return target


@pytest.fixture(scope="module")
def record(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(files, tmp_path_factory.mktemp("all"))


def test_losses_are_the_exported_models(files: Path, record: dict[str, Any], tmp_path: Path) -> None:
    assert record["loss"] == pytest.approx(evaluated(files / "top2", files, tmp_path), abs=1e-6)
    assert {(way["position"], way["join"]) for way in record["ways"]} == set(
        itertools.product(("pos1", "pos2", "pos3"), ("end", "late"))
    )
    losses = set()
    for way, layers in (
        (("pos1", "end"), [0]),
        (("pos2", "late"), [1]),
        (("pos3", "late"), [2]),
        (("pos2", "end"), "all"),
    ):
        flags = ["--position", way[0], "--join", way[1]]
        if layers != "all":
            flags += ["--layers", *layers]
        found = next(each for each in record["ways"] if (each["position"], each["join"]) == way)
        loss = found["all"]["loss"] if layers == "all" else found["layers"][layers[0]]["loss"]
        assert loss == pytest.approx(evaluated(converted(files, tmp_path, *flags), files, tmp_path), abs=1e-6)
        losses.add(round(loss, 7))
    assert len(losses) == 4 and record["loss"] not in losses


def test_similarity_is_that_of_scmoe_analyze(files: Path, record: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "similarity.json"
    flags = ["similarity", "--load", files / "top2", "--text-file", files / "text.txt", "--output", out]
    assert analyze.main(list(map(str, flags))) == 0
    verdict = json.loads(out.read_text())["verdict"]
    for way in record["ways"]:
        cosines = [each["cosine"] for each in verdict["positions"][way["position"]]["layers"]]
        assert [each["cosine"] for each in way["layers"]] == pytest.approx(cosines)
        assert way["most_similar"] == sorted(range(3), key=lambda layer: -cosines[layer])


def test_choice_against_all_sets(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 sets at one position; what they save is as in test_times_of_a_layer, late."""
    flags = ["--position", "pos2", "--join", "late", "--top-k", 1]
    sets = [layers for size in range(1, 4) for layers in itertools.combinations(range(3), size)]
    losses = {layers: plain_loss(converted(files, tmp_path, *flags, "--layers", *layers)) for layers in sets}
    source = plain_loss(files / "top2")
    budget = sorted(losses.values())[3] / source - 1 + 1e-9
    assert budget > 0
    saved = {
        layers: sum(37 if each < 2 else 36 for each in layers)
        for layers, loss in losses.items()
        if loss <= source * (1 + budget)
    }
    capsys.readouterr()
    flags += ["--calibration", files / "times.json", "--max-loss-increase", f"{budget}"]
    found = measured(files, tmp_path, *flags, "--output", tmp_path / "chosen")
    choice = found["choice"]
    layers = tuple(sorted(choice["layers"]))
    assert choice["saved_ms"] == pytest.approx(max(saved.values())) == pytest.approx(saved[layers])
    assert choice["loss"] == pytest.approx(losses[layers], abs=1e-6)
    assert plain_loss(tmp_path / "chosen") == pytest.approx(choice["loss"], abs=1e-6)
    singles = {each["layer"]: each["increase"] for each in found["ways"][0]["layers"]}
    assert choice["summed"] == pytest.approx(source + sum(singles[each] for each in layers), abs=1e-6)
    out = capsys.readouterr().out
    assert "the single increases add up to" in out and "saves" in out


def test_most_similar_layers(files: Path, record: dict[str, Any], tmp_path: Path) -> None:
    flags = ["--measure", files / "text.txt", "--most-similar", 2, "--position", "pos2", "--join", "late"]
    target = converted(files, tmp_path, *flags)
    section = json.loads((target / "config.json").read_text())["scmoe"]
    way = next(each for each in record["ways"] if each["position"] == "pos2")
    assert sorted(section["adapt"]["layers"]) == sorted(way["most_similar"][:2])


def test_without_times_the_columns_are_left_out(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [files / "top2", "--measure", files / "text.txt", "--position", "pos2", "--join", "end"]
    assert adapt.main(list(map(str, [*flags, "--calibration", files / "alone.json"]))) == 0
    out = capsys.readouterr().out
    assert "not timed: attention" in out
    assert "No times are known" in out and "ms saved" not in out and "hidden" not in out


_BUSIEST = ["--shared-expert", "busiest", "--text-file", "no such text"]


def test_what_a_user_can_get_wrong(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = files / "top2", ["--measure", files / "text.txt"]
    times = ["--calibration", files / "times.json", "--position", "pos2", "--join", "end"]
    for words, rule in (
        ([source, "--measure", files / "short.txt"], "short.txt has 5 tokens, less than one window of 32"),
        ([source, "--measure", files / "no.txt"], "no.txt"),
        ([source, *text, "--seq-length", 64], "--seq-length 64 exceeds the model's context of 32 tokens"),
        (
            [source, *text, "--min-hidden", "80%"],
            "--min-hidden 0.8: needs measured times. None are known. Without them",
        ),
        (
            [source, *text, *times, "--min-hidden", "99%"],
            "no layers and position keep to it; the nearest is MoE layers",
        ),
        ([source, *text, "--calibration", files / "other.json"], "is of another model (hidden_size 16 and 32)"),
        ([source, *text, "--most-similar", 4, "--position", "pos2"], "the model has 3 MoE layers; give 1 … 3"),
        ([source, *text, "--most-similar", 1, "--min-hidden", "1%"], "--most-similar chooses by similarity alone"),
        ([source, *text, "--output-prefix", files / "no" / "x"], "name files in a directory that is there"),
        ([source, "--output", files / "new", "--min-hidden", "80%"], "--min-hidden goes with --measure TEXT"),
        ([source], "--output is missing"),
        ([source, "--measure", files / "no"], f"--measure {files / 'no'} cannot be read as UTF-8 text"),
        ([source, *text, "--output", files], "is not empty; name another directory"),
        ([source, *text, "--shared-expert", "fit", "--text-file", "x"], "measure mean or busiest"),
        ([source, *text, *_BUSIEST, "--top-k", 99], "scmoe.top_k = 99: cannot exceed the number of experts"),
        ([source, *_BUSIEST, "--output", files / "new", "--layers", 99], "scmoe.adapt.layers = [99]: the model has"),
        ([source, *text, "--layers", 1], "--layers names the layers, which --measure"),
    ):
        assert adapt.main(list(map(str, words))) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1 and rule in errors[0], errors
    for value in ("much", "-1%", "200%"):
        with pytest.raises(SystemExit) as end:
            adapt.main([str(source), "--measure", "x", "--min-hidden", value])
        assert end.value.code == 2


def test_a_position_that_the_source_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An MoE in every block leaves Pos-1 alone."""
    every = GPTSettings(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=257, max_position_embeddings=8)
    write_export(tmp_path / "every", whole_model(every, {**TOP2, "moe_every": 1}))
    (tmp_path / "text.txt").write_text(TEXT[:40])
    flags = [str(tmp_path / "every"), "--measure", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "x")]
    assert adapt.main(flags) == 0
    assert {way["position"] for way in json.loads((tmp_path / "x.json").read_text())["ways"]} == {"pos1"}
    assert adapt.main([*flags, "--position", "pos2"]) == 2
    assert "with an MoE in every block (moe_every = 1)" in capsys.readouterr().err
