"""Generation on a CUDA device: cached logits, and experts that come from pinned memory or from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scmoe_ds.engine import connect
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import offload_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from tests.helpers.exports import greedy, whole_model, write_export

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SETTINGS = GPTSettings(4, 256, 4, 384, 96)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    model = whole_model(SETTINGS, {"num_experts": 8}, std=0.1)
    return model, write_export(tmp_path_factory.mktemp("models") / "export", model)


def serve(path: Path, mode: str, tier: str | None = None) -> GPT:
    trained, device = TrainedModel.open(path), torch.device("cuda")

    def offload(model: GPT) -> None:
        offload_experts(model, trained, mode, 3, torch.float32, device, tier)  # type: ignore[arg-type]

    config = serving_config(trained.config)
    return load_model(trained, config, torch.float32, device, None if mode == "resident" else offload)


def generated(model: GPT) -> list[list[int]]:
    request = Request(40, Sampling(temperature=0))
    return [completion.tokens for completion in TextGenerator(model, batch_size=2).generate(PROMPTS, request)]


def test_cached_text(export: tuple[GPT, Path]) -> None:
    whole, path = export
    assert generated(serve(path, "resident")) == [greedy(whole, prompt, 40)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("mode", ["offload", "offload-async"])
def test_offloaded_experts(export: tuple[GPT, Path], mode: str, tier: str) -> None:
    """The same text and logits, many times over: a copy that came too late or too early would show."""
    _, path = export
    tokens = torch.randint(384, (3, 50), generator=torch.Generator().manual_seed(1)).cuda()
    resident, model = serve(path, "resident"), serve(path, mode, tier)
    text = generated(resident)
    with torch.inference_mode():
        expected = resident(tokens).logits
        for _ in range(20):
            assert torch.equal(model(tokens).logits, expected)
    for _ in range(3):
        assert generated(model) == text


def test_device_memory(export: tuple[GPT, Path]) -> None:
    """Three experts' room instead of sixteen experts."""
    _, path = export
    used = []
    for mode in ("resident", "offload-async"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = serve(path, mode)
        used.append(torch.cuda.memory_allocated() - before)
        del model
    experts = 2 * 256 * 1024 * 4
    assert used[0] - used[1] > 12 * experts
