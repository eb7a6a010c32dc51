"""With overlap and without: the same bits, forward and backward, for every position and slot; and in which order."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import PlainPair, StagedPair
from scmoe_ds.overlap.executor import Operator, backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import Recorder, Span

SETTINGS = GPTSettings(2, 16, 4, 64, 12, hidden_dropout=0.1)


def build_pair(position: str, dispatch: str = "exact") -> StagedPair:
    section = {
        "num_experts": 4,
        "expert_parallel_size": 2,
        "position": position,
        "capacity_factor": 1.0,
        "dispatch": dispatch,
    }
    pair = make_pair(SETTINGS, ScMoEConfig.from_deepspeed({"scmoe": section}), 4, position, 12)
    initialize_parameters(pair, 3, 0.4, 1)
    pair.blocks[-1].moe.set_deepspeed_parallelism()
    return pair


def forward_and_backward(pair: StagedPair, schedule: Schedule) -> list[torch.Tensor]:
    pair.schedule = schedule
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(2, 12, 16, requires_grad=True)
    output = pair(hidden)
    loss = output.hidden.square().mean() + output.l_aux
    return [output.hidden, *torch.autograd.grad(loss, [hidden, *pair.parameters()])]


def compare(position: str, dispatch: str) -> int:
    pair = build_pair(position, dispatch)
    slots = len(backbone(pair)) + 1
    reference = forward_and_backward(pair, Schedule(1, overlap=False))
    for slot in range(1, slots + 1):
        for overlap in (False, True):
            results = forward_and_backward(pair, Schedule(slot, overlap=overlap))
            for found, expected in zip(results, reference, strict=True):
                assert torch.equal(found, expected), (slot, overlap)
    return slots


def compare_chunks(position: str, dispatch: str) -> float:
    """Largest difference of any chunked schedule from the serial one, over output and all gradients, relative to the
    largest value of each."""
    pair = build_pair(position, dispatch)
    slots = range(1, len(backbone(pair)) + 2)
    reference = forward_and_backward(pair, Schedule(1, overlap=False))
    worst = 0.0
    for chunks in (2, 3):
        for chosen in itertools.combinations_with_replacement(slots, chunks):
            for overlap in (False, True):
                for found, expected in zip(
                    forward_and_backward(pair, Schedule(chosen, chunks, overlap)), reference, strict=True
                ):
                    worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)))
    return worst


def compare_with_deepspeed(architecture: str, dispatch: str) -> float:
    """The strong baselines, in one chunk and in three, against DeepSpeed's own layers with the same weights."""
    stock = {"pipelined_topk": "topk", "overlapped_shared_expert": "shared_expert"}[architecture]
    results = []
    for name, slots, chunks in [(stock, 0, 0), (architecture, 1, 1), (architecture, (1,) * 3, 3)]:
        section = {"num_experts": 4, "expert_parallel_size": 2, "architecture": name, "dispatch": dispatch}
        config = ScMoEConfig.from_deepspeed({"scmoe": section})
        pair = make_pair(SETTINGS, config, 4, "pos2", 12)
        initialize_parameters(pair, 3, 0.4, 1)
        pair.blocks[-1].moe.set_deepspeed_parallelism()
        results.append(forward_and_backward(pair, Schedule(slots, chunks)) if slots else plain(pair))
    return max(
        float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        for result in results[1:]
        for found, expected in zip(result, results[0], strict=True)
    )


def plain(pair: PlainPair) -> list[torch.Tensor]:
    pair.schedule = None  # type: ignore[assignment]
    return forward_and_backward(pair, None)  # type: ignore[arg-type]


def two_in_flight() -> bool:
    """Two routed sets at once, one of which needs no gradient, finished in the other order."""
    layer = build_pair("pos1").blocks[-1].moe
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


def recorded(slots: tuple[int, ...]) -> dict[tuple[str, str], list[str]]:
    """Names of the spans of one step of Pos-2, by lane and phase, in the order of their starts."""
    pair = build_pair("pos2")
    recorder = Recorder(torch.device("cpu"))
    pair.recorder = recorder.pair(0)
    forward_and_backward(pair, Schedule(slots, len(slots)))
    spans = recorder.spans()
    assert all(span.start_ms <= span.end_ms and span.layer == 0 for span in spans)
    compute = [span for span in spans if span.lane != "communication"]
    for before, after in itertools.pairwise(compute):
        assert before.end_ms <= after.start_ms, f"one lane, two things at once: {before} {after}"
    names: dict[tuple[str, str], list[str]] = {}
    for span in spans:
        chunk = f" {span.chunk}" if span.name in ("experts", "dispatch", "combine") and len(slots) > 1 else ""
        names.setdefault((span.lane, span.phase), []).append(span.name + chunk)
    return names


def slow_transfer() -> tuple[list[Span], bool]:
    """A transfer that is complete long before anyone waits for it; and whether its buffers are gone after the step."""
    pair = build_pair("pos2")
    over, buffers = threading.Event(), []
    plain_launch = Transport.launch

    def launch(self, received, rows, receive, send):  # type: ignore[no-untyped-def]
        wait = plain_launch(self, received, rows, receive, send)
        if not rows.is_floating_point():
            return wait
        buffers.extend([weakref.ref(received), weakref.ref(rows)])

        def until_seen() -> None:
            wait()
            over.set()

        return until_seen

    Transport.launch = launch  # type: ignore[method-assign]
    try:
        recorder = Recorder(torch.device("cpu"))
        pair.recorder = recorder.pair(0)

        def hold(module: object, inputs: object) -> None:
            assert over.wait(60)
            time.sleep(0.2)  # the watching thread has yet to note the time

        pair.blocks[0].mlp.register_forward_pre_hook(hold)
        hidden = pair(torch.randn(2, 12, 16, requires_grad=True)).hidden
        hidden.sum().backward()
        del hidden
    finally:
        Transport.launch = plain_launch  # type: ignore[method-assign]
    pair.zero_grad()
    gc.collect()
    return recorder.spans(), all(reference() is None for reference in buffers) and len(buffers) == 8


def event_order(slot: int, overlap: bool) -> tuple[list[str], list[str]]:
    """Launches, waits and operators as they happened in one forward and one backward pass of Pos-2."""
    events: list[str] = []
    pair = build_pair("pos2")
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
            events.append(operator.kind)
            result = operator.run(stream)
            if result.shared is None:
                return type(result)(_Log.apply(result.hidden, operator.kind, events))
            return type(result)(result.hidden, result.moe_input, _Log.apply(result.shared, operator.kind, events))

        return replace(operator, run=step)

    operators = pair.operators()
    pair.operators = lambda: [logged(operator) for operator in operators]  # type: ignore[method-assign]
    Transport.launch = launch  # type: ignore[method-assign]
    try:
        pair.schedule = Schedule(slot, overlap=overlap)
        output = pair(torch.randn(2, 12, 16, requires_grad=True))
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


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_chunked_equals_serial(position: str, dispatch: str) -> None:
    assert max(run_distributed(compare_chunks, 2, position, dispatch)) < 1e-6


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("architecture", ["pipelined_topk", "overlapped_shared_expert"])
def test_strong_baselines_compute_what_deepspeed_does(architecture: str, dispatch: str) -> None:
    assert max(run_distributed(compare_with_deepspeed, 2, architecture, dispatch)) < 1e-5


BACKWARD = ["merge", "decode", "shared", "attention", "mlp", "encode", "gate", "shortcut norm", "attention before tap"]


def test_the_trace_has_everything_in_order() -> None:
    for names in run_distributed(recorded, 2, (2,)):
        compute = list(reversed(BACKWARD))
        compute.insert(compute.index("attention"), "experts")
        assert names["compute", "forward"] == compute
        assert names["compute", "backward"] == compute[::-1]
        assert names["communication", "forward"] == names["wait", "forward"] == ["counts", "dispatch", "combine"]
        assert names["communication", "backward"] == names["wait", "backward"] == ["combine", "dispatch"]


def test_chunks_of_the_trace_have_their_own_slots() -> None:
    """The first chunk's experts after the MLP, the second's after attention: backward is the mirror."""
    for names in run_distributed(recorded, 2, (2, 3)):
        compute = list(reversed(BACKWARD))
        compute.insert(compute.index("attention"), "experts 0")
        compute.insert(compute.index("shared"), "experts 1")
        assert names["compute", "forward"] == compute
        assert names["compute", "backward"] == compute[::-1]
        travelled = ["dispatch 0", "dispatch 1", "combine 0", "combine 1"]
        assert names["communication", "forward"] == ["counts", *travelled]
        assert names["communication", "backward"] == travelled[::-1]


def test_a_transfer_ends_when_it_is_complete_not_when_it_is_waited_for() -> None:
    for spans, buffers_gone in run_distributed(slow_transfer, 2):
        by_lane = {span.lane: span for span in spans if (span.name, span.phase) == ("dispatch", "forward")}
        mlp = next(span for span in spans if (span.name, span.phase) == ("mlp", "forward"))
        assert by_lane["communication"].end_ms < mlp.end_ms <= by_lane["wait"].start_ms
        assert buffers_gone, "both buffers of each all-to-all are dropped once it is consumed"


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
