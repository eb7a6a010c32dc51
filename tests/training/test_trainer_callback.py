"""`ScMoECallback` on one process; tests/distributed/test_trainer.py has it on two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import scmoe_ds
from scmoe_ds.engine.client_optimizer import follow_groups, with_expert_groups
from scmoe_ds.engine.take_over import take_over
from scmoe_ds.errors import CheckpointError, ScMoEConfigError
from scmoe_ds.replace.layer import HookedScMoE
from tests.helpers.hugging_face import VOCABULARY, gpt2

UNREAD = 'the "scmoe" section of the DeepSpeed JSON does nothing'


@pytest.fixture(autouse=True)
def afterwards_deepspeeds_own() -> Any:
    scmoe_ds.connect()
    yield
    take_over(False)


class Routed(nn.Module):
    """An MLP that a user has replaced by DeepSpeed's MoE."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.moe = MoE(16, mlp, num_experts=2, min_capacity=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.moe(hidden)[0]


def deepspeed_moe() -> nn.Module:
    torch.manual_seed(0)
    model = gpt2()
    for block in model.transformer.h[1::2]:
        block.mlp = Routed(block.mlp)
    return model


def trainer_of(model: nn.Module, directory: Path, section: dict[str, Any] | None, **more: Any) -> transformers.Trainer:
    whole = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    options = {"label_smoothing_factor": more.pop("label_smoothing_factor", 0.0)}
    arguments = transformers.TrainingArguments(
        str(directory),
        deepspeed=whole if section is None else {**whole, "scmoe": section},
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    rows = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, arguments, train_dataset=data, **more)


def test_replace_holds_and_nothing_is_said_to_be_unread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = deepspeed_moe()
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        trainer = trainer_of(model, tmp_path, {"replace": True}, callbacks=[scmoe_ds.ScMoECallback()])
        trainer.train()
    layers = [module for module in model.modules() if isinstance(module, HookedScMoE)]
    assert len(layers) == 2 and UNREAD not in caplog.text
    trained = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
    assert len(trainer.optimizer.param_groups) > 2 and trained  # experts apart from weights with and without decay
    (tmp_path / "all_experts").mkdir()  # of a run that was stopped while it saved
    (tmp_path / "all_experts" / "shard_00000.part").touch()
    trainer.save_model()
    assert (tmp_path / "model.safetensors.index.json").is_file() and not list(tmp_path.glob("all_experts*"))
    with pytest.raises(CheckpointError, match="is not empty; name another directory"):
        scmoe_ds.save_pretrained(trainer.model_wrapped, tmp_path)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_without_the_callback_a_warning_says_that_the_section_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "scmoe_ds"):
        trainer_of(gpt2(), tmp_path, {"replace": True}).train()
    assert UNREAD in caplog.text


@pytest.mark.parametrize("section", [None, {"replace": True}])
def test_a_callback_without_a_section_or_that_comes_late(section: dict[str, Any] | None, tmp_path: Path) -> None:
    callback = scmoe_ds.ScMoECallback()
    trainer = trainer_of(gpt2(), tmp_path, section, callbacks=[] if section else [callback])
    if section:
        trainer.add_callback(callback)
    with pytest.raises(ScMoEConfigError, match="Trainer has made no engine with a"):
        trainer.train()


def test_a_loss_that_the_model_does_not_compute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = scmoe_ds.moe_from_dense(gpt2(), {"scmoe": {"num_experts": 2}})
    callbacks = [scmoe_ds.ScMoECallback()]
    with caplog.at_level(logging.WARNING, "scmoe_ds"):
        trainer_of(model, tmp_path, {"num_experts": 2}, callbacks=callbacks, label_smoothing_factor=0.1).train()
    assert caplog.text.count("the balancing loss is not added") == 1


def test_a_scheduler_follows_the_groups() -> None:
    model = deepspeed_moe()
    dense = [each for name, each in model.named_parameters() if "deepspeed_experts" not in name]
    experts = [each for name, each in model.named_parameters() if "deepspeed_experts" in name]
    groups = [{"params": dense[:3], "lr": 1.0}, {"params": [*dense[3:], *experts], "lr": 2.0}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5, lambda step: 0.25])
    with_expert_groups(optimizer)
    for module in model.modules():
        if isinstance(module, MoE):
            module.set_deepspeed_parallelism()
    follow_groups(scheduler)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5]
    assert len(optimizer.param_groups) == 3 and optimizer.param_groups[2]["moe"]
