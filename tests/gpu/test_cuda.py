"""The CUDA path on one device: same routing and results as on the CPU, grouped experts, schedules alike."""

from __future__ import annotations

import itertools

import pytest
import torch

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.experts import product_for
from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import Recorder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def build_pair(dispatch: str = "exact", drop_tokens: bool = True, **section: object) -> StagedPair:
    fields = {"num_experts": 4, "dispatch": dispatch, "drop_tokens": drop_tokens, "use_rts": False, **section}
    config = ScMoEConfig.from_deepspeed({"scmoe": fields})
    pair = make_pair(GPTSettings(2, 64, 4, 64, 32), config, 4, config.position, 32)
    initialize_parameters(pair, 3, 0.1, 1)
    return pair


def results(pair: StagedPair, hidden: torch.Tensor, used: torch.Tensor | None = None) -> list[torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = pair(hidden, used)
    loss = output.hidden.float().square().mean() + output.l_aux
    return [output.hidden, *torch.autograd.grad(loss, [hidden, *pair.parameters()], materialize_grads=True)]


@pytest.mark.parametrize("k", [1, 2])
def test_equals_the_cpu(k: int) -> None:
    hidden = torch.randn(2, 32, 64)
    pair = build_pair(drop_tokens=False, top_k=k)
    on_cpu = results(pair, hidden)
    for cpu, gpu in zip(on_cpu, results(pair.cuda(), hidden.cuda()), strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("softmax", ["all", "chosen", "kept"])
def test_padding_and_weights_equal_the_cpu(softmax: str, k: int) -> None:
    """With a mask that lies on either device."""
    hidden, used = torch.randn(2, 32, 64), torch.arange(32) < torch.tensor([[32], [9]])
    pair = build_pair(drop_tokens=False, top_k=k, gate_softmax=softmax)
    on_cpu = results(pair, hidden, used)
    pair.cuda()
    for mask in (used, used.cuda()):
        for cpu, gpu in zip(on_cpu, results(pair, hidden.cuda(), mask), strict=True):
            torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("drop_tokens", [True, False])
def test_exact_equals_padded(drop_tokens: bool) -> None:
    hidden = torch.randn(2, 32, 64, device="cuda")
    padded, exact = (
        results(build_pair(d, drop_tokens, capacity_factor=0.6).cuda(), hidden) for d in ("padded", "exact")
    )
    for a, b in zip(padded, exact, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_every_slot_with_and_without_overlap() -> None:
    pair, hidden = build_pair(position="pos3").cuda(), torch.randn(2, 32, 64, device="cuda")
    runs = []
    for slot in range(1, 6):
        for overlap in (True, False):
            pair.schedule = Schedule(slot, overlap=overlap)
            runs.append(results(pair, hidden)[0])
    assert all(torch.equal(output, runs[0]) for output in runs)


def test_grouped_experts_in_bf16() -> None:
    pair, hidden = build_pair(drop_tokens=False).cuda().bfloat16(), torch.randn(2, 32, 64, device="cuda").bfloat16()
    experts = pair.blocks[-1].moe.deepspeed_moe.experts
    if kernels_of(hidden).grouped_product is None:
        pytest.skip("no grouped product for this GPU: on compute capability 8.x it takes Triton")
    assert product_for(experts, hidden.view(-1, 64)) is not None
    grouped = results(pair, hidden)
    for expert in experts.deepspeed_experts:
        expert.register_forward_hook(lambda *_: None)  # a hooked expert is called as a module of its own
    assert product_for(experts, hidden.view(-1, 64)) is None
    for a, b in zip(grouped, results(pair, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_chunks_change_last_bits_only() -> None:
    pair, hidden = build_pair(position="pos2").cuda(), torch.randn(2, 32, 64, device="cuda")
    pair.schedule = Schedule(2)
    whole = results(pair, hidden)
    for slots in ((1, 1), (2, 3), (1, 2, 4)):
        pair.schedule = Schedule(slots, len(slots))
        for found, expected in zip(results(pair, hidden), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_spans_are_the_devices_own_times() -> None:
    """One lane, in the order of the program, though the host enqueues all of it at once."""
    pair, hidden = build_pair(position="pos2").cuda(), torch.randn(2, 32, 64, device="cuda")
    recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))
    pair.recorder = recorder.pair(0)
    results(pair, hidden)
    spans = recorder.spans()
    names = {phase: [span.name for span in spans if span.phase == phase] for phase in ("forward", "backward")}
    assert names["backward"] == names["forward"][::-1]
    assert names["forward"].index("mlp") < names["forward"].index("experts") < names["forward"].index("attention")
    for before, after in itertools.pairwise(spans):
        assert before.end_ms <= after.start_ms
