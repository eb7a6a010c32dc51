"""A fine-grained MoE on two ranks as on one: router, bias and z-loss, widths of experts; saved, resharded, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import loading
from scmoe_ds.checkpoint.export import export
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.router import correction_biases
from scmoe_ds.parallel import tensor

SETTINGS = GPTSettings(2, 16, 2, 32, 16, hidden_dropout=0.0, attention_dropout=0.0)
ROUTER = {
    "score_func": "sigmoid",
    "route_scale": 1.5,
    "num_expert_groups": 4,
    "num_limited_groups": 2,
    "load_balance_coeff": 0.02,
    "load_balance_rule": "proportional",
    "z_loss_coefficient": 0.01,
}
SAVED_AT, STEPS, MICRO_BATCHES = 2, 4, 4


def whole(ep_size: int, stage: int, **section: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES // tensor.data_parallel_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "scmoe": {
            "num_experts": 8,
            "top_k": 3,
            "expert_parallel_size": ep_size,
            "aux_loss_coefficient": 0,
            "router": ROUTER,
            "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "overlap": {"calibration_steps": 0, "num_chunks": 1},
            **section,
        },
    }


def train(ep_size: int, stage: int, load: str | None = None, save: str | None = None) -> dict[str, Any]:
    settings = whole(ep_size, stage)
    config = scmoe_ds.ScMoEConfig.from_deepspeed(settings)
    model = GPT(SETTINGS, config, group=tensor.tensor_parallel_group())
    initialize_parameters(model, 1 if load is None else 2, 0.3, SETTINGS.num_layers)
    description = checkpoint.describe(SETTINGS, config, dist.get_world_size(), settings)
    source = checkpoint.choose(load, None, False, description)
    engine = scmoe_ds.initialize(model=model, config=settings)[0]
    first, _ = checkpoint.load(engine, source)
    losses = []
    for step in range(first, STEPS):
        total = torch.zeros(())
        replicas = tensor.data_parallel_size()
        for micro in range(MICRO_BATCHES // replicas):
            number = step * MICRO_BATCHES + micro * replicas + tensor.data_parallel_rank()
            generator = torch.Generator().manual_seed(number)
            tokens = torch.randint(0, 32, (1, 17), generator=generator)
            loss = engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / MICRO_BATCHES / tensor.tensor_parallel_size()
        dist.all_reduce(total)
        losses.append(total.item())
        if save and step + 1 == SAVED_AT:
            checkpoint.save(engine, save, SAVED_AT, 4 * SAVED_AT, description)
    biases = torch.cat(list(correction_biases(engine.module).values()))
    everybodys = [torch.empty_like(biases) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, biases)
    assert all(torch.equal(each, biases) for each in everybodys), "every rank computes the same bits"
    return {"losses": losses, "biases": biases, "norm": float(engine.get_global_grad_norm())}


def on_two_ranks(saved: str) -> dict[str, dict[str, Any]]:
    tensor.start_tensor_parallel(1)
    found = {"EP 2": train(2, 1, save=saved)}
    path = f"{saved}/global_step{SAVED_AT}"
    found["EP 2, resumed"] = train(2, 1, load=path)
    found["EP 1, ZeRO-2, resharded"] = train(1, 2, load=path)
    readable, loading._deepspeed_can_read = loading._deepspeed_can_read, lambda layout: False
    found["EP 2, by pieces"] = train(2, 1, load=path)
    loading._deepspeed_can_read = readable
    return found


def on_tensor_ranks() -> dict[str, Any]:
    tensor.start_tensor_parallel(2)
    return train(2, 1)


def test_the_same_on_any_layout(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    scmoe_ds.connect()
    alone = train(1, 1)
    assert alone["biases"].abs().max() > 1e-4 and len(alone["losses"]) == STEPS
    found = run_distributed(on_two_ranks, 2, saved)[0]
    for name, run in found.items():
        torch.testing.assert_close(run["losses"], alone["losses"][-len(run["losses"]) :], atol=2e-5, rtol=2e-5)
        # What is compared are counts: the last digit of an addition may differ from process to process count.
        torch.testing.assert_close(run["biases"], alone["biases"], atol=1e-7, rtol=1e-6)
        assert len(run["losses"]) == (STEPS if name == "EP 2" else STEPS - SAVED_AT)
    for name in ("EP 2, resumed", "EP 2, by pieces"):
        assert found[name]["losses"] == found["EP 2"]["losses"][SAVED_AT:], name
        assert torch.equal(found[name]["biases"], found["EP 2"]["biases"]), name
    divided = run_distributed(on_tensor_ranks, 2)[0]
    torch.testing.assert_close(divided["losses"], alone["losses"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(divided["biases"], alone["biases"], atol=1e-7, rtol=1e-6)
    check_export(Path(saved) / f"global_step{SAVED_AT}", tmp_path / "export")


def check_export(source: Path, out: Path) -> None:
    """The bias keeps its digits in a bf16 export, and a model that generates has it."""
    export(source, out, torch.bfloat16)
    tensors = load_file(out / "model-00001-of-00001.safetensors")
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert tensors[name].dtype == torch.float32 and tensors[name].abs().max() > 0
    trained = TrainedModel.open(out)
    model = load_model(trained, serving_config(trained.config), torch.bfloat16, torch.device("cpu"))
    assert torch.equal(correction_biases(model)[name], tensors[name])
