"""Training with experts out of the device's memory: the same numbers, in less memory, and at the right moments."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import scmoe_ds
from lab.distributed import environment_of_one
from scmoe_ds import checkpoint
from scmoe_ds.config.offload_section import OffloadConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.engine.offloaded import offload_experts
from scmoe_ds.errors import ArgumentError, CheckpointError, ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.offload.store import ExpertKey
from scmoe_ds.offload.trainable import offloaded
from scmoe_ds.training.start_text import parameters_of

SETTINGS = GPTSettings(4, 24, 2, 64, 16)
BF16, SWIGLU = {"bf16": {"enabled": True}}, replace(SETTINGS, swiglu=True, add_bias_linear=False)
PLAIN: dict[str, Any] = {}


def make_json(offload: dict[str, Any] | None, accumulation: int = 2, **changes: Any) -> dict[str, Any]:
    section = {"num_experts": 6, "top_k": 2, "overlap": {"calibration_steps": 0, "num_chunks": 1}}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**6,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "scmoe": section if offload is None else {**section, "offload_experts": offload},
        **changes,
    }


def make_engine(whole: dict[str, Any], settings: GPTSettings = SETTINGS, seed: int = 1) -> Any:
    connect()
    model = GPT(settings, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, seed, 0.1, settings.num_layers)
    return scmoe_ds.initialize(model=model, config=whole)[0]


def train(engine: Any, steps: int, start: int = 0, seed: int = 0) -> list[float]:
    """Losses of all micro-batches, and the gradient norm and learning rate of each step. Of 2 × 3 tokens, so that
    experts are often without rows."""
    found = []
    for step in range(start, start + steps):
        for micro_step in range(engine.gradient_accumulation_steps()):
            torch.manual_seed(1000 * seed + 100 * step + micro_step)
            tokens = torch.randint(64, (2, 4))
            loss = engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        found += [float(engine.get_global_grad_norm()), engine.get_lr()[0]]
    return found


@cache
def resident(bf16: bool, swiglu: bool, accumulation: int) -> list[float]:
    whole = make_json(None, accumulation, **(BF16 if bf16 else PLAIN))
    return train(make_engine(whole, SWIGLU if swiglu else SETTINGS), 20)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize(("bf16", "swiglu", "accumulation"), [(False, False, 2), (True, True, 3), (False, True, 1)])
def test_the_losses_of_experts_in_memory(
    device: str, bf16: bool, swiglu: bool, accumulation: int, tmp_path: Path
) -> None:
    offload = {"device": device, "buffer_count": 3, **({"nvme_path": str(tmp_path)} if device == "nvme" else {})}
    whole = make_json(offload, accumulation, **(BF16 if bf16 else PLAIN))
    engine = make_engine(whole, SWIGLU if swiglu else SETTINGS)
    assert train(engine, 20) == resident(bf16, swiglu, accumulation)
    assert not list(tmp_path.iterdir())  # a run that is killed leaves nothing behind
    for experts in offloaded(engine.module):
        assert sum(each.numel() for each in experts.parameters()) <= 2
        counts = experts.store.counts
        assert counts.migrations > 20 and counts.used > counts.migrations / 2


def test_all_experts_are_counted() -> None:
    (total, active, own, _), (total_there, active_there, own_there, _) = (
        parameters_of(make_engine(make_json(offload)).module, 1) for offload in (None, {"device": "cpu"})
    )
    assert (total, active) == (total_there, active_there) and own == total > 2 * own_there


def test_experts_come_in_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward before the backbone, backward when the gradient of the layer's output is there."""
    engine = make_engine(make_json({"device": "cpu", "buffer_count": 12}, 1))
    train(engine, 1)
    happened: list[str] = []
    (first, _), (pair, _) = offloaded(engine.module), engine.module.scheduled_pairs()
    for name in ("fetch", "take"):
        original = getattr(first.store, name)

        def noted(what: Any, name: str = name, original: Any = original) -> Any:
            (layer,) = {what.layer} if name == "take" else {key.layer for key in what}
            happened.append(name) if layer == 0 else None
            return original(what)

        monkeypatch.setattr(first.store, name, noted)
    backbone = pair.last.attention
    backbone.register_forward_hook(lambda *_: happened.append("attention"))
    backbone.register_full_backward_hook(lambda *_: happened.append("attention back"))
    train(engine, 1, 1)
    order = [each for place, each in enumerate(happened) if [each] != happened[place - 1 : place]]
    assert order == ["fetch", "attention", "take", "fetch", "take", "attention back"] or order == [
        *("fetch", "take", "attention", "fetch", "attention back", "take")
    ]


class Expert(nn.Module):
    """Of two projections."""

    two_projections = True

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(8, 16), nn.Linear(16, 8)

    def activate(self, inner: Tensor) -> Tensor:
        return functional.gelu(inner)


def gated() -> nn.Module:
    expert = Expert()
    expert.gate = nn.Linear(8, 8)
    return expert


def of_no_form() -> nn.Module:
    expert = Expert()
    expert.two_projections = False
    return expert


def hooked() -> nn.Module:
    expert = Expert()
    expert.output.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    return expert


def with_a_buffer() -> nn.Module:
    expert = Expert()
    expert.register_buffer("scale", torch.ones(1))
    return expert


def test_what_cannot_be_offloaded(tmp_path: Path) -> None:
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "nowhere")}
    with pytest.raises(ArgumentError, match=r"nvme_path = '.*nowhere': .* no room there \(No such file"):
        make_engine(make_json(offload))
    whole = make_json({"device": "cpu"})
    connect()
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    with pytest.raises(ScMoEConfigError, match=r"optimizer: was handed over beside scmoe.offload_experts"):
        scmoe_ds.initialize(model=model, config=whole, optimizer=torch.optim.AdamW(model.parameters()))
    for other in (gated, of_no_form, hooked, with_a_buffer):
        layer = scmoe_ds.ScMoE(8, other(), num_experts=2)
        with pytest.raises(ScMoEConfigError, match=r"experts must compute output\(activate\(input\(x\)\)\)"):
            scmoe_ds.initialize(model=nn.Sequential(layer), config=whole | {"scmoe": {"offload_experts": {}}})


def test_experts_that_come_late_start_as_in_memory() -> None:
    connect()

    def layers(device: str) -> nn.Module:
        with torch.device(device):
            expert = Expert()
        torch.manual_seed(3)
        return nn.Sequential(*(scmoe_ds.ScMoE(8, expert, num_experts=3) for _ in range(2)))

    there, late = layers("cpu"), layers("meta")
    offload_experts(late, OffloadConfig(device="cpu"), torch.float32, torch.device("cpu"))
    values = []
    for layer, experts in zip(there, offloaded(late), strict=True):
        for key, expert in zip(experts.members(), layer.deepspeed_moe.experts.deepspeed_experts, strict=True):
            states, _ = experts.states.read(key)
            for name, value in expert.named_parameters():
                assert torch.equal(states[name]["fp32"], value)
            values.append(tuple(states["input.weight"]["fp32"].flatten().tolist()))
    assert len(set(values)) == 6


def test_deepspeeds_own_checkpoints_are_refused(tmp_path: Path) -> None:
    """They would lack what the experts' next step needs, or the experts of other ranks, in silence."""
    engine = make_engine(make_json({"device": "cpu"}))
    held = "scmoe.offload_experts holds the experts' fp32 weights and moments, which"
    for method, why in (
        (engine.save_checkpoint, f"{held} would be lacking; call scmoe_ds.checkpoint.save$"),
        (engine.load_checkpoint, f"{held} would not be set; call scmoe_ds.checkpoint.load$"),
        (engine.save_16bit_model, r"with .* would write rank 0's experts alone; call scmoe_ds\.save_pretrained$"),
        (engine.save_fp16_model, r"with .* would write rank 0's experts alone; call scmoe_ds\.save_pretrained$"),
    ):
        with pytest.raises(CheckpointError, match=rf"^engine\.\w+: {why}"):
            method(str(tmp_path))
    with pytest.raises(RuntimeError, match=f"load_state_dict: {held} a state dict lacks; load it before"):
        engine.module.load_state_dict(engine.module.state_dict())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_state_dict_has_the_experts(bf16: bool) -> None:
    """Those of the last step; and a model that is given them starts with them."""
    changes = BF16 if bf16 else PLAIN
    engines = [make_engine(make_json(offload, **changes)) for offload in (None, {"device": "cpu"})]
    there, away = ((train(each, 3), each.module.state_dict())[1] for each in engines)
    assert away.keys() == there.keys() and len(there) > 12
    assert all(torch.equal(away[name], value) and away[name].dtype == value.dtype for name, value in there.items())
    whole = make_json({"device": "cpu"}, **changes)
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    model.load_state_dict(away)
    started = scmoe_ds.initialize(model=model, config=whole)[0].module.state_dict()
    assert all(torch.equal(started[name], value) for name, value in there.items())


def test_an_export_has_one_expert_in_memory_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_json({"device": "nvme", "nvme_path": str(tmp_path)}))
    states = offloaded(engine.module)[0].states
    of_one = {name: each.nbytes for name, each in states.weights(states.keys[0]).items()}
    read, alive, most = states.weights, Counter[ExpertKey](), 0

    def counted(key: ExpertKey) -> dict[str, Tensor]:
        nonlocal most
        found = read(key)
        for each in found.values():
            alive[key] += 1
            weakref.finalize(each, alive.subtract, [key])
        most = max(most, sum(count > 0 for count in alive.values()))
        return found

    monkeypatch.setattr(states, "weights", counted)
    scmoe_ds.save_pretrained(engine, tmp_path / "whole", sum(of_one.values()))
    assert len(alive) == 12 and most <= 3  # one is read, another one sent, and a third one in a file
    exported = {
        name: each for file in (tmp_path / "whole").glob("*.safetensors") for name, each in load_file(file).items()
    }
    there = engine.module.state_dict()
    assert exported.keys() == there.keys() and all(torch.equal(exported[name], each) for name, each in there.items())


def train_and_discard(engine: Any) -> list[float]:
    """Gradients of the first of two micro-batches are dropped, in each step by another; then of the second."""
    found = []
    for step, (place, micro_step_of) in enumerate(
        [(engine.optimizer, 0), (engine, 0), (engine.module, 0), (engine.optimizer, 1), (None, 0)]
    ):
        for micro_step in range(2):
            torch.manual_seed(10 * step + micro_step)
            tokens = torch.randint(64, (2, 4))
            loss = engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
            engine.backward(loss)
            if place is not None and micro_step == micro_step_of:
                place.zero_grad()
            engine.step()
            found.append(loss.item())
        found.append(float(engine.get_global_grad_norm()))
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_discarded_gradients_are_discarded_for_the_experts(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-2 those are none."""
    expected = train_and_discard(make_engine(make_json(None, zero_optimization={"stage": stage})))
    engine = make_engine(make_json({"device": "cpu"}, zero_optimization={"stage": stage}))
    states = offloaded(engine.module)[0].states
    keep = states._keep

    def keep_late(*arguments: Any) -> None:
        time.sleep(0.01)
        keep(*arguments)

    monkeypatch.setattr(states, "_keep", keep_late)
    assert train_and_discard(engine) == expected


def train_over_nan(engine: Any, rank: int = 0) -> list[float]:
    """The second step has a gradient that is not a number, on rank 0 alone."""
    found = train(engine, 1, 0, rank)
    for micro_step in range(2):
        tokens = torch.full((2, 4), micro_step + rank)
        loss = engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
        engine.backward(loss * float("nan") if micro_step == rank == 0 else loss)
        engine.step()
        found += [loss.item(), engine.skipped_steps]
    return [*found, float(engine.get_global_grad_norm()), engine.get_lr()[0], *train(engine, 2, 2, rank)]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(stage: int) -> None:
    expected = train_over_nan(make_engine(make_json(None, zero_optimization={"stage": stage})))
    assert train_over_nan(make_engine(make_json({"device": "cpu"}, zero_optimization={"stage": stage}))) == expected
    assert 1 in expected


LIMITED = """
    import json, os, resource, sys
    from tests.engine.test_offloaded import make_engine, train, wide
    from scmoe_ds.engine import connect
    for name, directory in (("in memory", ""), ("offloaded", sys.argv[2])):  # one import for both
        if os.fork():
            os.wait()
            continue
        output = os.open(f"{sys.argv[2]}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        connect()
        used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]),) * 2)
        print("LOSSES", json.dumps(train(make_engine(*wide(directory)), 2)), flush=True)
        break
"""
EXPERTS, WIDTH, ROOM = 50, 2048, 265 << 20


def wide(directory: str) -> tuple[dict[str, Any], GPTSettings]:
    """A model whose experts are nearly all of it; offloaded if there is a directory."""
    whole = make_json({"device": "nvme", "nvme_path": directory} if directory else None, 1)
    whole["scmoe"] |= {
        "num_experts": EXPERTS,
        "moe_ffn_hidden_size": WIDTH,
        "moe_shared_expert_intermediate_size": 64,
    }
    whole["zero_optimization"]["reduce_bucket_size"] = 10**5
    return whole, GPTSettings(4, 128, 2, 64, 16, ffn_hidden_size=64)


def test_experts_three_times_the_memory_limit(tmp_path: Path) -> None:
    """Weights, gradients and both moments in fp32. In memory they do not start within the limit."""
    of_one = 4 * 4 * (2 * 128 * WIDTH + WIDTH + 128)
    assert 2 * EXPERTS * of_one >= 3 * ROOM

    # glibc would keep what its threads have freed; so it gives large pieces back.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "2"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(ROOM), str(tmp_path)],
        check=True,
        env={**environment_of_one(), "PYTHONPATH": str(Path(__file__).parents[2]), **malloc},
    )
    refused, trained = ((tmp_path / name).read_text() for name in ("in memory", "offloaded"))
    assert "LOSSES" not in refused
    assert "memory" in refused or "Resource temporarily unavailable" in refused
    _, found, losses = trained.partition("LOSSES")
    assert found, trained
    assert json.loads(losses.splitlines()[0]) == train(make_engine(*wide("")), 2)


OFFLOADS = {"memory": None, "host": {"device": "cpu"}, "disk": {"device": "nvme", "buffer_count": 3}}


def with_path(offload: dict[str, Any] | None, path: Path) -> dict[str, Any] | None:
    return {**offload, "nvme_path": str(path)} if offload is not None and offload["device"] == "nvme" else offload


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("then", "now"), [("memory", "disk"), ("disk", "memory"), ("disk", "host")])
def test_a_resume_from_either_to_either(then: str, now: str, bf16: bool, tmp_path: Path) -> None:
    """Experts move between memory and elsewhere with a checkpoint; the losses are those of one run."""
    engines, descriptions = [], []
    for kind in (then, now):
        whole = make_json(with_path(OFFLOADS[kind], tmp_path), **(BF16 if bf16 else PLAIN))
        engines.append(make_engine(whole))
        section = ScMoEConfig.from_deepspeed(whole)
        descriptions.append(checkpoint.describe(SETTINGS, section, 1, whole))
    first, second = engines
    losses = train(first, 3)
    saved = checkpoint.save(first, str(tmp_path / "run"), 3, 12, descriptions[0])
    names = {file.name for file in saved.iterdir()}
    assert {f"layer_{layer}_expert_{n}_mp_rank_00_model_states.pt" for layer in range(2) for n in range(6)} <= names
    if now != "memory":  # what it has done until then is over
        train(second, 2, 50)
    source = checkpoint.choose(str(saved), None, False, descriptions[1])
    assert checkpoint.load(second, source) == (3, 12)
    expected = resident(bf16, False, 2)
    assert losses == expected[: len(losses)]
    assert train(second, 4, 3) == expected[len(losses) :][: len(losses) * 4 // 3]


def test_a_moment_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    whole = make_json({"device": "cpu"})
    engine = make_engine(whole)
    train(engine, 1)
    experts = offloaded(engine.module)[1]
    key = experts.members()[4]
    states, steps = experts.states.read(key)
    states["output.bias"]["exp_avg"][3] = float("nan")
    experts.states.write(key, states, steps)
    description = checkpoint.describe(SETTINGS, ScMoEConfig.from_deepspeed(whole), 1, whole)
    with pytest.raises(
        checkpoint.NotFiniteError, match=r"exp_avg in the optimizer of .*experts\.4\.output\.bias is nan"
    ):
        checkpoint.save(engine, str(tmp_path / "run"), 1, 4, description)
