"""Late join on two ranks: bits, chunks, expert parallelism, the order of transfers, and what the calibration measures;
between layers that are converted and layers that are not, too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.placement import global_names
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.training.expert_counts import busiest_experts

BASE = {"architecture": "overlapped_shared_expert", "top_k": 2, "merge": "cg2"}
IN_PART = {"position": "pos1", "moe_every": 1, "merge": "cg1", "adapt": {"base": BASE, "layers": [0, 2]}}
SECTIONS: dict[str, dict[str, Any]] = {
    "two on the way": {"position": "pos1", "moe_every": 1, "merge": "cg2"},
    "pos3": {"position": "pos3", "post_norm": True},
    "pos2": {"position": "pos2", "dispatch": "padded"},
    "dgmoe": {"architecture": "dgmoe"},
    "top-k": {"architecture": "pipelined_topk"},
    "adapted in part": IN_PART,
}


def build(ep: int, dropout: float = 0.0, **section: Any) -> GPT:
    config = ScMoEConfig(num_experts=4, expert_parallel_size=ep, **{"join": "late", **section})
    model = GPT(GPTSettings(3 * config.moe_every, 16, 4, 64, 12, hidden_dropout=dropout), config)
    initialize_parameters(model, 3, 0.4, 1)
    for layer in model.moe_layers():
        layer.set_deepspeed_parallelism()
    return model


def results(model: GPT, schedule: Schedule | None = None) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    for pair in model.scheduled_pairs():
        pair.schedule = schedule or pair.schedule
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(64, (2, 12))
    output = model(tokens)
    loss = output.logits.square().mean() + output.moe_loss
    return [
        output.logits,
        *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True),
    ]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs, least = list(zip(found, expected, strict=True)), 1e-2 * max(each.detach().abs().max() for each in expected)
    return max(
        float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=least)) for one, other in pairs
    )


def check_schedules(name: str) -> None:
    """The same bits with overlap and without, in every slot; in chunks the same but for the order of sums."""
    model = build(2, dropout=0.1, **SECTIONS[name])
    slots = range(1, len(backbone(model.scheduled_pairs()[0])) + 2)
    expected = results(model, Schedule(1, overlap=False))
    for slot in slots:
        for found, bits in zip(results(model, Schedule(slot)), expected, strict=True):
            assert torch.equal(found, bits), (name, slot)
    chunks = Schedule((1, slots[-1]), 2)
    assert largest_difference(results(model, chunks), expected) < 1e-5, name


def check_expert_parallelism(name: str) -> None:
    """Two ranks with half of the experts each are one rank with all of them."""
    divided, whole = (build(ep, drop_tokens=False, **SECTIONS[name]) for ep in (2, 1))
    logits, *grads = results(whole)
    expected = dict(zip(global_names(whole).values(), grads, strict=True))
    for parameter, grad in expected.items():
        if "deepspeed_experts" in parameter:
            dist.all_reduce(grad)  # an expert's tokens come from both ranks
    found, *grads = results(divided)
    names = [global_names(divided)[each] for each, _ in divided.named_parameters()]
    assert largest_difference([found], [logits]) < 1e-5, name
    assert largest_difference(grads, [expected[parameter] for parameter in names]) < 1e-5, name


def check_order() -> None:
    """The next pair's dispatch is on the way before this pair's combine is waited for; backward is the mirror."""
    model, recorder = build(2, **SECTIONS["two on the way"]), Recorder(torch.device("cpu"))
    for layer, pair in enumerate(model.scheduled_pairs()):
        pair.recorder, pair.schedule = recorder.pair(layer), Schedule(2)
    results(model)
    spans = [span for span in recorder.spans() if span.name in ("attention", "dispatch", "combine", "decode")]

    def order(phase: str) -> list[str]:
        """Of launches, waits and computations around the first late join."""
        chosen = {("combine", 0), ("decode", 0), ("dispatch", 1), ("attention", 1)}
        marks = {"communication": "launch ", "wait": "wait ", "compute": ""}
        mine = [each for each in spans if each.phase == phase and (each.name, each.layer) in chosen]
        return [f"{marks[each.lane]}{each.name} {each.layer}" for each in mine]

    forward = ["launch combine 0", "launch dispatch 1", "attention 1", "wait combine 0", "decode 0", "wait dispatch 1"]
    assert order("forward") == forward
    mirrored = {"launch combine 0": "wait combine 0", "wait combine 0": "launch combine 0"}
    mirrored |= {"launch dispatch 1": "wait dispatch 1", "wait dispatch 1": "launch dispatch 1"}
    assert order("backward") == [mirrored.get(each, each) for each in reversed(forward)]


def check_teacher() -> None:
    """An adapted model of which no layer is converted is the source, to the last bit, and counts its experts."""
    model, source = build(2, **{**IN_PART, "adapt": {"base": BASE}}), build(2, **BASE, moe_every=1, join="end")
    own = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if "base_coefficient" in name:
            parameter.data.copy_(own[name.replace("base_coefficient", "coefficient")])
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(64, (2, 12))
    expected = source.eval()(tokens)
    with model.conversion.as_source():
        assert torch.equal(model.eval()(tokens).logits, expected.logits)
    counts = torch.stack(expected.exp_counts)
    dist.all_reduce(counts)
    assert busiest_experts(model, [tokens]) == counts.argmax(1).tolist()
    assert model.conversion.converted == [0, 1, 2]


def calibrated(**section: Any) -> tuple[list[Any], list[Schedule], list[str]]:
    """Times and schedules of a short training, and what the log says of them."""
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**6,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scmoe": {
            "num_experts": 4,
            "expert_parallel_size": 2,
            "join": "late",
            "overlap": {"calibration_steps": 3},
            **section,
        },
    }
    config = ScMoEConfig.from_deepspeed(whole)
    model = GPT(GPTSettings(3 * config.moe_every, 16, 4, 64, 12), config, 12)
    initialize_parameters(model, 3, 0.4, 4)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    for step in range(6):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(64, (2, 12))
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
    overlap = engine.overlap
    return [(kind.layers, kind.times.late) for kind in overlap.kinds], overlap.schedules, overlap.report()


def everything() -> tuple[Any, Any]:
    for name in SECTIONS:
        check_schedules(name)
        check_expert_parallelism(name)
    check_order()
    check_teacher()
    kinds, schedules, _ = calibrated(**IN_PART)
    assert [layers for layers, _ in kinds] == [[0], [1], [2]] and len(schedules) == 3
    assert [late is not None for _, late in kinds] == [True, False, False], "a layer as in the source joins at its end"
    return calibrated(moe_every=1, position="pos1"), calibrated(position="pos2")


def test_late_join_on_two_ranks() -> None:
    first, second = run_distributed(everything, 2)
    for (kinds, schedules, report), label, lane in zip(
        first, ("attention", "attention before tap"), (True, False), strict=True
    ):
        assert [layers for layers, _ in kinds] == [[0, 1], [2]], "the last pair's combine has no next attention"
        late, none = (each for _, each in kinds)
        assert none is None and late.after_dispatch == lane
        assert [each.name for each in late.operators] == [label] and late.operators[0].forward_ms > 0
        assert len(schedules) == 3
        assert sum(line.split()[:2] == ["next", "attention"] for line in report) == 1
        assert any("from one shortcut to the next" in line for line in report) == lane
    assert [each[:2] for each in first] == [each[:2] for each in second], "all ranks hold the same times"
