"""Copies of hot experts on 4 ranks: the outputs and texts of one rank with all experts, and no further collective."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import Transport
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.copies import copy_experts, read_loads
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.copies import Costs
from scmoe_ds.parallel import tensor
from tests.helpers.exports import whole_model, write_export
from tests.helpers.settings import LLAMA

CPU = torch.device("cpu")
SECTIONS: dict[str, dict[str, Any]] = {
    "top-1": {}, "top-2": {"top_k": 2, "position": "pos3"}, "top-4": {"top_k": 4}, "DGMoE": {"architecture": "dgmoe"}
}  # fmt: skip
EACH_GB = 9.8304e-5  # an expert in fp64; its copy in both layers, and one layer once more for each rank
EXPERTS, PROMPTS = 8, [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [4, 4], [6] * 20]
REQUEST = Request(6, Sampling(0.0))
CHEAP, NOTHING = Costs(0.0, 1.0, 1.0), Costs(0.0, 0.0, 0.0)


def inputs(rank: int) -> list[tuple[Tensor, Tensor | None]]:
    """Many tokens, one, another number on each rank, and on every other rank none."""
    generator = torch.Generator().manual_seed(rank)
    draw = [torch.randint(384, shape, generator=generator) for shape in ((3, 40), (1, 1), (1, 1 + 5 * rank), (2, 4))]
    return [*((tokens, None) for tokens in draw[:3]), (draw[3], torch.full((2, 4), rank % 2))]


def outputs(model: GPT, rank: int) -> list[Tensor]:
    """Of the tokens that are not masked."""
    with torch.inference_mode():
        found = [(model.hidden_states(tokens, None, used), used) for tokens, used in inputs(rank)]
        return [hidden if used is None else hidden[used.bool()] for hidden, used in found]


def differences(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True) if b.numel())


def text(model: GPT) -> list[list[int]]:
    return [completion.tokens for completion in TextGenerator(model, batch_size=2).generate(PROMPTS, REQUEST)]


def refusals(model: GPT) -> list[str]:
    """What is said to copies that cannot be."""
    found = []
    each_bytes = sum(
        sum(
            parameter.numel() * parameter.element_size()
            for parameter in pair.layer.deepspeed_moe.experts.deepspeed_experts[0].parameters()
        )
        for pair in model.scheduled_pairs()
    )
    memory = SimpleNamespace(available=5 * each_bytes)
    for per_rank, loads in ((EXPERTS, None), (1, [[1.0] * EXPERTS]), (4, None)):
        with mock.patch("psutil.virtual_memory", lambda: memory), pytest.raises(ArgumentError) as refused:
            copy_experts(model, per_rank, loads, CHEAP)
        found.append(str(refused.value))
    return found


def on_ranks(directory: str, ep_size: int) -> dict[str, Any]:
    """Models with and without copies: differences to one rank's outputs, texts, collectives and loads."""
    tensor.start_tensor_parallel(1)
    rank, found, launched = dist.get_rank(), {}, [0]
    launch = Transport.launch

    def counted(self: Transport, *args: Any) -> Any:
        launched[0] += 1
        return launch(self, *args)

    def launches(model: GPT) -> int:
        launched[0] = 0
        outputs(model, rank)
        return launched[0]

    Transport.launch = counted  # type: ignore[method-assign]
    for name in SECTIONS:
        trained = TrainedModel.open(Path(directory) / name)

        def load(ep_size: int, trained: TrainedModel = trained) -> GPT:
            return load_model(trained, serving_config(trained.config, ep_size), torch.float64, CPU)

        expected, model = outputs(load(1), rank), load(ep_size)
        plain, words = launches(model), text(model)
        refused = refusals(model)
        copies = copy_experts(model, 1, None, CHEAP)
        measuring = differences(outputs(model, rank), expected)
        copied, with_copies = differences(outputs(model, rank), expected), launches(model)
        loads = copies.counted()
        from_start = load(ep_size)
        known = copy_experts(from_start, 1, loads, NOTHING)
        assert launches(from_start) == plain, "rows stay at home: no further collective"
        assert all(rule.copies and rule.loads.rows and not rule.loads.moved for rule in known.rules)
        for rule in known.rules:
            rule.costs = CHEAP
        found[name] = {
            "differences": (measuring, copied, differences(outputs(from_start, rank), expected)),
            "launches": (plain, with_copies),
            "same text": text(model) == words,
            "loads": [vars(rule.loads) for rule in copies.rules],
            "copies": [list(map(tuple, rule.copies or ())) for rule in copies.rules],
            "summary": copies.summary(),
            "refused": refused,
        }
    Transport.launch = launch  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two of eight experts are hot; both live on one rank."""
    directory = tmp_path_factory.mktemp("models")
    for name, section in SECTIONS.items():
        model = whole_model(LLAMA, {"num_experts": EXPERTS, **section})
        for pair in model.scheduled_pairs():
            pair.layer.deepspeed_moe.gate.wg.weight.data[:2] *= 2.5
        write_export(directory / name, model)
    return str(directory)


def both(directory: str) -> dict[int, dict[str, Any]]:
    return {ep_size: on_ranks(directory, ep_size) for ep_size in (2, 4)}


@pytest.fixture(scope="module")
def of_both(models: str) -> list[dict[int, dict[str, Any]]]:
    return run_distributed(both, 4, models)


@pytest.mark.parametrize("ep_size", [2, 4])
def test_same_outputs_and_texts(of_both: list[dict[int, dict[str, Any]]], ep_size: int) -> None:
    ranks = [each[ep_size] for each in of_both]
    for found in ranks:
        for name, each in found.items():
            assert max(each["differences"]) < 1e-12, name
            assert each["same text"], name
            plain, with_copies = each["launches"]
            # Two layers, four passes. With several experts per token, moved rows are counted in one more exchange.
            assert with_copies == plain if name in ("top-1", "DGMoE") else plain < with_copies <= plain + 8, name
            for loads in each["loads"]:
                assert 0 < loads["moved"] < loads["rows"] and loads["greatest"] < loads["greatest_before"]
            assert "1 per rank and layer" in each["summary"]
            most = EXPERTS - EXPERTS // ep_size
            assert each["refused"] == [
                f"--expert-copies 8: must be at most {most}, as other ranks have no more experts in a layer",
                "--expert-loads: has layers of [8] experts and the model of [8, 8]; measure this model",
                f"--expert-copies 4: take {4 * (2 + ep_size) * EACH_GB:.3g} GB on each rank, and {10 * EACH_GB:.3g} GB are "
                f"free; give at most {10 // (2 + ep_size)}",
            ]
    for first in range(0, 4, ep_size):  # the ranks of a group decide alike
        assert len({str([each["copies"] for each in found.values()]) for found in ranks[first : first + ep_size]}) == 1


def test_one_rank(models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts loads, and has no use for copies; a file of loads that is none; a model that is no GPT."""
    with pytest.raises(ArgumentError, match="model = Linear: only a GPT of this package can have copies"):
        copy_experts(torch.nn.Linear(2, 2), 1)  # type: ignore[arg-type]
    trained = TrainedModel.open(Path(models) / "top-1")
    model = load_model(trained, serving_config(trained.config), torch.float32, CPU)
    with pytest.raises(
        ArgumentError, match="--expert-copies 1: one rank has all experts, so there are no loads to compare"
    ):
        copy_experts(model, 1)
    copies = copy_experts(model, 0)
    outputs(model, 0)
    copies.save(tmp_path / "loads.json")
    loads = read_loads(tmp_path / "loads.json")
    assert loads == copies.counted() and [sum(each) for each in loads] == [3 * 40 + 1 + 1, 3 * 40 + 1 + 1]
    assert copies.summary().startswith("expert copies: none were chosen")
    for content in (
        "{}",
        '{"loads": [[1, -1]]}',
        '{"loads": [[NaN]]}',
        "no JSON",
        '{"loads": 3}',
        '{"loads": ["12"]}',
        "[" * 10**5,
    ):
        (tmp_path / "loads.json").write_text(content)
        with pytest.raises(ArgumentError, match="is no file of loads; write one with --save-expert-loads"):
            read_loads(tmp_path / "loads.json")
    (tmp_path / "loads.json").write_text('{"loads": [[0, 0], [0, 0]]}')
    with pytest.raises(ArgumentError, match="all loads are 0, which tells no expert as hot"):
        read_loads(tmp_path / "loads.json")
    with pytest.raises(ArgumentError, match=r"absent: cannot be read \(No such file or directory\)"):
        read_loads(tmp_path / "absent")
