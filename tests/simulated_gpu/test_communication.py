"""The communication on a device: which stream launches what, how many kernels it costs, which primitive is taken."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds.comm import all_to_all
from scmoe_ds.comm.all_to_all import SplitSizes, prepare, start
from scmoe_ds.comm.side_stream import side_stream
from scmoe_ds.comm.transport import METHODS, Probe, Transport
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.planner.auto import NCCL_MARGIN, choose_all_to_all
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.trace.recorder import SILENT
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
D, CHUNK = 3, 4
CASES = list(itertools.product(METHODS, (1, 2), (0, 2), (False, True), (None, "bf16")))
"""Primitive, chunks, rows that stay, deferred, number format of the wire."""


def there_and_back(rows: Tensor, transport: Transport, chunks: int, deferred: bool, wire: str | None) -> Tensor:
    """A dispatch in chunks, and a combine of each; what is behind them is not sent."""
    equal = SplitSizes.plain([CHUNK // 2] * 2, [CHUNK // 2] * 2)
    flights = prepare(rows, transport, False, wire, [None] * chunks, deferred)
    backbone = rows.detach().sum()  # goes on, and a deferred launch does not wait for it
    for chunk, flight in enumerate(flights):
        flight.send(equal, chunk * CHUNK)
    combines = [start(flight.wait() * (dist.get_rank() + 1), transport, wire_dtype=wire) for flight in flights]
    return torch.stack([(combine.wait() * (number + 1)).sum() for number, combine in enumerate(combines)]) + backbone


def exchanges() -> list[Any]:
    """Of each case: findings, and by pass the launches of communication that are no transfers."""
    found = []
    for method, chunks, stayed, deferred, wire in CASES:
        transport = Transport(dist.group.WORLD, method)
        rows = torch.randn(chunks * CHUNK + stayed, D, requires_grad=True)
        (expected,) = torch.autograd.grad(there_and_back(rows, transport, chunks, deferred, wire).sum(), rows)
        with simulated_gpu((8, 0)) as gpu:
            on_device = gpu.move(rows)
            there_and_back(on_device, transport, chunks, deferred, wire).sum().backward()
            same = torch.equal(gpu.peek(on_device.grad), expected)
            of_comm = {each: n for each, n in gpu.launches.items() if each.part == "dispatch and combine"}
            transfers = {
                phase: sum(n for each, n in of_comm.items() if each.phase == phase and "nccl" in each.operator)
                for phase in ("forward", "backward")
            }
            others = sorted(f"{each.phase} {each.operator}" for each in of_comm if "nccl" not in each.operator)
            found.append((same, list(gpu.findings), sum(gpu.host_waits.values()), transfers, others))
    return found


def test_an_exchange_costs_its_transfers() -> None:
    """Chunks are put together, and zeros added for rows that stayed, without a copy of the gradient."""
    for results in run_distributed(exchanges, 2):
        for (method, chunks, stayed, _, wire), (same, findings, waits, transfers, others) in zip(
            CASES, results, strict=True
        ):
            assert same and not findings and not waits
            assert transfers == {"forward": 2 * chunks, "backward": 2 * chunks}
            allowed = {"backward zero_"} if stayed else set()
            if method == "send_receive":
                allowed |= {"forward copy_", "backward copy_"}
            if wire is None:
                assert set(others) == allowed


def test_only_a_deferred_launch_leaves_the_main_stream() -> None:
    assert all(all(results) for results in run_distributed(streams_of_launches, 2))


def streams_of_launches() -> list[bool]:
    """Memory that was allocated on the side stream is of no use to the computation."""
    asked: list[torch.device] = []
    plain = all_to_all.side_stream
    all_to_all.side_stream = lambda device: (asked.append(device), plain(device))[1]  # type: ignore[assignment]
    transport, found = Transport(dist.group.WORLD), []
    for deferred in (False, True):
        with simulated_gpu() as gpu:
            rows = gpu.move(torch.randn(CHUNK, D, requires_grad=True))
            there_and_back(rows, transport, 1, deferred, None).sum().backward()
            found.append(len(asked) == deferred and not gpu.findings)
    return found


def test_threads_share_the_side_stream() -> None:
    with simulated_gpu(), ThreadPoolExecutor(4) as pool:
        device = torch.device("cuda", 0)
        assert len(set(pool.map(lambda _: side_stream(device), range(8)))) == 1


@pytest.mark.parametrize(
    ("collective", "other", "on_nccl", "on_gloo"),
    [
        (1.05, 1.0, "collective", "send_receive"),
        (1.2, 1.0, "send_receive", "send_receive"),
        (1, 1, *["collective"] * 2),
    ],
)
def test_collective_unless_another_wins(collective: float, other: float, on_nccl: str, on_gloo: str) -> None:
    probe = Probe({"collective": collective, "send_receive": other}, 1, 1)
    assert (probe.choice(NCCL_MARGIN), probe.choice()) == (on_nccl, on_gloo)


def calibrated() -> Any:
    """A pair that is timed and compared; the findings, and the passes that took."""
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, "expert_parallel_size": 2}})
    pair = make_pair(GPTSettings(2, 8, 2, 64, 6), config, 4, config.position, 6)
    assert isinstance(pair, StagedPair)
    initialize_parameters(pair, 3, 0.4, 1)
    pair.layer.set_deepspeed_parallelism()
    with simulated_gpu() as gpu:
        gpu.move(pair)
        overlap = OverlapConfig(num_chunks=1, calibration_steps=1)
        calibrator, passes = Calibrator([pair], overlap, torch.device("cuda", 0)), 0
        while calibrator.calibrating or calibrator.comparison is not None:
            calibrator.begin()
            output = pair(torch.randn(1, 6, 8, device="cuda").requires_grad_())
            (output.hidden.square().mean() + output.l_aux).backward()
            passes += 1
        return list(gpu.findings), passes, pair.recorder is SILENT


def test_calibration_and_comparison() -> None:
    """Two passes to warm up, three timed ones, four and eight with and without overlap in turn, and the first after."""
    assert run_distributed(calibrated, 2) == [([], 2 + 3 + 4 + 8 + 1, True)] * 2


def choices() -> list[str]:
    """Four ranks on two nodes."""
    layer = ScMoE(8, MLP(GPTSettings(2, 8, 2, 64, 8, ffn_hidden_size=16)), 4, 4)
    layer.set_deepspeed_parallelism()
    model, layout, told = nn.ModuleList([layer]), Layout(4, 1, 4), []
    import scmoe_ds.planner.auto as auto

    auto.nodes_of_ranks = lambda: ["a", "a", "b", "b"]
    chosen = choose_all_to_all(model, "hierarchical", layout, 8)
    assert chosen is not None and chosen.method == "hierarchical"
    with simulated_gpu() as gpu:
        gpu.move(model)
        with pytest.raises(ScMoEConfigError) as caught:
            choose_all_to_all(model, "hierarchical", layout, 8)
        told.append(str(caught.value))
        automatic = choose_all_to_all(model, "auto", layout, 8)
        assert automatic is not None and not gpu.findings
    return [*told, automatic.method]


def test_hierarchical_is_for_cpus() -> None:
    for said, automatic in run_distributed(choices, 4):
        assert 'scmoe.all_to_all = "hierarchical": is for CPUs' in said and "collective, send_receive or auto" in said
        assert automatic in METHODS
