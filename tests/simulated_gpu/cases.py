"""Settings of a pair, so combined that every three of different kinds meet, and how one combination runs."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe import choices, gate
from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel import tensor
from scmoe_ds.trace.recorder import SILENT, Recorder
from tests.simulated_gpu.device import simulated_gpu
from tests.simulated_gpu.gpu import Gpu, Launch
from tests.simulated_gpu.plain_top1 import PLAIN_TOP1

UNCHANGED = nullcontext()
BACKBONES = {
    ("scmoe", "pos1"): 2,
    ("scmoe", "pos2"): 3,
    ("scmoe", "pos3"): 4,
    ("dgmoe", "pos2"): 2,
    ("pipelined_topk", "pos2"): 0,
    ("overlapped_shared_expert", "pos2"): 2,
}
"""Operators behind the tap. The experts run before any of them or behind all."""


@dataclass(frozen=True)
class Case:
    """One combination."""

    architecture: str
    position: str
    slot: int
    chunks: int
    dispatch: str = "exact"
    top_k: int = 1
    drop_tokens: bool = True
    wire_dtype: str | None = None
    dtype: torch.dtype = torch.float32
    swiglu: bool = False
    masked: bool = False
    recorded: bool = False
    recompute: str | None = None
    method: str = "collective"
    tensor_parallel: int = 1
    expert_parallel: int = 2
    capability: tuple[int, int] = (8, 0)
    spread: bool = False
    overlap: bool = True
    trained: bool = True
    tokens: str = "equal"
    dropout: float = 0.1
    fused_gate: bool = False

    @property
    def schedule(self) -> Schedule:
        """All chunks in one slot, or each in a slot of its own while there are some left."""
        last = BACKBONES[self.architecture, self.position] + 1
        slots = tuple(min(self.slot + self.spread * chunk, last) for chunk in range(self.chunks))
        return Schedule(slots, self.chunks, self.overlap)

    @property
    def data_rank(self) -> int:
        return dist.get_rank() // self.tensor_parallel

    @property
    def sequences(self) -> int:
        """On this rank."""
        return 1 + self.data_rank if self.tokens == "uneven" else 2

    def mask(self) -> Tensor | None:
        """Which tokens are used; with tokens = "none", the last rank's are not."""
        last = self.data_rank == dist.get_world_size() // self.tensor_parallel - 1
        if self.tokens == "none" and last:
            return torch.zeros(self.sequences, 12, dtype=torch.bool)
        return torch.rand(self.sequences, 12) > 0.3 if self.masked else None

    @property
    def section(self) -> dict[str, Any]:
        """The "scmoe" section."""
        chosen = "architecture position dispatch top_k drop_tokens wire_dtype".split()
        section = {name: value for name, value in asdict(self).items() if name in chosen}
        return {**section, "num_experts": 4, "expert_parallel_size": self.expert_parallel, "capacity_factor": 1.0}

    @property
    def shape(self) -> GPTSettings:
        return GPTSettings(4, 16, 4, 64, 12, hidden_dropout=self.dropout, swiglu=self.swiglu)


PLACES = [
    dict(architecture=architecture, position=position, slot=slot, chunks=chunks)
    for (architecture, position), operators in BACKBONES.items()
    for slot in range(1, operators + 2)
    for chunks in (1, 2, 3)
]
SETTINGS: dict[str, tuple[Any, ...]] = dict(
    dispatch=("exact", "padded"),
    top_k=(1, 2, 3),
    drop_tokens=(True, False),
    wire_dtype=(None, "bf16", "fp8"),
    dtype=(torch.float32, torch.bfloat16),
    swiglu=(False, True),
    masked=(False, True),
    recorded=(False, True),
    recompute=(None, "selective", "full"),
    method=("collective", "send_receive"),
    tensor_parallel=(1, 2),
    expert_parallel=(1, 2),
    capability=((8, 0), (9, 0)),
    spread=(False, True),
    overlap=(True, False),
    trained=(True, False),
    tokens=("equal", "uneven", "none"),
)


VALUES = {**{name: tuple({place[name]: None for place in PLACES}) for name in PLACES[0]}, **SETTINGS}
Settings = tuple[tuple[str, Any], ...]


def allowed(settings: dict[str, Any]) -> bool:
    return settings.get("architecture") != "dgmoe" or settings.get("top_k", 1) == 1


def fitting(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The places that have these settings."""
    return [place for place in PLACES if all(place.get(name, value) == value for name, value in settings.items())]


@functools.cache
def covering(strength: int = 3, candidates: int = 20) -> list[Case]:
    """Combinations in which every place of the experts stands, and every three values of different settings.

    Each new one has what is missing first, and of some at random it is the one that has most of the rest.
    """
    missing: dict[Settings, None] = dict.fromkeys(tuple(place.items()) for place in PLACES)
    for names in itertools.combinations(VALUES, strength):
        for values in itertools.product(*(VALUES[name] for name in names)):
            settings = dict(zip(names, values, strict=True))
            if allowed(settings) and fitting(settings):
                missing[tuple(settings.items())] = None

    def meeting(settings: dict[str, Any]) -> list[Settings]:
        met = [tuple((name, settings[name]) for name in PLACES[0]), *itertools.combinations(settings.items(), strength)]
        return [each for each in met if each in missing]

    dice, cases = random.Random(0), []
    while missing:
        first = dict(next(iter(missing)))
        filled = []
        while len(filled) < candidates:
            others = {name: dice.choice(values) for name, values in SETTINGS.items()}
            settings = {**dice.choice(fitting(first)), **others, **first}
            filled += [settings] * allowed(settings)
        best = max(filled, key=lambda each: len(meeting(each)))
        for each in meeting(best):
            del missing[each]
        cases.append(Case(**best))
    return cases


def build(case: Case) -> StagedPair:
    config = ScMoEConfig.from_deepspeed({"scmoe": case.section})
    pair = make_pair(case.shape, config, 4, case.position, 12, tensor.tensor_parallel_group())
    assert isinstance(pair, StagedPair)
    initialize_parameters(pair, 3, 0.4, 1)
    set_up(pair, case)
    assert len(backbone(pair)) == BACKBONES[case.architecture, case.position]
    return pair.to(case.dtype).train(case.trained)


def set_up(pair: StagedPair, case: Case) -> None:
    layer = pair.layer
    layer.set_deepspeed_parallelism()
    layer.transport = Transport(layer.transport.group, case.method)
    pair.schedule, pair.recompute = case.schedule, case.recompute  # type: ignore[assignment]


def results(pair: StagedPair, hidden: Tensor, used_token: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Outputs, then gradients, in training."""
    torch.manual_seed(1 + dist.get_rank() // tensor.tensor_parallel_size())
    with torch.set_grad_enabled(pair.training):
        output = pair(hidden, used_token)
    yield list(output)
    inputs, grads = [hidden, *pair.parameters()], [output.hidden.detach(), output.l_aux.detach()]
    outputs = [output.hidden, output.l_aux]
    yield list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True)) if pair.training else []


@dataclass(frozen=True)
class Outcome:
    """What a simulated run showed, against the same on the CPU.

    Attributes:
        differences: numbers of the results that differ in any bit.
        waits: of the host, forward and backward; of a whole model together.
        hidden: the backbone's launches beside which rows may travel, forward and backward.
    """

    case: Case
    differences: list[int]
    findings: list[str]
    waits: tuple[dict[str, int], dict[str, int]]
    launches: Counter[Launch]
    moe_layers: int = 1
    hidden: tuple[int, int] = (0, 0)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Masked tokens use up random numbers on a GPU, where the host does not know how many they are. Here, too: what is
    drawn after them, such as dropout, is then the same."""

    def draw(noise: Callable[[int], Tensor], tokens: int, used_T: Tensor | None) -> Tensor:
        drawn = noise(tokens)
        return drawn if used_T is None else drawn.index_select(0, (used_T.cumsum(0) - 1).clamp(min=0))

    with mock.patch.object(choices, "draw", draw), mock.patch.object(gate, "draw", draw):
        yield


def different(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], gpu: Gpu) -> list[int]:
    """Numbers of the tensors that differ in any bit from the CPU's."""
    pairs = enumerate(zip(expected, found, strict=True))
    return [i for i, (a, b) in pairs if not (a is b is None or (b is not None and torch.equal(a, gpu.peek(b))))]


def run(case: Case, changed: AbstractContextManager[object] = UNCHANGED) -> Outcome:
    """`changed` surrounds what runs on the device, and not what runs on the CPU."""
    pair = build(case)
    torch.manual_seed(5 + case.data_rank)
    hidden = torch.randn(case.sequences, 12, 16, dtype=case.dtype)
    used_token = case.mask()
    with as_on_a_gpu():
        outputs, gradients = results(pair, hidden.clone().requires_grad_(), used_token)
    with changed, simulated_gpu(case.capability) as gpu, fused_gate() if case.fused_gate else UNCHANGED:
        gpu.move(pair)
        recorder = Recorder(torch.device("cuda", 0)) if case.recorded else None
        pair.recorder = recorder.pair(0) if recorder else SILENT
        moved, mask = gpu.move(hidden).requires_grad_(), None if used_token is None else gpu.move(used_token)
        gpu.reset()
        passes = results(pair, moved, mask)
        differences = different(outputs, next(passes), gpu)
        forward = dict(gpu.host_waits)
        gpu.host_waits.clear()
        differences += different(gradients, next(passes), gpu)
        backward = dict(gpu.host_waits)
        assert recorder is None or recorder.spans()
        del passes, moved, mask
        beside = gpu.hidden("forward"), gpu.hidden("backward")
        waits = forward, backward
        return Outcome(case, differences, list(gpu.findings), waits, gpu.launches, hidden=beside)


@contextmanager
def fused_gate() -> Iterator[None]:
    """As if Triton were installed: the kernels of the top-1 gate are launched, each by what it computes."""
    with mock.patch("scmoe_ds.moe.gate.kernels_of", lambda rows: replace(kernels_of(rows), top1=PLAIN_TOP1)):
        yield


def run_gpt(case: Case) -> Outcome:
    """Two pairs, their losses and the embedding."""
    config = ScMoEConfig.from_deepspeed({"scmoe": case.section})
    model = GPT(case.shape, config, 12, tensor.tensor_parallel_group())
    initialize_parameters(model, 3, 0.4, 1)
    for pair in model.scheduled_pairs():
        set_up(pair, case)
    model.to(case.dtype)

    def step(tokens: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]).loss
        return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))

    torch.manual_seed(5 + dist.get_rank() // case.tensor_parallel)
    tokens = torch.randint(64, (2, 13))
    expected = step(tokens)
    with simulated_gpu(case.capability) as gpu:
        gpu.move(model)
        moved = gpu.move(tokens)
        differences = different(expected, step(moved), gpu)
        return Outcome(case, differences, list(gpu.findings), (dict(gpu.host_waits), {}), gpu.launches, 2)


def run_all(cases: Sequence[Case], models: Sequence[Case], tensor_parallel: int) -> list[Outcome]:
    """On every rank."""
    tensor.start_tensor_parallel(tensor_parallel)
    return [*map(run, cases), *map(run_gpt, models)]
