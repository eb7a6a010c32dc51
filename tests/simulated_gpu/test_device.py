"""The device itself: what it reports, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lab.distributed import free_port
from tests.simulated_gpu.device import NEEDS_SIMULATION, fused, simulated_gpu
from tests.simulated_gpu.gpu import Gpu
from tests.simulated_gpu.nccl import COLLECTIVES

pytestmark = NEEDS_SIMULATION


@pytest.fixture
def slow_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's threads let go of tensors late; `gpu` has to come after it."""
    held = []

    def holding(start: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: (held.append(args), start(*args, **kwargs))[1]

    for name in COLLECTIVES.keys() & vars(dist.ProcessGroup).keys():
        monkeypatch.setattr(dist.ProcessGroup, name, holding(getattr(dist.ProcessGroup, name)))


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with simulated_gpu() as device:
        yield device


@pytest.fixture
def group() -> None:
    """A world of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)


def kinds(gpu: Gpu) -> list[str]:
    return [finding.split(":")[0] for finding in gpu.findings]


def waits(gpu: Gpu) -> list[str]:
    return [wait.split(" at ")[0] for wait in gpu.host_waits]


def test_values_waits_and_launches() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    (expected,) = torch.autograd.grad((x @ weight).relu().sum(), weight)
    with simulated_gpu() as gpu:
        moved = gpu.move(weight)
        loss = (gpu.move(x) @ moved).relu().sum()
        assert gpu.launched() == gpu.launched("forward") == 3
        (grad,) = torch.autograd.grad(loss, moved)
        assert gpu.launched("backward", operator="mm") == 1 and not gpu.host_waits
        assert loss.item() > 0 and bool(loss > 0) and len(loss.view(1).tolist()) == 1
        assert torch.equal(gpu.peek(grad), expected) and not gpu.findings
    assert "tests/simulated_gpu/test_device.py" in next(iter(gpu.host_waits))
    assert sum(gpu.host_waits.values()) == 3


def test_modules_keep_their_marks_and_share_what_they_shared(gpu: Gpu) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight
    model[0].weight.allreduce = False  # type: ignore[attr-defined]
    gpu.move(model)
    assert model[1].weight is model[0].weight and model[0].weight.allreduce is False
    assert isinstance(model[0].weight, nn.Parameter) and all(each.is_cuda for each in model.state_dict().values())
    model(torch.zeros(2, dtype=torch.int64, device="cuda")).sum().backward()
    assert model[0].weight.grad.device == torch.device("cuda", 0) and not gpu.findings and not gpu.host_waits
    model[0].weight.data = model[0].weight.data[:4]
    assert gpu.peek(model[0].weight).shape == (4, 4)


def test_operators_make_their_tensors_on_the_device(gpu: Gpu) -> None:
    x = torch.ones(2, 1, 4, 4, device="cuda")
    F.one_hot(x.long()[0, 0, 0], 3) + F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.1).sum()
    x.new_tensor([1, 2])

    def repeated(y: torch.Tensor) -> torch.Tensor:
        return y.exp() * F.one_hot(y.detach().long()[0, 0, 0], 3)[:, :1]

    checkpoint(repeated, x.requires_grad_(), use_reentrant=False).sum().backward()
    torch.autograd.grad(checkpoint(repeated, x, use_reentrant=False).sum(), x)
    assert not gpu.findings


def test_races(gpu: Gpu) -> None:
    side, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x[2:] += 1
    x[:2] += 1  # other bytes
    assert not gpu.findings
    read = x.clone()
    assert kinds(gpu) == ["race"] and "test_device.py" in gpu.findings[0]
    gpu.reset()
    torch.cuda.current_stream().wait_event(side.record_event())
    x.copy_(read)
    assert not gpu.findings


@pytest.mark.parametrize("remedy", ["none", "record_stream", "wait", "synchronize"])
def test_memory_that_is_freed_while_another_stream_reads_it(gpu: Gpu, remedy: str) -> None:
    side, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    if remedy == "record_stream":
        x.record_stream(side)
    elif remedy == "wait":
        torch.cuda.current_stream().wait_stream(side)
    elif remedy == "synchronize":
        torch.cuda.synchronize()
    view = x[1:]
    del x
    assert not gpu.findings
    del view
    assert kinds(gpu) == (["use after free"] if remedy == "none" else [])
    assert y.is_cuda


def test_host_reads_of_copies(gpu: Gpu) -> None:
    copy = torch.ones(4, device="cuda").to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    reads: list[Callable[[], object]] = [copy.tolist, copy.numpy, copy[0].item, lambda: bool(copy[0] > 0), copy.sum]
    for read in reads:
        gpu.reset()
        read()
        assert kinds(gpu) == ["too early"] and not gpu.host_waits
    gpu.reset()
    event.synchronize()
    assert [read() for read in reads] and not gpu.findings and waits(gpu) == ["event.synchronize"]


def test_copies_to_the_host(gpu: Gpu) -> None:
    x = torch.ones(4, device="cuda", requires_grad=True)
    x.cpu().sum().backward()
    assert gpu.peek(x.grad).tolist() == [1] * 4 and "a blocking copy to the host" in waits(gpu)
    gpu.reset()
    target = torch.empty(4)
    target.copy_(x.detach(), non_blocking=True)
    assert waits(gpu) == ["a copy to pageable memory"] and target.tolist() == [1] * 4 and not gpu.findings
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_copies_to_the_device(gpu: Gpu) -> None:
    source = torch.ones(4)
    source.to("cuda"), source.to("cuda", non_blocking=True), torch.tensor([1], device="cuda")
    assert sum(gpu.host_waits.values()) == 3
    gpu.reset()
    pinned = source.pin_memory()
    assert pinned.is_pinned() and torch.empty(2, pin_memory=True).is_pinned() and not source.is_pinned()
    source.pin_memory().to("cuda", non_blocking=True)  # torch's allocator keeps it until the copy is over
    pinned.to("cuda", non_blocking=True)
    assert pinned.sum() == 4 and not gpu.host_waits and not gpu.findings
    pinned.zero_()
    assert kinds(gpu) == ["too early"]


def test_operators_that_wait(gpu: Gpu) -> None:
    x = torch.arange(4, device="cuda")
    x[x > 1], x.nonzero(), x.repeat_interleave(x), x.bincount()
    assert len(gpu.host_waits) == 4
    gpu.reset()
    x.repeat_interleave(x, output_size=6), x[x], torch.where(x > 1, x, 0), x.max()
    x[x > 1] = 0
    assert not gpu.host_waits


def test_tensors_name_devices(gpu: Gpu) -> None:
    x, host = torch.ones(4, device="cuda", dtype=torch.float16), torch.ones(4)
    assert host.to(x).is_cuda and x.to(x) is x and x.to(host).is_cpu
    assert (host.to(x).dtype, x.to(host).dtype) == (torch.float16, torch.float32)


def test_mixes_of_devices(gpu: Gpu) -> None:
    x = torch.ones(4, device="cuda")
    x * torch.tensor(2.0), x[torch.tensor([1])]
    assert not gpu.findings and waits(gpu) == ["aten::index with an index on the host"]
    x * torch.ones(4)
    assert kinds(gpu) == ["device mix"]


@pytest.mark.usefixtures("group", "slow_gloo")
@pytest.mark.parametrize("waits_on", ["main", "side", "nothing"])
def test_nccl_keeps_tensors_until_the_wait(gpu: Gpu, waits_on: str) -> None:
    """That wait orders one stream. Memory of another stream is free too early."""
    rows, received, side = torch.ones(4, device="cuda"), torch.empty(4, device="cuda"), torch.cuda.Stream()
    work = dist.all_to_all_single(received, rows, async_op=True)
    del rows
    assert not gpu.findings
    if waits_on != "nothing":
        with torch.cuda.stream(side if waits_on == "side" else torch.cuda.current_stream()):
            work.wait()
    assert kinds(gpu) == (["use after free"] if waits_on == "side" else [])
    received.sum()
    assert ("race" in kinds(gpu)) == (waits_on != "main")


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:`torch.distributed.*is deprecated:FutureWarning")  # the names of older versions
def test_collectives(gpu: Gpu) -> None:
    x, parts = torch.ones(4, device="cuda"), [torch.empty(4, device="cuda")]
    dist.all_reduce(x), dist.broadcast(x, 0), dist.all_gather(parts, x), dist.reduce(x, 0)
    dist.all_gather_into_tensor(parts[0], x), dist.reduce_scatter_tensor(parts[0], x), dist.reduce_scatter(x, parts)
    dist.all_to_all_single(parts[0], x), dist.all_to_all(parts, [x])
    assert gpu.peek(x).tolist() == gpu.peek(parts[0]).tolist() == [1] * 4
    assert sum(count for launch, count in gpu.launches.items() if launch.operator.startswith("nccl ")) == 9
    assert not gpu.host_waits and not gpu.findings
    dist.all_gather_object([None], "x"), dist.barrier()
    assert {"a collective of objects", "a barrier"} == set(waits(gpu)) and not gpu.findings
    dist.all_reduce(torch.ones(1))
    assert kinds(gpu) == ["device mix"]


def test_a_kernel_of_several_operators(gpu: Gpu) -> None:
    swiglu = fused("swiglu", lambda gate, up: F.silu(gate) * up)
    x = torch.ones(4, device="cuda")
    gpu.reset()
    assert swiglu(x, x).is_cuda and gpu.launched() == gpu.launched(operator="swiglu") == 1


def test_threads(gpu: Gpu) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        x = pool.submit(lambda: torch.zeros(2, device="cuda")).result()
    assert x.is_cuda


def test_nothing_is_left_behind() -> None:
    before = torch.cuda.Stream, torch.tensor, vars(torch.Tensor).get("tolist"), vars(dist.ProcessGroup)["allreduce"]
    with simulated_gpu():
        pass
    assert before == (
        torch.cuda.Stream,
        torch.tensor,
        vars(torch.Tensor).get("tolist"),
        vars(dist.ProcessGroup)["allreduce"],
    )
