"""A rank whose GPU waits in vain says so before NCCL ends it; one that stands for another reason is left alone."""

from __future__ import annotations

import contextlib
import io
import threading
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from lab.distributed import run_distributed
from scmoe_ds.errors import ExchangeError
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.parallel import failures, process, stalls, standing
from scmoe_ds.parallel.stalls import StallWatch
from scmoe_ds.parallel.standing import Standing
from tests.simulated_gpu import streams
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

TIMEOUT_S, LIMIT = 30.0, 20  # looks of a second


class Over(Exception):
    """Of the script, or of the job."""


def looks(script: list[tuple[bool, bool, float]], monkeypatch: pytest.MonkeyPatch) -> str:
    """What comes of a watch that sees this: whether the thread has moved, whether the GPU is busy, seconds asleep."""
    now, steps = [0.0], iter(script)
    seen: dict[str, bool] = {}

    def sleep(seconds: float) -> None:
        step = next(steps, None)
        if step is None:
            raise Over("nothing was said")
        seen["moved"], seen["busy"] = step[:2]
        now[0] += seconds + step[2]

    def end(error: Exception) -> NoReturn:
        raise Over(str(error))

    monkeypatch.setattr(stalls, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr(stalls, "dist", SimpleNamespace(get_world_size=lambda: 2, get_rank=lambda: 0))
    thread = SimpleNamespace(has_moved=lambda: seen["moved"], place="here")
    watch = StallWatch(TIMEOUT_S, end, thread, lambda: seen["busy"], look_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(Over) as over:
        watch.run()
    return str(over.value)


STANDS, GOES_ON, IS_IDLE, MOVES = (False, True, 0.0), (True, True, 0.0), (False, False, 0.0), (True, False, 0.0)


@pytest.mark.parametrize(
    ("script", "speaks"),
    [
        ([STANDS] * LIMIT, True),
        ([STANDS] * (LIMIT - 1), False),
        ([IS_IDLE] * 1000 + [STANDS] * LIMIT, True),
        ([IS_IDLE] * 1000, False),  # saves, loads data, compiles, or its user is in a debugger
        ([GOES_ON, MOVES] * 500, False),  # trains, or validates
        (([STANDS] * (LIMIT - 1) + [GOES_ON]) * 20, False),  # other ranks are slow, again and again
        (([STANDS] * (LIMIT - 1) + [IS_IDLE]) * 20, False),
        ([STANDS] * 5 + [(False, True, 1e6)] + [STANDS] * 5, False),  # the machine slept
    ],
)
def test_only_a_gpu_that_does_not_go_on(
    script: list[tuple[bool, bool, float]], speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = looks(script, monkeypatch)
    assert ("the GPU has not gone on, and the host waits for it in here" in said) == speaks


def test_a_busy_gpu_is_seen_on_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, idle, broken = (SimpleNamespace(query=each) for each in (lambda: False, lambda: True, lambda: 1 / 0))
    assert not standing.device_is_busy(), "without a GPU"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: pytest.fail("it is the looking thread's GPU's"))
    monkeypatch.setattr(standing, "streams", [idle])
    assert not standing.device_is_busy()
    standing.streams.append(busy)  # type: ignore[arg-type]
    assert standing.device_is_busy()
    broken.query = lambda: (_ for _ in ()).throw(RuntimeError("an illegal memory access"))
    monkeypatch.setattr(standing, "streams", [broken])
    assert not standing.device_is_busy()


def test_the_default_stream_is_noted_by_the_thread_that_has_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's current GPU is the node's first one, whatever the rank."""
    gpu = threading.local()
    accelerator = SimpleNamespace(set_device=lambda number: setattr(gpu, "number", number), device_name=lambda: "cuda")
    monkeypatch.setattr(process.deepspeed, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(process.deepspeed, "init_distributed", lambda **_: None)
    for name in ("prepare_environment", "set_world_timeout", "wait_for_all", "forget_names"):
        monkeypatch.setattr(process, name, lambda *_: None)
    monkeypatch.setattr(process.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    of_gpu = [SimpleNamespace(query=lambda number=number: number != 3) for number in range(4)]
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: of_gpu[getattr(gpu, "number", 0)])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(standing, "streams", [])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert process.connect()
    seen: list[bool] = []
    looks_on = threading.Thread(target=lambda: seen.append(standing.device_is_busy()))
    looks_on.start()
    looks_on.join()
    assert seen == [True]


def test_a_thread_that_stands() -> None:
    """It is told from one that runs; its place has the function of this package and the innermost one."""
    go_on, runs = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    runs.wait()
    place = Standing(thread)
    while place.has_moved():
        pass
    assert "wait (threading.py:" in place.place and not place.waits_for_ranks
    go_on.set()
    thread.join()
    assert place.has_moved() and not Standing().waits_for_ranks


def stands_in_a_layer() -> Any:
    """The host waits for row counts that never come."""
    layer = ScMoE(8, MLP(GPTSettings(2, 8, 2, 64, 8, ffn_hidden_size=16)), 4, 2)
    layer.set_deepspeed_parallelism()
    layer.name = "MoE layer 3"
    ended, codes, said = threading.Event(), [], io.StringIO()

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    def synchronize(self: Any) -> None:
        assert ended.wait(60), "nobody has said anything"

    plain = streams.Event.synchronize
    failures.leave, streams.Event.synchronize = leave, synchronize  # type: ignore[assignment, method-assign]
    reporter = failures.FailureReporter("a program")
    standing.reach("the start of iteration 7", 7)
    try:
        with simulated_gpu() as gpu, contextlib.redirect_stderr(said):
            gpu.move(layer)
            StallWatch(0.3, reporter.end, is_busy=lambda: not ended.is_set(), look_s=0.05).start()
            layer(torch.zeros(4, 8, device="cuda"))
    finally:
        streams.Event.synchronize = plain  # type: ignore[method-assign]
    return codes, said.getvalue()


@NEEDS_SIMULATION
def test_its_last_words() -> None:
    for codes, said in run_distributed(stands_in_a_layer, 2):
        assert codes == [1]
        told = next(line for line in said.splitlines() if line.startswith("a program: error: "))
        for part in (
            ", iteration 7: ",
            "in wait (counts.py:",
            "the row counts of MoE layer 3",
            "--distributed-timeout",
        ):
            assert part in told, told


def test_the_error_is_about_communication() -> None:
    error = ExchangeError("communication between ranks", [0, 1], [1], "timed out: for 590 s")
    assert failures.failed_collective(error) is not None
