"""With overlap and without: the same bits, forward and backward, for every position and slot; and in which order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from scmoe_ds.config import ScMoEConfig
from scmoe_ds.models.blocks import ScheduledRun
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap.executor import Operator
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.overlap.transport import Transport
from tests.helpers.distributed import run_distributed

SETTINGS = GPTSettings(2, 16, 4, 64, 12, hidden_dropout=0.1)


def make_run(position: str, dispatch: str = "exact") -> ScheduledRun:
    section = {"num_experts": 4, "expert_parallel_size": 2, "position": position, "capacity_factor": 1.0,
               "dispatch": dispatch}  # fmt: skip
    run = ScheduledRun(SETTINGS, ScMoEConfig.from_deepspeed({"scmoe": section}), 4, position, 12)
    initialize_parameters(run, 3, 0.4, 1, dist.get_rank())
    run.blocks[-1].moe.set_deepspeed_parallelism()
    return run


def forward_and_backward(run: ScheduledRun, schedule: Schedule) -> list[torch.Tensor]:
    run.schedule = schedule
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(2, 12, 16, requires_grad=True)
    output = run(hidden)
    loss = output.hidden.square().mean() + output.l_aux
    return [output.hidden, *torch.autograd.grad(loss, [hidden, *run.parameters()])]


def compare(position: str, dispatch: str) -> int:
    run = make_run(position, dispatch)
    slots = len(run.backbone()) + 1
    reference = forward_and_backward(run, Schedule(1, overlap=False))
    for slot in range(1, slots + 1):
        for overlap in (False, True):
            results = forward_and_backward(run, Schedule(slot, overlap=overlap))
            for found, wanted in zip(results, reference, strict=True):
                assert torch.equal(found, wanted), (slot, overlap)
    return slots


def two_in_flight() -> bool:
    """Two routed sets at once, one of which needs no gradient, finished in the other order."""
    layer = make_run("pos1").blocks[-1].moe
    torch.manual_seed(dist.get_rank())
    taps = [torch.randn(2, 12, 16), torch.randn(2, 12, 16, requires_grad=True)]
    x = torch.randn(2, 12, 16)
    layer.eval()  # no random token selection, whose numbers would depend on the order
    flights = [layer.begin(tap) for tap in taps]
    for routed in reversed(flights):
        routed.run_experts()
    together = [layer.finish(routed, x)[0] for routed in flights]
    for tap, found in zip(taps, together, strict=True):
        torch.testing.assert_close(found, layer(x, shortcut=tap)[0], rtol=0, atol=0)
    (grad,) = torch.autograd.grad(together[1].sum() + together[0].sum(), taps[1])
    return bool(grad.abs().sum() > 0)


class _Log(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name, events):  # type: ignore[no-untyped-def]
        ctx.name, ctx.events = name, events
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.events.append(ctx.name)
        return grad, None, None


def event_order(slot: int, overlap: bool) -> tuple[list[str], list[str]]:
    """Launches, waits and operators as they happened in one forward and one backward pass of Pos-2."""
    events: list[str] = []
    run = make_run("pos2")
    plain_launch = Transport.launch

    def launch(self, received, rows, receive, send):  # type: ignore[no-untyped-def]
        wait = plain_launch(self, received, rows, receive, send)
        if not rows.is_floating_point():
            return wait  # row counts
        events.append("launch")

        def logged_wait() -> None:
            events.append("wait")
            wait()

        return logged_wait

    def logged(operator: Operator) -> Operator:
        def step(stream):  # type: ignore[no-untyped-def]
            events.append(operator.name)
            result = operator.run(stream)
            if result.shared is None:
                return type(result)(_Log.apply(result.hidden, operator.name, events))
            return type(result)(result.hidden, result.moe_input, _Log.apply(result.shared, operator.name, events))

        return Operator(operator.name, step)

    operators = run.operators()
    run.operators = lambda: [logged(operator) for operator in operators]  # type: ignore[method-assign]
    Transport.launch = launch  # type: ignore[method-assign]
    try:
        run.schedule = Schedule(slot, overlap=overlap)
        output = run(torch.randn(2, 12, 16, requires_grad=True))
        forward, events[:] = list(events), []
        output.hidden.sum().backward()
    finally:
        Transport.launch = plain_launch  # type: ignore[method-assign]
    return forward, events


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_overlapped_equals_serial_bitwise(position: str, dispatch: str) -> None:
    slots = {"pos1": 3, "pos2": 4, "pos3": 5}[position]
    assert run_distributed(compare, 2, position, dispatch) == [slots, slots]


def test_several_routed_in_flight() -> None:
    assert run_distributed(two_in_flight, 2) == [True, True]


def test_backward_mirrors_forward() -> None:
    for forward, backward in run_distributed(event_order, 2, 2, True):
        # The attention of the first block precedes the tap.
        assert forward == ["attention", "launch", "mlp", "wait", "launch", "attention", "shared", "wait"]
        assert backward == ["launch", "shared", "attention", "wait", "launch", "mlp", "wait", "attention"]


def test_without_overlap_every_launch_is_waited_for_at_once() -> None:
    for forward, backward in run_distributed(event_order, 2, 2, False):
        assert forward == ["attention", "launch", "wait", "mlp", "launch", "wait", "attention", "shared"]
        assert backward == ["launch", "wait", "shared", "attention", "launch", "wait", "mlp", "attention"]
