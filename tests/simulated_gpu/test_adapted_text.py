"""scmoe adapt measures and fits on the GPU, and writes what it writes without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lab.moe_families import tiny
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.checkpoint.adapted.text import Text, TextSettings
from tests.checkpoint.test_adapted_directories import TEXT, tokenizer
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu
from tests.simulated_gpu.gpu import Gpu

pytestmark = NEEDS_SIMULATION


def weights_of(directory: Path) -> dict[str, Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


def put(module: nn.Module, gpu: Gpu) -> Any:
    """The simulated device moves modules by `move` alone, and has no grouped experts."""
    if isinstance(module, PreTrainedModel):
        module.set_experts_implementation("eager")
    return gpu.move(module)


def test_losses_counts_and_fits_are_computed_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, file = tmp_path / "source", tmp_path / "text.txt"
    tiny("qwen3_moe").save_pretrained(source)  # type: ignore[operator]
    tokenizer().save_pretrained(source)
    file.write_text(TEXT)
    text = TextSettings(file, seq_length=16)
    devices = set()
    loss = Text.loss

    def noting(self: Text) -> float:
        devices.add(next(self.model.parameters()).device.type)
        return loss(self)

    monkeypatch.setattr(Text, "loss", noting)
    for kind in ("busiest", "fit"):
        fields = {"shared_expert": kind}
        expected = adapt_hugging_face(source, tmp_path / f"{kind}_cpu", fields, text=text)
        with simulated_gpu() as gpu, monkeypatch.context() as patch:
            patch.setattr(nn.Module, "to", lambda module, *_, **__: put(module, gpu))
            said = adapt_hugging_face(source, tmp_path / kind, fields, text=text)
        assert said == expected and gpu.findings == [] and gpu.launched() > 100
        one, other = (weights_of(tmp_path / name) for name in (kind, f"{kind}_cpu"))
        assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert devices == {"cpu", "cuda"}
