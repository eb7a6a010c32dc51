"""Choices of gates against a loop over tokens, drops against DeepSpeed's own gate, and the monitor of a training run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from scmoe_ds.analysis.gating import SCALARS, gate_layers, measure
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import AnalysisError
from scmoe_ds.inference.model import serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.gate import route
from scmoe_ds.programs import analyze as analyze_program
from tests.helpers.by_hand import gpt_by_hand
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(4, 16, 2, 384, 32)
SECTIONS: dict[str, dict[str, Any]] = {
    "pos1": {"position": "pos1"},
    "pos2, then pos1": {"first_layer_position": "pos1"},
    "pos3, shared norm": {"position": "pos3", "shortcut_norm": "shared"},
    "pos2, shared norm": {"shortcut_norm": "shared"},
    "every block": {"moe_every": 1, "position": "pos1", "top_k": 2},
    "topk": {"architecture": "topk"},
    "topk, every block": {"architecture": "topk", "moe_every": 1},
    "shared_expert": {"architecture": "shared_expert"},
    "dgmoe": {"architecture": "dgmoe"},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def section(**fields: Any) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed(
        {"scmoe": {"num_experts": 4, "capacity_factor": 0.75, "min_capacity": 1, **fields}}
    )


def serving(trained: ScMoEConfig, seed: int = 3, placement: str = "pre") -> GPT:
    model = GPT(replace(SETTINGS, norm_placement=placement), serving_config(trained))
    initialize_parameters(model, seed, 0.5, 4)
    return model.eval()


def with_norms(trained: ScMoEConfig, placement: str = "pre") -> GPT:
    """`serving`, with norms that can be told apart."""
    model, generator = serving(trained, placement=placement), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tokens_of(number: int) -> Tensor:
    return torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(number))


def representations(model: GPT, tokens: Tensor) -> list[Tensor]:
    """[T, D] before the first block, and behind every attention and MLP or MoE."""
    return [value.flatten(0, 1) for value in gpt_by_hand(model, tokens)]


def ends(model: GPT, trained: ScMoEConfig, layer: int, values: list[Tensor]) -> tuple[Tensor, Tensor, Any]:
    """Both normalised representations of an MoE layer, written out for each position, and the layer."""
    run: Any = model.runs[layer]
    block = (layer + 1) * trained.moe_every - 1
    position = (trained.first_layer_position if layer == 0 else None) or trained.position
    if trained.moe_every == 1:
        position = "pos1"
    blocks: list[Any] = [each for every in model.runs for each in cast(Any, every).blocks]
    tap, norm = {
        "pos1": (2 * block, blocks[block].attention_norm),
        "pos2": (2 * block - 1, blocks[block - 1].mlp_norm),
        "pos3": (2 * block - 2, blocks[block - 1].attention_norm),
    }[position]
    post = model.settings.norm_placement == "post"  # there, all representations are normalised already
    if trained.has_shortcut and trained.shortcut_norm == "own":
        norm = run.shortcut_norm
    elif post:
        norm = torch.nn.Identity()
    current = values[2 * block + 1]
    return norm(values[tap]), current if post else blocks[block].mlp_norm(current), blocks[block].moe


def by_hand(model: GPT, trained: ScMoEConfig, layer: int, batches: list[Tensor]) -> dict[str, Any]:
    """Figure 9's numbers, one token at a time."""
    sums = dict.fromkeys(SCALARS, 0.0)
    counts, tokens, dropped = torch.zeros(4), 0, 0
    for batch in batches:
        first, second, moe = ends(model, trained, layer, representations(model, batch))
        weight = moe.deepspeed_moe.gate.wg.weight
        chosen: list[list[list[int]]] = [[]]
        for a, b in zip(first, second, strict=True):
            scores_a, scores_b = (weight @ a).softmax(0).tolist(), (weight @ b).softmax(0).tolist()
            ranked_a, ranked_b = (sorted(range(4), key=lambda e, s=scores: -s[e]) for scores in (scores_a, scores_b))  # type: ignore[misc]
            sums["same_expert_share"] += ranked_a[0] == ranked_b[0]
            other = ranked_b[0]
            if trained.architecture == "dgmoe":
                other = next(expert for expert in ranked_b if expert != ranked_a[0])
                chosen = chosen if len(chosen) == 2 else [[], []]
                chosen[0].append([ranked_a[0]])
                chosen[1].append([other])
            else:
                read = ranked_a if trained.architecture == "scmoe" else ranked_b
                chosen[0].append(read[: int(trained.top_k)])
            sums["preceding_score"] += scores_a[ranked_a[0]]
            sums["current_score"] += scores_b[other]
            a, b = a.double(), b.double()
            sums["cosine"] += float(a @ b / (a.norm() * b.norm()))
            sums["l2"] += float((a - b).norm())
            tokens += 1
        for part in chosen:
            k = len(part[0])
            capacity = max(math.ceil(len(part) / 4 * 0.75 * k), 1)
            for expert in range(4):
                count = sum(expert in each for each in part)
                counts[expert] += count
                dropped += max(count - capacity, 0)
    result: dict[str, Any] = {name: value / tokens for name, value in sums.items()}
    shares = (counts / counts.sum()).tolist()
    result["load"], result["load_max_over_mean"] = shares, max(shares) * 4
    result["load_entropy"] = -sum(share * math.log(share) for share in shares if share)
    result["drop_rate"] = dropped / float(counts.sum())
    return result


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("fields", SECTIONS.values(), ids=SECTIONS.keys())
def test_against_a_loop(fields: dict[str, Any], placement: str) -> None:
    trained = section(**fields)
    model = with_norms(trained, placement)
    batches = [tokens_of(1), tokens_of(2)]
    found = measure(model, trained, model.hidden_states, batches)
    assert [layer["block"] for layer in found] == ([1, 3] if trained.moe_every == 2 else [0, 1, 2, 3])
    for number, layer in enumerate(found):
        with torch.no_grad():
            expected = by_hand(model, trained, number, batches)
        for name in SCALARS:
            assert layer[name] == pytest.approx(expected[name], abs=1e-6, rel=1e-6), name
        assert layer["load"] == pytest.approx(expected["load"], abs=1e-6)
    assert any(layer["drop_rate"] for layer in found)


def test_names_of_the_ends() -> None:
    trained = section(first_layer_position="pos3", position="pos1")
    layers = gate_layers(serving(trained), trained)
    assert [(each.preceding.representation.name, each.current.representation.name) for each in layers] == [
        ("input", "block 1 attention"),
        ("block 2 MLP", "block 3 attention"),
    ]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_drops_are_those_of_the_gate(k: int) -> None:
    """What the record counts against the choices that DeepSpeed's gate marks as dropped, in training."""
    trained = section(top_k=k, use_rts=False)
    model = with_norms(trained)
    (layer, *_) = measure(model, trained, model.hidden_states, [tokens_of(5)])
    with torch.no_grad():
        first, _, moe = ends(model, trained, 0, representations(model, tokens_of(5)))
        gate = moe.deepspeed_moe.gate
        gate.capacity_factor, gate.min_capacity, gate.drop_tokens = 0.75, 1, True
        routing = route(gate.train(), first)
    assert layer["drop_rate"] == pytest.approx(float((routing.expert_KT < 0).sum()) / routing.expert_KT.numel())
    assert layer["load"] == pytest.approx((routing.exp_counts / routing.exp_counts.sum()).tolist())
    free = measure(model, section(top_k=k, drop_tokens=False), model.hidden_states, [tokens_of(5)])
    assert free[0]["drop_rate"] == 0


def test_what_has_no_gate() -> None:
    with pytest.raises(AnalysisError, match="no MoE layers with at least two experts"):
        gate_layers(torch.nn.Linear(2, 2), section())
    model = whole_model(SETTINGS, {"num_experts": 1})
    with pytest.raises(AnalysisError, match="no MoE layers with at least two experts"):
        gate_layers(model, model.config)


# --- the program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("gating")
    (directory / "text.txt").write_text("a gate chooses experts for tokens; " * 8)
    (directory / "empty").mkdir()
    write_export(directory / "one", whole_model(SETTINGS, {"num_experts": 1}))
    for iteration in (5, 20, 100):  # exports in the place of checkpoints, whose files take longer to write
        model = whole_model(SETTINGS, {"num_experts": 4}, seed=iteration)
        write_export(directory / "run" / f"global_step{iteration}", model, drop_tokens=True, capacity_factor=0.5)
    with torch.no_grad():
        model.embedding.weight[ord("a")] = torch.nan
    write_export(directory / "nan", model)
    return str(directory)


def run(files: str, *flags: str) -> int:
    return analyze_program.main(["gating", *(flag.replace("DIR", files) for flag in flags)])


@pytest.mark.slow
def test_program(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(files)
    common = ("--text-file", "DIR/text.txt", "--seq-length", "16", "--batch-size", "4", "--max-tokens", "128")
    assert run(files, *common, "--load", "DIR/run", "--all-checkpoints", "--output", "DIR/all.json") == 0
    out = capsys.readouterr().out
    assert "global_step20, MoE of block 3 (block 2 attention / block 3 attention): same expert" in out
    record = json.loads((directory / "all.json").read_text())
    assert [each["iteration"] for each in record["checkpoints"]] == [5, 20, 100]
    assert all(each["tokens"] == 128 and each["capacity_factor"] == 0.5 for each in record["checkpoints"])
    assert record["checkpoints"][0]["layers"][0]["drop_rate"] > 0
    assert run(files, *common, "--load", "DIR/run/global_step20", "--output", "DIR/single.json") == 0
    single = json.loads((directory / "single.json").read_text())["checkpoints"]
    assert single == [record["checkpoints"][1]]
    for name in ("all", "single"):
        picture = directory / f"{name}.png"
        before = picture.read_bytes()
        picture.unlink()
        assert run(files, "--from-json", f"DIR/{name}.json") == 0
        assert picture.read_bytes() == before


ON_TEXT = ("--text-file", "DIR/text.txt", "--output", "DIR/never.json")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (ON_TEXT, "--load is missing"),
    "one expert": ((*ON_TEXT, "--load", "DIR/one"), "no MoE layers with at least two experts"),
    "no checkpoints": ((*ON_TEXT, "--load", "DIR/empty", "--all-checkpoints"), "there is no global_step* in --load"),
    "not finite": ((*ON_TEXT, "--load", "DIR/nan"), "batch 0: block 0 attention is not finite behind its norm"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, files: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    assert run(files, *flags) == 2
    errors = capsys.readouterr().err
    assert f"scmoe analyze: error: {message}" in errors or message in errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    assert not (Path(files) / "never.json").exists()
