"""A checkpoint of one layout goes on in another: the same losses as of a run that neither stopped nor changed."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import loading
from scmoe_ds.checkpoint.export import export
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel import tensor
from scmoe_ds.training.loop import seed_micro_batch
from tests.distributed.test_layouts import MICRO_BATCHES, SEQUENCE, VOCABULARY, micro_batch

SETTINGS = GPTSettings(2, 32, 4, VOCABULARY, SEQUENCE, hidden_dropout=0.1)
SAVED_AT, STEPS = 5, 10


@dataclass(frozen=True)
class Run:
    """One stretch of training: the five steps up to a save, or the ten after it."""

    ep_size: int
    zero_stage: int = 1
    load: str | None = None
    save: str | None = None
    precision: str = "fp32"
    steps: int = STEPS
    divided_experts: bool = False
    by_pieces: bool = False
    """Even the same layout goes through the whole parameters, not through DeepSpeed's loader."""


def make_json(run: Run) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES // tensor.data_parallel_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "torch_adam": True, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "total_num_steps": 40}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": run.zero_stage},
        "scmoe": {
            "num_experts": 4,
            "expert_parallel_size": run.ep_size,
            "capacity_factor": 1.0,
            "min_capacity": 1,
            "expert_tensor_parallelism": run.divided_experts,
        },
    }
    return whole if run.precision == "fp32" else {**whole, run.precision: {"enabled": True}}


def make_engine(whole: dict[str, Any], seed: int) -> Any:
    config = scmoe_ds.ScMoEConfig.from_deepspeed(whole)
    model = GPT(SETTINGS, config, group=tensor.tensor_parallel_group())
    initialize_parameters(model, seed, 0.1, SETTINGS.num_layers)
    return scmoe_ds.initialize(model=model, config=whole)[0]


def train(run: Run) -> dict[str, list[float]]:
    whole = make_json(run)
    config = scmoe_ds.ScMoEConfig.from_deepspeed(whole)
    description = checkpoint.describe(SETTINGS, config, dist.get_world_size(), whole)
    source = checkpoint.choose(run.load, None, False, description)
    # Another seed for the resumed run: what is not restored would show.
    engine = make_engine(whole, 7 if run.load is None else 8)
    first, samples = checkpoint.load(engine, source)
    assert (first, samples) == ((SAVED_AT, 40) if run.load else (0, 0))
    found: dict[str, list[float]] = {"losses": [], "rates": [], "norms": []}
    for step in range(first, first + run.steps):
        found["losses"].append(train_step(engine, step))
        found["rates"].append(engine.get_lr()[0])
        found["norms"].append(float(engine.get_global_grad_norm()))
    assert engine.global_steps == first + run.steps
    assert engine.global_samples == 8 * engine.global_steps
    if run.save:
        checkpoint.save(engine, run.save, first + run.steps, 8 * (first + run.steps), description)
    return found


def train_step(engine: Any, step: int) -> float:
    replicas = tensor.data_parallel_size()
    total = torch.zeros(())
    for micro_step in range(MICRO_BATCHES // replicas):
        number = micro_step * replicas + tensor.data_parallel_rank()
        seed_micro_batch(1, step, number)
        tokens = micro_batch(step * MICRO_BATCHES + number)
        output = engine(tokens[:, :-1], labels=tokens[:, 1:])
        engine.backward(output.loss)
        engine.step()
        total += output.loss.detach().float() / MICRO_BATCHES / tensor.tensor_parallel_size()
    dist.all_reduce(total)
    return total.item()


def train_all(runs: list[Run], tp_size: int = 1) -> list[dict[str, list[float]]]:
    """Several runs in the same processes, whose start takes longer than the runs."""
    tensor.start_tensor_parallel(tp_size)
    results = []
    readable = loading._deepspeed_can_read
    for run in runs:
        loading._deepspeed_can_read = (lambda layout: False) if run.by_pieces else readable
        results.append(train(run))
    return results


def difference(found: dict[str, list[float]], whole: dict[str, list[float]], key: str = "losses") -> float:
    """Largest relative difference over the ten steps after the save."""
    expected = whole[key][SAVED_AT:]
    assert len(found[key]) == len(expected) == STEPS
    return max(abs(mine - other) / other for mine, other in zip(found[key], expected, strict=True))


def test_a_checkpoint_goes_on_in_any_layout(tmp_path: Path) -> None:
    ep2, dp2, zero2, tp2, split = (str(tmp_path / name) for name in ("ep2", "dp2", "zero2", "tp2", "split"))
    plans = {
        "never stopped": Run(2, steps=SAVED_AT + STEPS),
        "save EP 2": Run(2, save=ep2, steps=SAVED_AT),
        "save DP 2": Run(1, save=dp2, steps=SAVED_AT),
        "save ZeRO-2": Run(2, 2, save=zero2, steps=SAVED_AT),
        "EP 2": Run(2, load=ep2),
        "EP 2 by pieces": Run(2, load=ep2, by_pieces=True),
        "EP 2 → DP 2, ZeRO-2": Run(1, 2, load=ep2),
        "DP 2 → EP 2": Run(2, load=dp2),
        "ZeRO-2 → ZeRO-1": Run(2, load=zero2),
    }
    found = dict(zip(plans, run_distributed(train_all, 2, list(plans.values()))[0], strict=True))
    whole = found["never stopped"]
    # DeepSpeed's groups go by the expert-parallel size: a process can divide experts of one size and not of another.
    on_four = {
        "EP 2 → TP 2 DP 2 EP 4": Run(4, load=ep2),
        "EP 2 → TP 2 DP 2 EP 1, ZeRO-2": Run(1, 2, load=ep2),
        "EP 2 → TP 2 DP 2 EP 2, divided experts": Run(2, load=ep2, divided_experts=True),
        "save TP 2": Run(1, save=tp2, steps=SAVED_AT),
        "TP 2 DP 2 EP 1": Run(1, load=tp2),
        "save TP 2, divided experts": Run(2, save=split, steps=SAVED_AT, divided_experts=True),
    }
    found |= dict(zip(on_four, run_distributed(train_all, 4, list(on_four.values()), 2)[0], strict=True))
    on_one = {
        "TP 2 DP 2 EP 1 → one process": Run(1, load=tp2),
        "TP 2 DP 2 EP 2, divided experts → one process, ZeRO-2": Run(1, 2, load=split),
    }
    found |= dict(zip(on_one, run_distributed(train_all, 1, list(on_one.values()))[0], strict=True))
    for name, values in found.items():
        if len(values["losses"]) == STEPS:
            print(f"{name}: losses {difference(values, whole):.1e}, norms {difference(values, whole, 'norms'):.1e}")
    for name, values in found.items():
        if len(values["losses"]) == STEPS:
            assert difference(values, whole) <= 1e-5, name
            assert difference(values, whole, "norms") <= 1e-4, name
            assert values["rates"] == whole["rates"][SAVED_AT:], name
    for name in ("EP 2", "EP 2 by pieces"):
        assert difference(found[name], whole) == 0, "the same bits"
    check_exports(Path(ep2), Path(split), tmp_path)


def check_exports(ep2: Path, split: Path, directory: Path) -> None:
    """The same weights from files of two ranks with two experts each, and of four with halves of them."""
    exported = []
    for source in (ep2, split):
        out = directory / f"export of {source.name}"
        assert export(source, out) == 1
        exported.append(load_file(out / "model-00001-of-00001.safetensors"))
    model = GPT(SETTINGS, scmoe_ds.ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4}}))
    for name, parameter in model.named_parameters():
        assert exported[0][name].shape == exported[1][name].shape == parameter.shape
        # A step of Adam is 3e-3 at most; sums in another order move weights whose gradient is next to nothing.
        assert (exported[0][name] - exported[1][name]).abs().max() <= 1e-5, name
    assert exported[0].keys() == exported[1].keys() == dict(model.named_parameters()).keys()


def precision_and_failures(directory: str) -> list[Any]:
    """In the same processes: another precision, and a rank whose file system takes no more."""
    fp32, bf16 = f"{directory}/fp32", f"{directory}/bf16"
    [*_, same, other, back] = train_all(
        [
            Run(2, save=fp32, steps=SAVED_AT),
            Run(2, save=bf16, steps=SAVED_AT, precision="bf16"),
            Run(2, load=bf16, precision="bf16"),
            Run(1, 2, load=bf16, precision="bf16"),
            Run(2, load=bf16),
        ]
    )
    engine = make_engine(make_json(Run(2)), 7)
    poisoned = save_with_a_moment_that_is_nan(engine, fp32)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    message = ""
    try:
        checkpoint.save(engine, fp32, 9, 0, {})
    except CheckpointError as error:
        message = str(error)
    dist.barrier()
    return [same, other, back, poisoned, message, sorted(path.name for path in Path(fp32).iterdir())]


def save_with_a_moment_that_is_nan(engine: Any, directory: str) -> str:
    """On rank 1 alone, in the middle of a parameter's piece; the loss of this step is finite, and so is the next."""
    train_step(engine, 0)
    held = [
        (name, parameter._hp_mapping)
        for name, parameter in engine.module.named_parameters()
        if getattr(parameter, "_hp_mapping", None) is not None
    ]
    name, mapping = held[len(held) // 2]
    inner, address = engine.optimizer.optimizer, mapping.hp_fragment_address
    moments = inner.state[inner.param_groups[mapping.param_group_index]["params"][0]]["exp_avg"]
    if dist.get_rank() == 1:
        moments[address.start + address.numel // 2] = float("nan")
    try:
        checkpoint.save(engine, directory, 8, 0, {})
    except CheckpointError as error:
        return str(error).replace(f" {name} ", " THE PARAMETER " if dist.get_rank() == 1 else f" {name} ")
    finally:
        moments.nan_to_num_()
    return "saved"


def test_precision_and_a_rank_that_cannot_write(tmp_path: Path) -> None:
    results = run_distributed(precision_and_failures, 2, str(tmp_path))
    poisoned = results[1][3]
    assert re.search(
        r"global_step8 was not saved: on rank 1, exp_avg in the optimizer of THE PARAMETER is nan", poisoned
    )
    assert results[0][3].startswith(poisoned.split(" THE ")[0]), "on both ranks"
    for same, other, back, _, message, left in results:
        assert other["losses"][0] == same["losses"][0], "the bf16 weights are the rounded fp32 ones"
        assert other["losses"] == pytest.approx(same["losses"], rel=1e-3)
        assert back["losses"] == pytest.approx(same["losses"], rel=1e-3)
        assert same["rates"] == other["rates"] == back["rates"]
        assert "global_step9 was not written: rank 1: " in message and "File too large" in message
        assert left == ["global_step5", "latest"], "no remains, and no zero_to_fp32.py"
