"""Generation on several ranks: the same text and logits as on one, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.inference.generate import Completion, Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, calibrators, load_model, serving_config
from scmoe_ds.inference.offload import offload_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.simulation import Mode
from tests.helpers.exports import whole_model, write_export
from tests.helpers.settings import LLAMA

CPU, FP32 = torch.device("cpu"), torch.float32
SECTIONS: dict[str, dict[str, Any]] = {
    "scmoe": {},
    "pos3, top-2": {"position": "pos3", "top_k": 2},
    "topk": {"architecture": "topk"},
    "shared_expert": {"architecture": "shared_expert"},
    "dgmoe": {"architecture": "dgmoe", "pairs_per_moe": 2},
}
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [4, 4], [6] * 20]
TOKENS = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(2))
REQUEST = Request(8, Sampling(0.8, top_p=0.9), end=(11,))
Found = dict[str, tuple[list[Completion], list[Completion], Tensor]]


def generate(
    model: GPT, serving: Mapping[Mode, Calibrator] | None = None
) -> tuple[list[Completion], list[Completion], Tensor]:
    """Five prompts, one prompt alone (on all ranks but one nobody has any), and logits of whole passes."""
    generator = TextGenerator(model, serving, batch_size=2)
    several, one = generator.generate(PROMPTS, REQUEST), generator.generate(PROMPTS[:1], REQUEST)
    with torch.inference_mode():
        logits = model(TOKENS).logits
    assert logits is not None
    return several, one, logits.clone()


def on_a_layout(directory: str, names: Sequence[str], tp_size: int, ep_size: int, divided: bool = False) -> Found:
    """Models of the directory on this layout, resident and, undivided, offloaded."""
    tensor.start_tensor_parallel(tp_size)
    layout = Layout(dist.get_world_size(), tp_size, ep_size, divided)
    found: Found = {}
    for name in names:
        trained = TrainedModel.open(Path(directory) / name)
        config = serving_config(trained.config, ep_size, divided)
        model = load_model(trained, config, FP32, CPU)
        serving = calibrators(model, config, layout, 2, 6)
        found[name] = generate(model, serving)
        if ep_size > 1:
            for _ in range(6):
                TextGenerator(model, serving).generate(PROMPTS[:1], Request(1))
            for mode, calibrator in serving.items():
                assert not calibrator.calibrating and len(calibrator.times) == len(calibrator.kinds) > 0, mode
                assert all(schedule.overlap for schedule in calibrator.schedules)
            again = generate(model, serving)
            assert again[:2] == found[name][:2] and torch.equal(again[2], found[name][2])
        if divided or name != "scmoe":
            continue

        def offload(model: GPT, trained: TrainedModel = trained) -> None:
            offload_experts(model, trained, "offload-async", 3, FP32, CPU)

        found["offloaded"] = generate(load_model(trained, config, FP32, CPU, offload))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models")
    for name, section in SECTIONS.items():
        write_export(directory / name, whole_model(LLAMA, {"num_experts": 4, **section}))
    return str(directory)


@pytest.fixture(scope="module")
def alone(models: str) -> Found:
    return run_distributed(on_a_layout, 1, models, list(SECTIONS), 1, 1)[0]


@pytest.mark.parametrize(
    ("ranks", "tp_size", "ep_size", "divided"),
    [(2, 1, 2, False), (2, 1, 1, False), (2, 2, 1, False), (4, 2, 2, True), (4, 2, 4, False)],
)
def test_layout(models: str, alone: Found, ranks: int, tp_size: int, ep_size: int, divided: bool) -> None:
    names = list(SECTIONS) if tp_size == 1 and ep_size > 1 else ["scmoe", "topk"]
    for found in run_distributed(on_a_layout, ranks, models, names, tp_size, ep_size, divided):
        for name, (several, one, logits) in found.items():
            assert several == alone[name][0], name
            assert one == alone[name][1], name
            expected = alone[name][2]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        if "offloaded" in found:
            assert torch.equal(found["offloaded"][2], found["scmoe"][2])


def overlapped_and_not(directory: str) -> dict[str, list[Any]]:
    """Text and logits under every slot, overlapped and blocking."""
    trained = TrainedModel.open(Path(directory) / "scmoe")
    model = load_model(trained, serving_config(trained.config, 2), FP32, CPU)
    found: dict[str, list[Any]] = {"text": [], "logits": []}
    for overlap in (True, False):
        for slot in (1, 2, 3, 4):
            for run in model.scheduled_pairs():
                run.schedule = Schedule(slot, overlap=overlap)
                run.forward_schedule = None
            several, _, logits = generate(model)
            found["text"].append(several)
            found["logits"].append(logits)
    return found


def test_overlap_changes_no_bit(models: str) -> None:
    for found in run_distributed(overlapped_and_not, 2, models):
        assert all(text == found["text"][0] for text in found["text"])
        assert all(torch.equal(logits, found["logits"][0]) for logits in found["logits"])
