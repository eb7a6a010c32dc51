"""What two ranks have to get right, each case a function that both ranks run. tests/gpu/test_two_gpus.py has them too.

A case returns how far it is off, the same on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu import losses, pairs
from benchmarks.gpu.device_cases import off
from benchmarks.gpu.setting import LayerShape, Setting
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.process import device

SHAPE = LayerShape("small", {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, 4)
SEQUENCE = 32
LATE_S = 0.05


@dataclass(frozen=True)
class Case:
    """One question to two ranks.

    Attributes:
        tolerance: the most that it may be off, relative to the largest value.
        alone: it changes the process for good, so that no other case may follow in it.
    """

    name: str
    run: Callable[[Setting], float]
    tolerance: float
    alone: bool = False


def wrong(case: Case, setting: Setting) -> str | None:
    """What is wrong with a case; None if nothing is. Runs on every rank."""
    torch.backends.cuda.matmul.allow_tf32 = False
    off = max(gather(case.run(setting)))
    return None if off <= case.tolerance else f"off by {off:.1e}; at most {case.tolerance:.0e}"


def _losses(setting: Setting, **kwargs: Any) -> list[float]:
    return losses.engine_losses(setting, setting.size(10, 2), **{"expert_parallel_size": 2, **kwargs})


def _apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def ep_2_equals_ep_1(setting: Setting) -> float:
    """Losses of two ranks that share the experts, and of two that have all."""
    return _apart(_losses(setting, expert_parallel_size=1), _losses(setting))


def zero_2_equals_zero_1(setting: Setting) -> float:
    """Losses under both stages."""
    return _apart(_losses(setting), _losses(setting, zero_stage=2))


def bf16_on_the_wire(setting: Setting) -> float:
    """Losses with rows in bf16 between the ranks."""
    return _apart(_losses(setting), _losses(setting, wire_dtype="bf16"))


def fp8_on_the_wire(setting: Setting) -> float:
    """Losses with rows in fp8 between the ranks."""
    return _apart(_losses(setting), _losses(setting, wire_dtype="fp8"))


def send_receive_equals_collective(setting: Setting) -> float:
    """Losses with the other primitive."""
    return _apart(_losses(setting, all_to_all="collective"), _losses(setting, all_to_all="send_receive"))


def tp_2_equals_tp_1(setting: Setting) -> float:
    """Losses of a model that two ranks share by tensor parallelism, experts by expert parallelism; the same text."""
    steps = setting.size(10, 2)
    alone = losses.train(losses.model(setting).to(device()), device(), setting, steps)
    tensor.start_tensor_parallel(2)
    shared = losses.model(setting, tensor.tensor_parallel_group(), expert_parallel_size=2)
    for pair in shared.scheduled_pairs():
        pair.layer.set_deepspeed_parallelism()
    return _apart(alone, losses.train(shared.to(device()), device(), setting, steps))


def overlapped_equals_blocking(setting: Setting) -> float:
    """Output and gradients of every slot, in one chunk and in several."""
    pair = _pair()
    schedules = [Schedule(slot) for slot in (1, 2, 3, 4)] + [Schedule((1, 2), 2), Schedule((1, 3, 4), 3)]
    expected = _results(pair, Schedule(1, overlap=False))
    return max(_worst(expected, _results(pair, schedule)) for schedule in schedules)


def a_late_rank_changes_nothing(setting: Setting) -> float:
    """Results while one rank comes late and the other makes and drops small tensors: counts in flight are kept."""
    worst = 0.0
    for dispatch in ("exact", "padded"):
        pair, schedule = _pair(dispatch=dispatch), Schedule((1, 2), 2)
        expected = _results(pair, schedule)
        for late in (0, 1):
            with _churn(pair):
                _come_late(late)
                worst = max(worst, _worst(expected, _results(pair, schedule)))
    return worst


CASES = [
    Case("overlapped equals blocking", overlapped_equals_blocking, 1e-4),
    Case("a late rank changes nothing", a_late_rank_changes_nothing, 1e-4),
    Case("EP 2 equals EP 1", ep_2_equals_ep_1, 1e-4),
    Case("ZeRO-2 equals ZeRO-1", zero_2_equals_zero_1, 1e-4),
    Case("send_receive equals collective", send_receive_equals_collective, 1e-4),
    Case("bf16 on the wire", bf16_on_the_wire, 1e-2),
    Case("fp8 on the wire", fp8_on_the_wire, 3e-2),
    Case("TP 2 equals TP 1", tp_2_equals_tp_1, 1e-4, alone=True),
]


def _pair(**section: object) -> StagedPair:
    fields = {"expert_parallel_size": 2, "drop_tokens": False, **section}
    return pairs.build(SHAPE, SEQUENCE, device(), torch.float32, **fields)


def _results(pair: StagedPair, schedule: Schedule) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(2, SEQUENCE, SHAPE.hidden_size, generator=generator).to(device()).requires_grad_()
    pair.schedule = schedule
    output = pair(hidden)
    loss = output.hidden.square().mean() + output.l_aux
    return [output.hidden.detach(), *torch.autograd.grad(loss, [hidden, *pair.parameters()], materialize_grads=True)]


def _worst(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(off(here, there) for here, there in zip(expected, found, strict=True))


def _come_late(rank: int) -> None:
    """The rank's device is busy for a while; its host goes on, as hosts do."""
    if dist.get_rank() != rank:
        return
    if device().type == "cuda":
        torch.cuda._sleep(int(LATE_S * 1.5e9))  # cycles
    else:
        time.sleep(LATE_S)


@contextmanager
def _churn(pair: StagedPair) -> Iterator[None]:
    """Makes and drops tensors as small as row counts while rows are in flight: they get whatever memory is free."""

    def churn(*_: object) -> None:
        for _ in range(50):
            torch.full((16,), 2**40, dtype=torch.int64, device=device())

    hooks = [block.attention.register_forward_pre_hook(churn) for block in pair.blocks]
    hooks.append(pair.blocks[0].mlp.register_forward_pre_hook(churn))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
