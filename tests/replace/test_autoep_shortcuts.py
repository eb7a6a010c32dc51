"""ScMoE on AutoEP's layers: the equation, with the model's own modules and DeepSpeed's own MoE forward pass, in fp64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import SEQUENCE, VOCABULARY, tiny
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.overlap.schedule import Schedule

BEHIND_DENSE = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_moe", {}, {}),
    ("qwen3_moe", {"num_hidden_layers": 3}, {"join": "late"}),
    ("mixtral", {}, {"join": "late"}),
    ("deepseek_v2", BEHIND_DENSE, {"first_layer_position": "pos2"}),
    ("deepseek_v3", BEHIND_DENSE, {"first_layer_position": "pos3", "join": "late"}),
]


def whole(stage: int = 1, ep: int = 2, **section: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "expert_parallel": {"enabled": True, "autoep_size": ep, "use_grouped_mm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "scmoe": {"architecture": "scmoe", "overlap": {"calibration_steps": 0}, **section},
    }


def results(model: nn.Module) -> list[Tensor]:
    """Logits, and the gradients of all parameters."""
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE))
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    read = [each for each in model.parameters() if each.requires_grad]
    return [logits, *torch.autograd.grad(loss, read, allow_unused=True, materialize_grads=True)]


def written_out(model: Any, positions: dict[int, str], late: bool) -> None:
    """Gives every block a forward pass that is the equation."""
    blocks, values, waiting = list(model.model.layers), {}, []

    def forward(number: int, block: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        x = hidden_states + (attended[0] if isinstance(attended, tuple) else attended)
        x = x + waiting.pop() if waiting else x
        values[number] = {"pos3": block.input_layernorm(hidden_states), "pos2": block.post_attention_layernorm(x)}
        current, layer = values[number]["pos2"], block.mlp
        if not isinstance(layer, AutoEPMoELayer):
            return x + layer(current)
        position = positions.get(number, "pos1")
        shortcut = values[number]["pos3"] if position == "pos1" else values[number - 1][position]
        shared, layer.shared_experts = layer.shared_experts, None
        routed = AutoEPMoELayer.forward(layer, shortcut)
        layer.shared_experts = shared
        routed = (routed[0] if isinstance(routed, tuple) else routed).view_as(x)
        x = x if shared is None else x + shared(current).view_as(x)
        if not late or block is blocks[-1]:
            return x + routed
        waiting.append(routed)
        return x

    for number, block in enumerate(blocks):
        block.forward = lambda hidden_states, number=number, block=block, **kw: forward(
            number, block, hidden_states, **kw
        )


def compare() -> None:
    for family, settings, section in CASES:
        engine, *_ = scmoe_ds.initialize(model=tiny(family, **settings).double(), config=whole(**section))
        model, pairs = engine.module, engine.overlap.pairs
        first = results(model)  # in one piece
        for schedule in (Schedule(1, overlap=False), Schedule(2), Schedule((1, 2), 2)):
            for pair in pairs:
                pair.schedule = schedule
            found = results(model)
            for one, other in zip(found, first, strict=True):
                if schedule.num_chunks == 1:
                    assert torch.equal(one, other), (family, section, schedule)
                assert (one - other).abs().max() <= 1e-10 * other.abs().max().clamp(min=1e-6)
        labels = [operator.label for operator in backbone(pairs[-1])]
        assert labels == ["self_attn", *["shared"] * (family not in ("qwen3_moe", "mixtral"))]
        for pair in pairs:
            pair.detach()
        positions = {1: section["first_layer_position"]} if "first_layer_position" in section else {}
        written_out(model, positions, section.get("join") == "late")
        for one, other in zip(first, results(model), strict=True):
            worst = (one - other).abs().max() / other.abs().max().clamp(min=1e-6)
            assert worst < 1e-5, (family, section, float(worst), "routers and weights are fp32")


def losses(stage: int) -> list[float]:
    """Of steps with DeepSpeed's engine; ZeRO-3 gathers every parameter where its module is called."""
    more = {"join": "late", "overlap": {"calibration_steps": 1}}
    engine, *_ = scmoe_ds.initialize(model=tiny("deepseek_v2", **BEHIND_DENSE), config=whole(stage, **more))
    found = []
    for step in range(6):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE))
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    times = [kind.times for kind in engine.overlap.kinds]
    assert [each is not None and [one.name for one in each.backbone] for each in times] == [["self_attn", "shared"]] * 2
    assert times[0].late is not None and times[0].late.after_dispatch and times[1].late is None
    return found


def checkpointing() -> str:
    engine, *_ = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=whole(ep=1, join="late"))
    engine.module.gradient_checkpointing_enable()
    engine.module.train()
    with pytest.raises(ScMoEConfigError, match="activation checkpoint") as caught:
        results(engine.module)
    return str(caught.value)


def refused(settings: dict[str, Any], **section: Any) -> str:
    with pytest.raises(ScMoEConfigError) as caught:
        scmoe_ds.initialize(model=tiny("deepseek_v2", **settings), config=whole(**section))
    return str(caught.value)


def generated() -> None:
    """With a cache, token by token, as without one."""
    for section in ({}, {"join": "late"}):
        engine, *_ = scmoe_ds.initialize(model=tiny("qwen3_moe").double(), config=whole(**section))
        model = engine.module.eval()
        tokens = torch.randint(VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(dist.get_rank()))
        with torch.no_grad():
            end = model(input_ids=tokens[:, :3], use_cache=True)
            cache, pieces = end.past_key_values, [end.logits]
            for place in (3, 4):
                pieces.append(
                    model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits
                )
            assert torch.allclose(torch.cat(pieces, 1), model(input_ids=tokens, use_cache=False).logits, atol=1e-6)


def everything() -> dict[str, Any]:
    compare()
    generated()
    found: dict[str, Any] = {"losses": [losses(stage) for stage in (1, 3)], "checkpointing": checkpointing()}
    found["pos2"] = refused(BEHIND_DENSE, position="pos2")
    found["first block"] = refused({}, first_layer_position="pos3")
    found["pattern"] = refused({}, tap="{previous}.nowhere:input")
    return found


def test_scmoe_on_autoeps_layers() -> None:
    for found in run_distributed(everything, 2):
        one, three = found["losses"]
        assert one == pytest.approx(three, abs=1e-4) and one[-1] != one[0]
        assert found["checkpointing"].startswith(
            'scmoe.join = "late": an activation checkpoint around model.layers.0.mlp'
        )
        assert re.search(
            r'scmoe.position = "pos2": the block before model.layers.2.mlp has an MoE itself', found["pos2"]
        )
        assert "nothing precedes it" in found["first block"]
        assert found["pattern"].startswith('scmoe.tap = "{previous}.nowhere:input": ')


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "as_is", "join": "late"}, 'scmoe.join = "late": changes the model\'s mathematics'),
        (
            {"architecture": "as_is", "first_layer_position": "pos2"},
            'scmoe.first_layer_position = "pos2": changes the model\'s mathematics',
        ),
    ],
)
def test_what_the_json_cannot_ask_for(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ScMoEConfigError, match=re.escape(message)):
        ScMoEConfig.from_deepspeed(whole(**section))
