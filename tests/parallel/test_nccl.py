"""What NCCL reads from the environment: ours only where the user has set nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.parallel import process, tensor
from scmoe_ds.parallel.groups import travel_group
from scmoe_ds.parallel.nccl import PRIORITY, allocator_advice, prefer_communication


def test_priority_is_high_unless_the_user_has_decided() -> None:
    environment: dict[str, str] = {}
    assert prefer_communication(environment) and environment == {PRIORITY: "1"}
    for own in ("0", "1", ""):
        environment = {PRIORITY: own}
        assert not prefer_communication(environment) and environment == {PRIORITY: own}


@pytest.mark.parametrize("own", [None, "0"])
def test_connect_sets_it_before_any_group(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the user has made the groups; then the log says which of them it comes too late for."""
    told: list[str] = []
    monkeypatch.delenv(PRIORITY, raising=False)
    if own is not None:
        monkeypatch.setenv(PRIORITY, own)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")
    monkeypatch.setattr(process, "log", told.append)
    monkeypatch.setattr(process.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(process, "forget_names", lambda: None)
    process.connect()
    assert process.os.environ[PRIORITY] == (own or "1")
    assert [PRIORITY in each for each in told] == ([True] if own is None else [])


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_are_recommended_where_nothing_is_set(name: str) -> None:
    assert "expandable_segments:True" in str(allocator_advice({name: "max_split_size_mb:128"}))
    assert allocator_advice({name: "expandable_segments:False,max_split_size_mb:128"}) is None


def groups_of_layers(ep_size: int) -> Any:
    """The group of a layer's rows under a tensor-parallel size of 2, and what else is sent on it."""
    tensor.start_tensor_parallel(2)
    layers = [scmoe_ds.ScMoE(8, MLP(GPTSettings(2, 8, 2, 64, 8, ffn_hidden_size=16)), 4, ep_size) for _ in range(2)]
    for layer in layers:
        layer.set_deepspeed_parallelism()
    group, other = (layer.transport.group for layer in layers)
    assert group is other, "one for all layers"
    assert group not in (dist.group.WORLD, tensor.tensor_parallel_group(), layers[0].deepspeed_moe.ep_group)
    sent: list[Any] = []
    plain = dist.all_to_all_single

    def noted(*args: Any, **kwargs: Any) -> Any:
        sent.append(kwargs["group"])
        return plain(*args, **kwargs)

    dist.all_to_all_single = noted
    try:
        torch.manual_seed(0)
        layers[0](torch.randn(6, 8))
    finally:
        dist.all_to_all_single = plain
    assert len(sent) == 3 and set(sent) == {group}, "counts, dispatch and combine"
    assert travel_group(dist.get_process_group_ranks(group)) is group
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_rows_travel_on_a_group_of_their_own(ep_size: int) -> None:
    assert run_distributed(groups_of_layers, 2, ep_size) == [[0, 1], [0, 1]]
