"""DeepSpeed's engine with ZeRO on a simulated device, two ranks with expert parallelism: the CPU's bits, no finding.

Gradients are reduced beside the backward pass, on DeepSpeed's stream, while the gradients of rows travel on ours. What is
found in DeepSpeed's own code is not ours to correct. It is listed here, and nothing else may be found.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from tests.replace.test_replace import TheirModel, feeds
from tests.simulated_gpu.cases import UNCHANGED, different
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu
from tests.simulated_gpu.mutation import mutated

pytestmark = NEEDS_SIMULATION
SHAPE = GPTSettings(4, 16, 4, 64, 12, hidden_dropout=0.1)
OF_DEEPSPEED = [
    # ZeRO copies reduced gradients to memory of its reduction stream. The optimizer reads them on the main stream. They
    # are freed without `record_stream`. Nothing can come of it: before its next use that stream waits for the main one.
    r"use after free: memory of stream \d+ \(deepspeed/runtime/zero/stage_1_and_2.py:\d+ < [^)]*\) is freed, and "
    r"cat on the main stream \(deepspeed/runtime/zero/stage_1_and_2.py:[^)]*\) may not be over",
]

FAULT = ("deepspeed.runtime.zero.stage_1_and_2", "stream.wait_stream(producer_stream)", "pass")
"""Reductions that do not wait for the gradients."""


class Case(NamedTuple):
    """An engine.

    Attributes:
        stage: ZeRO's.
        dtype: "fp32" or "bf16".
        overlap_comm: gradients are reduced beside the backward pass.
        offload: the optimizer's state is in pinned memory of the host. Then two micro-batches make a step.
        theirs: the model is one that others wrote, whose layers are replaced.
    """

    stage: int
    dtype: str
    overlap_comm: bool
    offload: bool = False
    theirs: bool = False

    @property
    def whole(self) -> dict[str, Any]:
        """The DeepSpeed JSON. Buckets are so small that several are on their way."""
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.overlap_comm, "reduce_bucket_size": 600}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2 if self.offload else 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == "bf16"},
            "scmoe": {
                "num_experts": 4,
                "expert_parallel_size": 2,
                "capacity_factor": 1.0,
                "overlap": {"calibration_steps": 0, "expert_slot": [1, 3]},
                "replace": self.theirs,
            },
        }


CASES = [
    Case(1, "fp32", True),
    Case(1, "bf16", False),
    Case(2, "fp32", False),
    Case(2, "bf16", True),
    Case(1, "fp32", False, offload=True),
    Case(2, "bf16", True, offload=True),
    Case(1, "bf16", True, theirs=True),
]


class Output(NamedTuple):
    loss: Tensor


class TheirLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(64, 16), TheirModel(use_residual=True, ep_size=2, use_rts=True)

    def forward(self, tokens: Tensor, labels: Tensor) -> Output:
        hidden = self.body(self.embedding(tokens))
        loss = F.cross_entropy((hidden @ self.embedding.weight.t()).flatten(0, 1).float(), labels.flatten())
        return Output(loss + sum(each.l_aux for each in feeds(self)))


def make(case: Case) -> nn.Module:
    if case.theirs:
        torch.manual_seed(dist.get_rank())
        return TheirLanguageModel()
    model = GPT(SHAPE, ScMoEConfig.from_deepspeed(case.whole), 12)
    initialize_parameters(model, 3, 0.4, 1)
    return model


def train(model: nn.Module, case: Case, tokens: Tensor) -> list[Tensor]:
    """Losses of two steps, then the weights."""
    engine, *_ = scmoe_ds.initialize(model=model, config=case.whole)
    losses = []
    for step in range(2 * engine.gradient_accumulation_steps()):
        torch.manual_seed(step)
        loss = engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return [*losses, *(each.detach() for each in engine.module.parameters())]


def run(case: Case, changed: AbstractContextManager[object] = UNCHANGED) -> tuple[list[int], list[str]]:
    """Which results differ from the CPU's, and findings; `changed` surrounds what runs on the device."""
    tokens = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(5 + dist.get_rank()))
    expected = train(make(case), case, tokens)
    with changed, simulated_gpu((8, 0)) as gpu:
        found = train(gpu.move(make(case)), case, gpu.move(tokens))
        return different(expected, found, gpu), list(gpu.findings)


def run_all() -> tuple[list[tuple[list[int], list[str]]], list[str] | None]:
    """Of each case, and with a fault in ZeRO; None: this version has no such line."""
    outcomes = [run(case) for case in CASES]
    try:
        return outcomes, run(Case(2, "bf16", True), mutated(*FAULT))[1]
    except LookupError:
        return outcomes, None


def ours(findings: list[str]) -> list[str]:
    """All but those of OF_DEEPSPEED."""
    return [each for each in findings if not any(re.fullmatch(known, each) for known in OF_DEEPSPEED)]


def test_the_engine_trains_as_on_the_cpu() -> None:
    for outcomes, with_fault in run_distributed(run_all, 2):
        for case, (differences, findings) in zip(CASES, outcomes, strict=True):
            assert not differences and not ours(findings), (case, differences, findings)
        assert with_fault is None or any("race" in each and "nccl" in each for each in ours(with_fault)), with_fault
