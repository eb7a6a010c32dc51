"""Calibration on a clock that only the computation moves: what is measured, how ranks agree, where the times go."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap import executor
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.calibration import times_from
from scmoe_ds.trace.recorder import SILENT, Recorder

SETTINGS = GPTSettings(4, 16, 4, 64, 12)
STEPS = 5


class Clock(nn.Module):
    """Stands before a module and moves the clock by so many seconds, forward and backward."""

    now = 0.0

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.costs = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Advance.apply(x, *self.costs)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        Clock.now += forward_s
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        Clock.now += ctx.backward_s
        return grad, None, None


def deepspeed_json(**section: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**6,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scmoe": {"num_experts": 4, "expert_parallel_size": 2, **section},
    }


def build(**section: Any) -> Any:
    whole = deepspeed_json(**section)
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole), 12)
    initialize_parameters(model, 3, 0.4, 4)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(64, (2, 12))
        loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def schedules(engine: Any) -> list[tuple[Schedule, Schedule | None]]:
    return [(run.schedule, run.forward_schedule) for run in engine.module.scheduled_pairs()]


def on_a_clock() -> Any:
    """One engine whose operators take 1, 2, 4, … seconds on rank 0, twice that on rank 1, and whose transfers 100."""
    scale = 1.0 + dist.get_rank()
    plain_stamp, plain_completion = Recorder.stamp, Recorder.completion

    def completion(self: Recorder, wait: Any, note: Any) -> Any:
        def finish() -> None:
            wait()
            Clock.now += 100.0
            note(Clock.now)

        return finish

    Recorder.stamp, Recorder.completion = (lambda self: Clock.now), completion  # type: ignore[assignment]
    try:
        engine = build(overlap={"calibration_steps": STEPS})
        costs = {"attention_norm": (1, 2), "mlp_norm": (4, 8), "shortcut_norm": (16, 32)}
        for run in engine.module.runs:
            for name, module in list(run.named_modules()):
                last = name.rsplit(".", 1)[-1]
                if last in costs:
                    clock = Clock(*(scale * cost for cost in costs[last]))
                    module.register_forward_hook(lambda module, inputs, output, clock=clock: clock(output))
            for expert in run.blocks[-1].moe.deepspeed_moe.experts.deepspeed_experts:
                clock = Clock(64 * scale, 128 * scale)
                expert.register_forward_pre_hook(lambda module, inputs, clock=clock: (clock(inputs[0]),))
        train(engine, STEPS + 2)
        return engine.overlap.times[0].model_dump(mode="json"), len(engine.overlap.times)
    finally:
        Recorder.stamp, Recorder.completion = plain_stamp, plain_completion  # type: ignore[method-assign]


def test_times_are_those_of_the_slowest_rank() -> None:
    results = run_distributed(on_a_clock, 2)
    assert results[0] == results[1], "all ranks hold the same times"
    times, kinds = results[0]
    assert kinds == 1, "both pairs are alike and share their times"
    by_name = {operator["name"]: operator for operator in times["backbone"]}
    assert list(by_name) == ["mlp", "attention", "shared"]
    # The norms stand for their operators. Rank 1's clock runs at twice the speed.
    assert (by_name["mlp"]["forward_ms"], by_name["mlp"]["backward_ms"]) == (8e3, 16e3)
    assert (by_name["attention"]["forward_ms"], by_name["attention"]["backward_ms"]) == (2e3, 4e3)
    assert (by_name["shared"]["forward_ms"], by_name["shared"]["backward_ms"]) == (8e3, 16e3)
    assert times["gate"] == {"forward_ms": 32e3, "backward_ms": 64e3}, "the shortcut's norm is part of it"
    for count, chunk in times["chunks"].items():
        # Two local experts; each runs once per chunk, so that pieces cost more than the whole here.
        assert chunk["experts"] == {"forward_ms": 2 * 128e3, "backward_ms": 2 * 256e3}, count
        assert chunk["dispatch"] == chunk["combine"] == {"forward_ms": 100e3, "backward_ms": 100e3}
    assert list(times["chunks"]) == ["1", "2", "4"]


def with_random_times(seed: int) -> Any:
    """Every rank measures something else."""
    generator = random.Random(100 * seed + dist.get_rank())
    plain_spans = Recorder.spans

    def spans(self: Recorder) -> Any:
        return [
            type(span)(**{**vars(span), "start_ms": 0.0, "end_ms": generator.uniform(0, 50)})
            for span in plain_spans(self)
        ]

    Recorder.spans = spans  # type: ignore[method-assign]
    try:
        engine = build(overlap={"calibration_steps": 3}, position="pos3")
        train(engine, 5)
        return engine.overlap.state(), schedules(engine)
    finally:
        Recorder.spans = plain_spans  # type: ignore[method-assign]


def test_all_ranks_choose_alike_whatever_each_has_measured() -> None:
    choices = []
    for seed in range(3):
        results = run_distributed(with_random_times, 2, seed)
        assert results[0] == results[1]
        choices.append(results[0])
    assert choices[0][0] != choices[1][0], "the times were not random"


def losses_with(overlap: dict[str, Any]) -> Any:
    engine = build(overlap=overlap)
    before = schedules(engine)
    losses = train(engine, 18)  # one to warm up, five timed ones, ten to compare with and without overlap
    assert engine.overlap.comparison is None
    assert all(run.recorder is SILENT for run in engine.module.scheduled_pairs()), "nobody listens any more"
    measured = engine.overlap.measured
    return losses, before, schedules(engine), engine.overlap.calibrating, measured is None or measured.overlap


def test_calibration_changes_no_number() -> None:
    """Timed steps are training steps: with one chunk their bits are those of any other schedule."""
    calibrated, fixed = ({"num_chunks": 1}, {"expert_slot": 2, "num_chunks": 1})
    results = [run_distributed(losses_with, 2, overlap) for overlap in (calibrated, fixed)]
    for timed, plain in zip(*results, strict=True):
        assert timed[0] == plain[0]
        assert plain[1] == plain[2], "what the user has fixed stays"
        assert not timed[3]
        assert all(schedule.overlap == timed[4] for schedule, _ in timed[2])


def planned_apart() -> Any:
    """Times for which training and a forward pass alone want different slots; which is used when."""
    engine = build(overlap={"calibration_steps": 3, "num_chunks": 1})
    train(engine, 2)
    part = {"forward_ms": 1.0, "backward_ms": 1.0}
    backbone = [
        {"name": "mlp", "forward_ms": 1.0, "backward_ms": 50.0},
        {"name": "attention", "forward_ms": 1.0, "backward_ms": 1.0},
        {"name": "shared", "forward_ms": 50.0, "backward_ms": 50.0},
    ]
    transfer = {"forward_ms": 2.0, "backward_ms": 40.0}
    chunk = {"dispatch": transfer, "experts": part, "combine": transfer}
    times = {"gate": part, "encode": part, "decode": part, "backbone": backbone, "chunks": {"1": chunk}}
    description = engine.overlap.kinds[0].description
    # In the middle of the calibration, from rank 0's checkpoint alone.
    engine.overlap.resume([{"description": description, "times": times}] if dist.get_rank() == 0 else None)
    assert not engine.overlap.calibrating
    runs = engine.module.scheduled_pairs()
    assert all(run.recorder is SILENT for run in runs)
    used: list[Schedule] = []
    plain_run = executor.run

    def noted(pair: Any, hidden: torch.Tensor, schedule: Schedule, *others: Any) -> Any:
        used.append(schedule)
        return plain_run(pair, hidden, schedule, *others)

    executor.run = noted
    try:
        train(engine, 1)
        with torch.no_grad():
            engine(torch.zeros(2, 12, dtype=torch.int64))
    finally:
        executor.run = plain_run
    return [schedule.slots for schedule in used]


def test_training_and_a_forward_pass_alone_have_plans_of_their_own() -> None:
    # Forward, dispatch and combine fit beside attention and mlp together (slot 3) only; backward both want 40 ms,
    # which slots 2 and 3 give, and slot 2 leaves 1 ms of the dispatch exposed.
    expected = [(3,), (3,)]
    for used in run_distributed(planned_apart, 2):
        assert used[:2] == expected and len(used) == 4
        assert used[2:] == expected


def several_kinds() -> Any:
    """A pyramid, and validation between timed micro-batches."""
    engine = build(num_experts=[4, 8], overlap={"calibration_steps": 1, "num_chunks": 3})
    assert engine.overlap.timing.timed == 2, "one for each number of chunks"
    for _ in range(4):
        train(engine, 1)
        engine.eval()
        with torch.no_grad():
            engine(torch.zeros(2, 12, dtype=torch.int64))
        assert all(run.recorder is SILENT for run in engine.module.scheduled_pairs()), "validation is not timed"
        engine.train()
    layers = [kind.layers for kind in engine.overlap.kinds]
    counts = [sorted(times.chunks) for times in engine.overlap.times]
    return layers, counts, [run.schedule.num_chunks for run in engine.module.scheduled_pairs()]


def test_pairs_that_differ_have_times_of_their_own() -> None:
    for layers, counts, chunks in run_distributed(several_kinds, 2):
        assert layers == [[0], [1]]
        assert counts == [[1, 3], [1, 3]]
        assert chunks == [3, 3], "the number that was asked for"


def with_file(directory: str) -> Any:
    """Measured once, read by the next run, refused by another model."""
    file = f"{directory}/times/calibration.json"
    first = build(overlap={"calibration_steps": 2, "calibration_file": file})
    assert first.overlap.calibrating
    train(first, 5)  # one to warm up, one for each of three numbers of chunks
    dist.barrier()
    saved = json.loads(Path(file).read_text())
    again = build(overlap={"calibration_steps": 2, "calibration_file": file})
    assert not again.overlap.calibrating
    assert schedules(again) == schedules(first)
    # What a checkpoint holds does the same; times of another model are measured again there.
    resumed = build(overlap={"calibration_steps": 2})
    resumed.overlap.resume(saved)
    assert not resumed.overlap.calibrating
    assert schedules(resumed) == schedules(first)
    for settings in ({"position": "pos1"}, {"overlap": {"num_chunks": 3}}):
        other = build(**settings)
        other.overlap.resume(saved)
        assert other.overlap.calibrating
    messages = []
    for section in ({"position": "pos1"}, {"num_experts": 8, "capacity_factor": 1.0}):
        with pytest.raises(ScMoEConfigError) as caught:
            build(overlap={"calibration_file": file}, **section)
        messages.append(str(caught.value))
    broken = json.loads(Path(file).read_text())
    del broken[0]["times"]["chunks"]["1"]
    for number, text in enumerate((json.dumps(broken), "{}", "not JSON", '[{"description": []}]', "[]")):
        path = f"{directory}/broken{number}.json"
        if dist.get_rank() == 0:
            Path(path).write_text(text)
        with pytest.raises(ScMoEConfigError) as caught:
            build(overlap={"calibration_file": path})
        messages.append(str(caught.value))
    for overlap in ({"calibration_file": file, "num_chunks": 3}, {"calibration_file": "/proc/no-such/times.json"}):
        with pytest.raises(ScMoEConfigError) as caught:
            build(overlap=overlap)
        messages.append(str(caught.value))
    return messages


def test_calibration_file() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for messages in run_distributed(with_file, 2, directory):
            assert "scmoe.overlap.calibration_file" in messages[0]
            assert "operators: ['mlp', 'attention', 'shared'] there, ['attention', 'shared'] in this run" in messages[0]
            assert "num_experts: 4 there, 8 in this run; capacity_factor: 2.0 there, 1.0 in this run" in messages[1]
            assert "parameters" in messages[1]
            assert "the times of a single chunk (1) are missing" in messages[2]
            assert "is not a calibration" in messages[3]
            assert "cannot be read" in messages[4]
            assert "damaged: an entry has no description" in messages[5]
            assert "it is empty" in messages[6]
            assert "has times of [1, 2, 4] chunks only, not of [3]" in messages[7]
            assert "no-such" in messages[8] and "cannot be written" in messages[8]


def nothing_to_plan() -> list[bool]:
    """Without communication, without overlap, with everything fixed, with DeepSpeed's own layers: no timed steps."""
    cases: list[dict[str, Any]] = [
        {"expert_parallel_size": 1},
        {"overlap": {"enabled": False}},
        {"overlap": {"expert_slot": 2, "num_chunks": 2}},
        {"overlap": {"calibration_steps": 0}},
        {"overlap": {"expert_slot": [2, 3]}},
        {"architecture": "topk"},
    ]
    return [build(**case).overlap.calibrating for case in cases]


def test_no_calibration_where_nothing_is_to_be_planned() -> None:
    assert run_distributed(nothing_to_plan, 2) == [[False] * 6] * 2


def test_pieces_cannot_take_less_than_the_whole() -> None:
    known = {(1, "experts", "forward"): 10.0, (2, "experts", "forward"): 8.0, (4, "experts", "forward"): 16.0}
    times = times_from(known, ["mlp"], [1, 2, 4])
    assert [times.chunks[count].experts.forward_ms for count in (1, 2, 4)] == [10.0, 5.0, 4.0]
