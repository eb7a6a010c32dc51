"""Hugging Face's Accelerate, which calls deepspeed.initialize itself, with a model whose layers were replaced before."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

import scmoe_ds
from scmoe_ds.engine import connect, parameter_groups
from scmoe_ds.replace.layer import HookedScMoE
from tests.helpers.hugging_face import VOCABULARY, gpt2


def test_accelerate_trains_a_replaced_model_with_overlap() -> None:
    connect()
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have made one, with Trainer
    torch.manual_seed(0)
    section = {"num_experts": 4, "overlap": {"expert_slot": 2, "num_chunks": 1, "calibration_steps": 0}}
    model = scmoe_ds.moe_from_dense(gpt2(), scmoe_ds.ScMoEConfig.from_deepspeed({"scmoe": section}), noise=0.01)
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(model))
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    whole = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}
    tokens = (torch.arange(80).unsqueeze(1) * 5 + torch.arange(12)) % VOCABULARY
    loader = torch.utils.data.DataLoader(tokens, batch_size=4)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=whole), cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss + 0.01 * scmoe_ds.load_balancing_loss(model)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    layers = [module for module in model.modules() if isinstance(module, HookedScMoE)]
    assert len(layers) == 2 and all(layer.pair is not None and layer.pair._recomputation.in_pieces for layer in layers)
