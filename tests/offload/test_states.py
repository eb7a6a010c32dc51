"""Experts' states on their workers: no error is lost, and nothing is left to do for a program that has ended."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from scmoe_ds.errors import ArgumentError
from scmoe_ds.offload.pages import page_tensor
from scmoe_ds.offload.records import HostRecords
from scmoe_ds.offload.room import sections
from scmoe_ds.offload.shape import ExpertShape, Part
from scmoe_ds.offload.states import MASTER, ExpertStates
from scmoe_ds.offload.store import ExpertKey
from scmoe_ds.offload.workers import Workers

CPU = torch.device("cpu")
SHAPE = ExpertShape((Part("weight", torch.Size([2, 3]), 0, 0),))
KEY = ExpertKey(0, 0)
OPTIONS = {0: {"lr": 0.1}}


class Records(HostRecords):
    """Whose reads or writes fail when it is said."""

    fails = ""

    def read(self, *arguments: Any) -> Any:
        return _failed("read") if self.fails == "read" else super().read(*arguments)

    def write(self, *arguments: Any) -> Any:
        return _failed("written") if self.fails == "write" else super().write(*arguments)


def _failed(what: str) -> Future[None]:
    found: Future[None] = Future()
    found.set_exception(ArgumentError(f"cannot be {what}"))
    return found


def make() -> tuple[ExpertStates, Records]:
    records = Records([sections(SHAPE, torch.float32)], CPU)
    states = ExpertStates([KEY], SHAPE, torch.float32, CPU, records)
    states.write(KEY, {"weight": {MASTER: torch.ones(2, 3)}})
    return states, records


def keep(states: ExpertStates) -> None:
    states.keep(KEY, states.gradient_buffer().fill_(1))


@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_on_the_way_is_raised(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the weights have come: the step that came with them is lost."""
    states, records = make()
    keep(states)
    submit, flat = states._workers.submit, page_tensor(6, torch.float32, CPU)
    # Nobody is idle, so that the expert makes its step when it comes.
    monkeypatch.setattr(
        states._workers, "submit", lambda *each: submit(0, lambda _: None) if each[0] else submit(*each)
    )
    states.step(torch.ones(1), torch.optim.Adam, OPTIONS)
    records.fails = what
    arrival = states.load({"0.0": flat}, None)
    if what == "read":
        with pytest.raises(ArgumentError, match="cannot be read"):
            arrival.wait()
    else:
        arrival.wait()
        assert torch.allclose(flat[:6], torch.full([6], 0.9))
    for act in (states.finish, lambda: states.step(torch.ones(1), torch.optim.Adam, OPTIONS), lambda: states.read(KEY)):
        with pytest.raises(ArgumentError, match="cannot be"):
            act()


def test_a_gradient_that_is_late_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = make()
    on_time = states._keep

    def late(*arguments: Any) -> None:
        time.sleep(0.05)
        on_time(*arguments)

    monkeypatch.setattr(states, "_keep", late)
    keep(states)
    states.forget_gradients()
    time.sleep(0.1)
    assert states.norms(0) == [0]


def _leave(pipe: Any) -> None:
    workers = Workers([None], CPU)
    for number in range(50):
        workers.submit(2, lambda _, number=number: (pipe.send(number), time.sleep(0.02)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_program_that_ends_leaves_its_tasks() -> None:
    """Of which there may be one for each expert."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_leave, args=(there,))
    process.start()
    process.join()
    there.close()
    assert process.exitcode == 0
    done = 0
    while here.poll():
        try:
            here.recv()
        except EOFError:
            break
        done += 1
    assert done < 10
