"""Mistakes that the check must find without a GPU, each planted in a model or a setting; and that it leaves no trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from scmoe_ds.models.layers import MLP, Attention
from scmoe_ds.programs.check import main

SIZES = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --world-size 4".split()
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4, "expert_parallel_size": 2},
}


@pytest.fixture
def check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs scmoe check on JSON with other values; returns the exit code, and what it printed."""

    def run(*flags: str, **changes: Any) -> tuple[int, str]:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({**JSON, **changes}))
        capfd.readouterr()
        code = main(["--deepspeed_config", str(path), *SIZES, *flags])
        said = capfd.readouterr()
        return code, said.out if code == 0 else said.err

    return run


def test_a_sound_training_passes_and_leaves_no_trace(check: Callable[..., tuple[int, str]]) -> None:
    before = get_accelerator().device_name(), torch.cuda.is_available(), F.dropout, Tensor.pin_memory
    code, said = check()
    assert code == 0, said
    assert "rank 0 of 4 × NVIDIA A800-SXM4-80GB on 1 node" in said
    assert before == (get_accelerator().device_name(), torch.cuda.is_available(), F.dropout, Tensor.pin_memory)
    assert not dist.is_initialized()
    assert torch.ones(2).sum().item() == 2


def _on_the_host(self: MLP, hidden: Tensor) -> Tensor:
    return self.output(self.activate(self.input(hidden))) + torch.ones(hidden.shape[-1])


def _of_another_shape(self: MLP, hidden: Tensor) -> Tensor:
    return self.output(self.activate(self.input(hidden[..., 1:])))


def _that_reads(self: MLP, hidden: Tensor) -> Tensor:
    return self.output(self.activate(self.input(hidden))) * (2.0 if hidden.sum().item() > 0 else 1.0)


def _that_selects(self: MLP, hidden: Tensor) -> Tensor:
    return self.output(self.activate(self.input(hidden))) + hidden[hidden > 0].mean()


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (_on_the_host, r"tensors on two devices, cuda:0 and cpu"),
        (_of_another_shape, r"must have same reduction dim|cannot be multiplied"),
        (_that_reads, r"reads a value of a tensor on the GPU"),
        (_that_selects, r"depends on values of the GPU"),
    ],
)
def test_a_wrong_operator_is_found_with_its_line(
    forward: Any, found: str, check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLP, "forward", forward)
    code, said = check("--mlp-type", "scmoe")
    line = forward.__code__.co_firstlineno + 1
    assert code == 2, said
    assert len(said.strip().splitlines()) == 1
    assert f"{__file__}:{line}" in said
    assert re.search(found, said), said


def test_a_hook_of_the_user_that_reads_is_found(
    check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(self: Attention, *args: Any) -> None:
        init(self, *args)
        self.register_forward_hook(lambda module, inputs, output: print(output.norm().item()))

    init = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", made)
    code, said = check()
    assert code == 2 and "reads a value of a tensor on the GPU" in said and __file__ in said


def test_an_option_that_deepspeed_refuses(check: Callable[..., tuple[int, str]]) -> None:
    code, said = check(zero_optimization={"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "disk"}})
    assert code == 2 and "zero_optimization" in said


def test_a_card_without_bf16(check: Callable[..., tuple[int, str]]) -> None:
    code, said = check("--card", "V100")
    assert code == 2 and "bf16.enabled = true" in said


def test_a_world_that_does_not_divide(check: Callable[..., tuple[int, str]]) -> None:
    code, said = check("--world-size", "3")
    assert code == 2 and "scmoe.expert_parallel_size = 2" in said


def test_a_batch_that_does_not_fit(check: Callable[..., tuple[int, str]]) -> None:
    code, said = check("--card", "A30", train_micro_batch_size_per_gpu=100_000)
    assert code == 2 and "out of memory (a rank needs" in said and "NVIDIA A30 has 25.2 GB" in said
