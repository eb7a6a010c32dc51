"""Hugging Face's Trainer and Accelerate with a "scmoe" section, on two ranks that share the experts."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.engine.take_over import engine_of
from scmoe_ds.moe.placement import global_names
from tests.helpers.hugging_face import VOCABULARY, gpt2

STEPS, SAVED, RATE, LENGTH = 5, 3, 1e-2, 12
FIXED = {"num_chunks": 1, "expert_slot": 1, "calibration_steps": 0}
SECTIONS: dict[str, dict[str, Any]] = {
    "moe_from_dense": {
        "scmoe": {
            "num_experts": 4,
            "expert_parallel_size": 2,
            "aux_loss_coefficient": 0.1,
            "drop_tokens": False,  # which are dropped is random
            "overlap": {"calibration_steps": 1},
        }
    },
    "autoep": {
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"},
        "scmoe": {
            "architecture": "scmoe",
            "merge": "cg1",
            "shortcut_norm": "own",
            "adapt": {"layers": [1], "shared_expert": "mean"},  # the other layer is as it is
            "overlap": FIXED,
        },
    },
}
QWEN = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
)


def whole_json(kind: str, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        **copy.deepcopy(SECTIONS[kind]),
    }


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "autoep":
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN))
    model = scmoe_ds.moe_from_dense(gpt2(), {"scmoe": SECTIONS[kind]["scmoe"]}, noise=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # Trainer's random numbers are others
            module.p = 0.0
    model.loss_type = "ForCausalLM"  # GPT-2's own makes Trainer count one token of each row too many
    return model


def sequences() -> list[dict[str, Tensor]]:
    rows = torch.randint(VOCABULARY, (40, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


class Seen(transformers.TrainerCallback):
    """What a run has trained with and become: its micro-batches, parameters and losses."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.parameters: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def see(module: nn.Module, inputs: Any, named: Any) -> None:
            if module.training:
                self.batches.append(named["input_ids"].clone())

        self.hook = model.register_forward_pre_hook(see, with_kwargs=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hook.remove()
        self.parameters = {name: each.detach().clone() for name, each in model.named_parameters()}


def trainer_of(kind: str, stage: int, directory: Path) -> tuple[transformers.Trainer, Seen]:
    arguments = transformers.TrainingArguments(
        str(directory),
        deepspeed=whole_json(kind, stage),
        learning_rate=RATE,
        lr_scheduler_type="linear",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=SAVED,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    seen = Seen()
    callbacks = [scmoe_ds.ScMoECallback(), seen]
    return transformers.Trainer(make_model(kind), arguments, train_dataset=sequences(), callbacks=callbacks), seen


def own_loop(kind: str, stage: int, batches: list[Tensor]) -> dict[str, Tensor]:
    """The parameters after the same micro-batches in a loop with `scmoe_ds.initialize`."""
    model = make_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    engine, optimizer, _, _ = scmoe_ds.initialize(model=model, optimizer=optimizer, config=whole_json(kind, stage))
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number // 2 / STEPS)
        loss = engine(input_ids=batch, labels=batch).loss
        if kind == "moe_from_dense":
            loss = loss + 0.1 * scmoe_ds.load_balancing_loss(engine)
        engine.backward(loss)
        engine.step()
    return {name: each.detach().clone() for name, each in engine.module.named_parameters()}


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def weights_in(directory: Path) -> dict[str, Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted({*index.values()}) == sorted(path.name for path in directory.glob("*.safetensors"))
    return {name: each for file in {*index.values()} for name, each in load_file(directory / file).items()}


def is_whole(kind: str, engine: Any, directory: Path) -> float:
    """How far the saved model is from the engine's, on the ranks' own inputs or in their own parameters."""
    model = engine.module.eval()
    if kind == "autoep":
        tokens = torch.stack([each["input_ids"] for each in sequences()[dist.get_rank() :: 8]])
        again = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        with torch.no_grad():
            return (again(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max().item()
    saved = weights_in(directory)
    names = global_names(model)
    experts = {name for name in saved if ".deepspeed_experts." in name}
    assert len(experts) == 2 * len([name for name in names if ".deepspeed_experts." in name])  # of both ranks
    own = {names[name]: each.detach() for name, each in model.named_parameters()}
    return far(own, {name: saved[name] for name in own})


def check_trainer(kind: str, stage: int, directory: Path) -> dict[str, Any]:
    trainer, seen = trainer_of(kind, stage, directory)
    trainer.train()
    trainer.save_model(str(directory / "final"))
    engine = engine_of(trainer.model)
    found: dict[str, Any] = {"losses": seen.losses, "saved": is_whole(kind, engine, directory / "final")}
    checkpoint = directory / f"checkpoint-{SAVED}"
    found["experts in a checkpoint"] = sum("experts." in name for name in weights_in(checkpoint))
    found["pairs"] = len(engine.overlap.pairs)
    found["times"] = engine.overlap.state() is not None
    resumed, after = trainer_of(kind, stage, directory)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found["resumed"], found["resumed losses"] = far(after.parameters, seen.parameters), after.losses
    resumed_overlap = engine_of(resumed.model).overlap
    found["same times"] = resumed_overlap.state() == engine.overlap.state()
    found["own loop"] = far(own_loop(kind, stage, seen.batches), seen.parameters)
    return found


def check_accelerate(directory: Path) -> dict[str, Any]:
    """A scheduler that was made for the optimizer before the experts got groups of their own goes on with them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer has made one
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
    kind = "moe_from_dense"
    model = make_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=whole_json(kind, 1)))
    model, optimizer, scheduler = scmoe_ds.prepare(accelerator, model, optimizer, scheduler)
    rows = torch.stack([each["input_ids"] for each in sequences()])[dist.get_rank() :: 2]
    batches = [rows[2 * number : 2 * number + 2] for number in range(2 * STEPS)]
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    scmoe_ds.save_pretrained(model, directory / "accelerate")
    trained = {name: each.detach().clone() for name, each in model.module.named_parameters()}
    rates = {group["lr"] for group in optimizer.param_groups}
    return {
        "saved": is_whole(kind, model, directory / "accelerate"),
        "own loop": far(own_loop(kind, 1, batches), trained),
        "rates": rates,
    }


CASES = [("autoep", 2), ("moe_from_dense", 1)]
"""The engine that the callback makes is `scmoe_ds.initialize`'s, whose tests have the other stages."""


def job(directory: str) -> dict[str, Any]:
    root = Path(directory)
    found: dict[str, Any] = {}
    for kind, stage in CASES:
        found[f"{kind} {stage}"] = check_trainer(kind, stage, root / f"{kind}{stage}")
    return {**found, "accelerate": check_accelerate(root)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(job, 2, str(tmp_path_factory.mktemp("trainer")))


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_trainer(kind: str, stage: int, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank[f"{kind} {stage}"]
        assert found["own loop"] < 1e-5
        assert found["resumed"] < 1e-6
        assert found["saved"] < 1e-5
        assert found["pairs"] == 2
        assert len(found["losses"]) == STEPS
        assert found["experts in a checkpoint"] == (2 * 4 * 3 if kind == "autoep" else 2 * 4 * 4)
        if kind == "moe_from_dense":
            assert found["times"] and found["same times"]
    first = ranks[0][f"{kind} {stage}"]
    assert first["resumed losses"] == pytest.approx(first["losses"][SAVED:], abs=1e-6)


def test_accelerate(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["accelerate"]
        assert found["own loop"] < 1e-5 and found["saved"] == 0
