"""States of experts that other ranks have, too, on one rank: what the ranks together do has tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from scmoe_ds.engine import connect
from scmoe_ds.offload.records import HostRecords
from scmoe_ds.offload.room import sections
from scmoe_ds.offload.shared import SharedStates
from scmoe_ds.offload.states import MASTER
from scmoe_ds.offload.store import ExpertKey
from tests.offload.test_states import CPU, KEY, OPTIONS, SHAPE


def make(keys: list[ExpertKey]) -> SharedStates:
    connect()
    records = HostRecords([sections(SHAPE, torch.float32)] * len(keys), CPU)
    states = SharedStates(keys, SHAPE, torch.float32, CPU, records, 0, 1)
    for key in keys:
        states.write(key, {"weight": {MASTER: torch.ones(2, 3)}})
    states.join(1, dist.group.WORLD)
    return states


def leave_what_is_not_asked_for(states: SharedStates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers never have time for it."""
    submit = states._workers.submit
    monkeypatch.setattr(
        states._workers, "submit", lambda *each: submit(0, lambda _: None) if each[0] > 1 else submit(*each)
    )


def test_a_due_step_has_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the layer did not run between two steps, so that the second one has a gradient of zeros."""
    states = make([KEY])
    leave_what_is_not_asked_for(states, monkeypatch)
    states.keep(KEY, states.gradient_buffer().fill_(1))
    states.reduce()
    states.step(torch.ones(1), torch.optim.Adam, OPTIONS)
    states.reduce()
    assert torch.allclose(states.read(KEY)[0]["weight"][MASTER], torch.full([2, 3], 0.9))


def test_the_next_expert_is_loaded_while_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buffers are on the way, and no third."""
    keys = [ExpertKey(0, number) for number in range(4)]
    states = make(keys)
    states.finish()
    states.step(torch.ones(1), torch.optim.Adam, OPTIONS)
    happened: list[str] = []
    load, broadcast = states.load, dist.broadcast

    def noted_load(*arguments: Any) -> Any:
        happened.append("load")
        return load(*arguments)

    def noted_broadcast(*arguments: Any, **options: Any) -> Any:
        happened.append("send")
        return broadcast(*arguments, **options)

    monkeypatch.setattr(states, "load", noted_load)
    monkeypatch.setattr(dist, "broadcast", noted_broadcast)
    states.gather(0)
    assert happened == ["load", "load", "send", "load", "send", "load", "send", "send"]
