"""Activation checkpointing: the same bits as without, the same collectives on every rank, and less kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.recompute import Recompute
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import Recorder

SETTINGS = GPTSettings(4, 32, 4, 64, 32, hidden_dropout=0.1, attention_dropout=0.1)
SCHEDULES = {"blocking": Schedule(2, 1, overlap=False), "overlapped": Schedule(2, 1), "chunks": Schedule((1, 4), 2)}
ARCHITECTURES = ("scmoe", "dgmoe", "shared_expert", "overlapped_shared_expert")


class Counted:
    """Counts launches and waits of all-to-alls while it is entered."""

    def __init__(self) -> None:
        self.launched = self.waited = 0
        self.original = Transport.launch

    def __enter__(self) -> Counted:
        counted = self

        def launch(self: Transport, *arguments: Any) -> Any:
            wait = counted.original(self, *arguments)
            counted.launched += 1

            def waited() -> None:
                counted.waited += 1
                wait()

            return waited

        Transport.launch = launch  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Transport.launch = self.original  # type: ignore[method-assign]


def step(
    architecture: str, schedule: Schedule | None, recompute: Recompute | None, record: bool = False
) -> dict[str, Any]:
    """One micro-batch: loss, gradients, bytes that autograd keeps for the backward pass, all-to-alls."""
    ep_size = dist.get_world_size()
    # Drops with random token selection, so that a repetition with other random numbers would show.
    config = ScMoEConfig(
        architecture=architecture,
        num_experts=4,
        expert_parallel_size=ep_size,
        capacity_factor=1.0,
        min_capacity=1,
        all_to_all="collective",
    )
    model = GPT(SETTINGS, config, recompute=recompute)
    initialize_parameters(model, 7, 0.1, SETTINGS.num_layers)
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    recorder = Recorder(torch.device("cpu"))
    for layer, pair in enumerate(model.scheduled_pairs()):
        pair.schedule = schedule or pair.schedule
        if record:
            pair.recorder = recorder.pair(layer)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(64, (2, 33))
    with Counted() as counted:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens[:, :-1], labels=tokens[:, 1:])
        held = sum(kept.values())
        assert output.loss is not None
        output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    spans = [(span.layer, span.name, span.lane, span.phase, span.chunk) for span in recorder.spans()]
    return {
        "loss": output.loss.item(),
        "gradients": gradients,
        "kept": held,
        "random": torch.rand(()).item(),
        "launched": counted.launched,
        "waited": counted.waited,
        "spans": sorted(spans),
    }


def all_steps() -> dict[tuple[str, str, str], dict[str, Any]]:
    results = {}
    for architecture, recompute in itertools.product(ARCHITECTURES, (None, "selective", "full")):
        schedules = SCHEDULES if architecture == "scmoe" else {"own": None}
        for name, schedule in schedules.items():
            results[architecture, name, str(recompute)] = step(architecture, schedule, recompute)  # type: ignore[arg-type]
    for recompute in (None, "selective", "full"):
        results["scmoe", "recorded", str(recompute)] = step("scmoe", SCHEDULES["overlapped"], recompute, record=True)  # type: ignore[arg-type]
    return results


@pytest.fixture(scope="module", params=[1, 2])
def by_rank(request: pytest.FixtureRequest) -> list[dict[tuple[str, str, str], dict[str, Any]]]:
    return run_distributed(all_steps, request.param)


CASES = [("scmoe", name) for name in (*SCHEDULES, "recorded")] + [(name, "own") for name in ARCHITECTURES[1:]]


@pytest.mark.parametrize(("architecture", "schedule"), CASES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(architecture: str, schedule: str, recompute: str, by_rank: list[Any]) -> None:
    for results in by_rank:
        plain, again = (results[architecture, schedule, each] for each in ("None", recompute))
        assert again["loss"] == plain["loss"]
        assert again["random"] == plain["random"], "the generator goes on as if nothing had been repeated"
        for name, gradient in plain["gradients"].items():
            assert torch.equal(again["gradients"][name], gradient), name
        assert again["kept"] < plain["kept"]
        assert again["launched"] == again["waited"], "no transfer is left in flight"
        if schedule != "own" and len(by_rank) > 1:
            times = 2 if recompute == "full" else 1  # counts, dispatch and combine are repeated; gradients are not
            chunks = 2 if schedule == "chunks" else 1
            forward, backward = 2 * (1 + 2 * chunks), 2 * 2 * chunks  # of two pairs
            assert plain["launched"] == forward + backward
            assert again["launched"] == times * forward + backward
        assert again["launched"] == by_rank[0][architecture, schedule, recompute]["launched"]
        assert again["spans"] == plain["spans"], "a recorder hears every part once"


def test_full_keeps_less_than_selective(by_rank: list[Any]) -> None:
    for results in by_rank:
        kept = [results["scmoe", "overlapped", each]["kept"] for each in ("None", "selective", "full")]
        assert kept[2] < 0.3 * kept[0] and kept[2] < kept[1] < 0.8 * kept[0], kept
