"""DeepSpeed's engine with this package's layers in the place of its own: the same training, checkpoints and all.

What DeepSpeed's own tests try of its MoE: top-1 and top-2, Residual MoE, layers of different sizes, expert-parallel sizes,
ZeRO 0 to 2, a checkpoint that is saved and loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.moe.layer import StagedMoE

WIDTH, STEPS = 16, 4
Make = Callable[..., nn.Module]


class Model(nn.Module):
    """Two MoE layers between two dense ones, as in DeepSpeed's tests."""

    def __init__(self, make: Make, num_experts: tuple[int, int], **moe: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moes = nn.ModuleList([make(WIDTH, nn.Linear(WIDTH, WIDTH), number, **moe) for number in num_experts])

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        hidden, losses = self.first(hidden), []
        for moe in self.moes:
            output, l_aux, _ = moe(hidden)
            hidden = hidden + output
            losses.append(l_aux)
        return nn.functional.cross_entropy(self.last(hidden).flatten(0, 1), labels.flatten()) + 0.1 * sum(losses)


def ours(hidden_size: int, expert: nn.Module, num_experts: int, use_residual: bool = False, **moe: Any) -> nn.Module:
    if use_residual:
        return ScMoE(hidden_size, expert, num_experts, merge="cg2", **moe)
    return StagedMoE(hidden_size, expert, num_experts, **moe)


def train(make: Make, stage: int, num_experts: tuple[int, int], **moe: Any) -> list[float]:
    """Losses of some steps, of one more after going back to a checkpoint, and of the one that it went back behind."""
    torch.manual_seed(0)
    model = Model(make, num_experts, min_capacity=1, **moe)
    generator = torch.Generator().manual_seed(1)  # weights by name: the layers are initialised differently
    for name, parameter in sorted(model.named_parameters()):
        local = dist.get_rank() if "deepspeed_experts" in name and moe["ep_size"] > 1 else 0
        generator.manual_seed(hash_of(f"{name} {local}"))
        parameter.data.normal_(std=0.3, generator=generator)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=whole)
    losses = [step(engine, number) for number in range(STEPS)]
    directory = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(directory)
    engine.save_checkpoint(directory[0], tag="here")
    behind = step(engine, STEPS)
    step(engine, STEPS + 1)
    engine.load_checkpoint(directory[0], tag="here")
    again = step(engine, STEPS)
    assert again == behind, "the checkpoint holds all that decides a step"
    return [*losses, again]


def step(engine: Any, number: int) -> float:
    total = 0.0
    for micro in range(2):
        generator = torch.Generator().manual_seed((number * 2 + micro) * 2 + dist.get_rank())
        hidden = torch.randn(2, 8, WIDTH, generator=generator)
        torch.manual_seed(number)  # random token selection
        loss = engine(hidden, torch.randint(WIDTH, (2, 8), generator=generator))
        engine.backward(loss)
        engine.step()
        total += loss.item() / 2
    return total


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % (2**31)


CASES: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage}, {name}": {"stage": stage, "num_experts": numbers, **moe}
    for stage in (0, 1, 2)
    for name, numbers, moe in [
        ("top-1", (2, 2), {"ep_size": 2, "k": 1}),
        ("top-2 with drops", (4, 4), {"ep_size": 2, "k": 2, "capacity_factor": 0.5, "top2_2nd_expert_sampling": False}),
        ("Residual MoE", (4, 4), {"ep_size": 1, "use_residual": True}),
        ("pyramid of Residual MoEs", (2, 4), {"ep_size": 2, "use_residual": True, "drop_tokens": False}),
    ]
}


def train_all() -> dict[str, tuple[list[float], list[float]]]:
    return {name: (train(MoE, **case), train(ours, **case)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[float], list[float]]]:
    return run_distributed(train_all, 2)[0]


@pytest.mark.parametrize("case", CASES)
def test_trains_as_with_deepspeeds_layers(case: str, found: dict[str, tuple[list[float], list[float]]]) -> None:
    theirs, mine = found[case]
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert theirs[-2] != theirs[0]
