"""A model that others wrote, with DeepSpeed's MoE layers, replaced and trained on a simulated device by two ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from lab.gpu_budgets import HOST_WAITS_FORWARD
from scmoe_ds.replace import replace_moe_layers
from tests.replace.test_replace import TheirModel, feeds, replaced_layers, section
from tests.replace.test_replace import make as make_model
from tests.simulated_gpu.cases import different
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
MOE_LAYERS = 2


class Case(NamedTuple):
    """How a model is replaced and run.

    Attributes:
        slots: of the experts: one, or one for each chunk.
        cut: what is recomputed in the backward pass: None, each "block", or "all".
        late: replaced when it is on the device already.
        more: of the section.
    """

    position: str
    slots: int | list[int]
    cut: str | None = None
    late: bool = False
    dtype: torch.dtype = torch.float32
    more: Mapping[str, Any] = MappingProxyType({})


CASES = [
    Case("pos1", 1),
    Case("pos1", [2, 3], late=True, more={"shortcut_norm": "own", "merge": "cg2"}),
    Case("pos1", 2, "block"),
    Case("pos2", 2, late=True, dtype=torch.bfloat16),
    Case("pos2", [1, 3], "all", more={"dispatch": "padded"}),
    Case("pos2", [2, 3, 4], more={"top_k": 2}),
    Case("pos3", [2, 4], late=True, more={"wire_dtype": "fp8", "shortcut_norm": "own"}),
    Case("pos3", 3, "all", dtype=torch.bfloat16),
]


def replaced(case: Case, model: TheirModel) -> TheirModel:
    torch.manual_seed(dist.get_rank())  # what replacing adds
    replace_moe_layers(model, section(position=case.position, overlap={"expert_slot": case.slots}, **case.more))
    for layer in replaced_layers(model):
        layer.set_deepspeed_parallelism()
    return model


def results(model: TheirModel, hidden: Tensor) -> Iterator[list[Tensor]]:
    """Output and gradients of two passes: the hooks look for operators in the first, and overlap in the second."""
    for number in range(2):
        torch.manual_seed(number)
        output = model(hidden)
        loss = output.float().square().mean() + sum(each.l_aux for each in feeds(model))
        yield [output.detach(), *torch.autograd.grad(loss, [hidden, *model.parameters()])]


def run(case: Case) -> tuple[list[int], list[str], int, list[int]]:
    """Which results differ from the CPU's, and findings. Of the second pass, how often the host waited, and what `Gpu`
    calls hidden, forward and backward."""

    def make() -> TheirModel:
        model = make_model(dist.get_rank(), use_residual=True, ep_size=2, use_rts=True).to(case.dtype)
        model.checkpointing = case.cut
        return model

    hidden = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(dist.get_rank())).to(case.dtype)
    expected = list(results(replaced(case, make()), hidden.clone().requires_grad_()))
    differences: list[int] = []
    with simulated_gpu((8, 0)) as gpu:
        model = replaced(case, gpu.move(make())) if case.late else gpu.move(replaced(case, make()))
        for before, found in zip(expected, results(model, gpu.move(hidden).requires_grad_()), strict=True):
            differences += different(before, found, gpu)
            waits, hidden_launches = sum(gpu.host_waits.values()), [gpu.hidden("forward"), gpu.hidden("backward")]
            gpu.host_waits.clear()
            gpu.kernels.clear()
        return differences, list(gpu.findings), waits, hidden_launches


def run_all() -> list[tuple[list[int], list[str], int, list[int]]]:
    return [run(case) for case in CASES]


def test_replaced_layers_compute_as_on_the_cpu() -> None:
    """What is computed again waits again. Where each block is by itself, pairs do not overlap."""
    for outcomes in run_distributed(run_all, 2):
        for case, (differences, findings, waits, hidden) in zip(CASES, outcomes, strict=True):
            assert not differences and not findings, (case, differences, findings)
            assert waits <= MOE_LAYERS * HOST_WAITS_FORWARD * (1 if case.cut is None else 2), (case, waits)
            assert case.cut == "block" or all(hidden), (case, hidden)
