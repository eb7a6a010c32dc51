"""The formula of `forward_flops` against what torch counts in a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import MOELayer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.flops import forward_flops
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE
from scmoe_ds.models.swin_settings import SwinSettings

SIGMOID = {"score_func": "sigmoid", "load_balance_coeff": 0.001}
ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "topk", "top_k": 1},
    {"architecture": "topk", "top_k": 2},
    {"architecture": "shared_expert"},
    {"architecture": "pipelined_topk", "top_k": 2},
    {"architecture": "overlapped_shared_expert", "merge": "add"},
    *({"architecture": "scmoe", "position": f"pos{number}"} for number in (1, 2, 3)),
    {"architecture": "scmoe", "top_k": 2, "merge": "cg2"},
    {"architecture": "scmoe", "moe_every": 1, "position": "pos1", "num_experts": [2, 4, 4, 8]},
    {"architecture": "dgmoe"},
    {"architecture": "dgmoe", "pairs_per_moe": 2},
    {"moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40, "top_k": 3, "router": SIGMOID},
    {"architecture": "shared_expert", "moe_shared_expert_intermediate_size": 40},
]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def section(fields: dict[str, Any]) -> ScMoEConfig:
    """No token is dropped: the formula counts every choice."""
    return ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, "drop_tokens": False, **fields}})


def counted(model: torch.nn.Module, *inputs: Any) -> float:
    """What torch counts in a forward pass, without what is no part of the model: Swin's position biases, and the
    einsums and empty rows of DeepSpeed's own layers. (Ours do not call these modules.)"""
    routed = {}  # by the name of DeepSpeed's layer: operations of the choices of experts
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MOELayer):
            row = 2 * sum(each.numel() for each in module.experts.deepspeed_experts[0].parameters() if each.ndim > 1)

            def note(layer: Any, inputs: Any, name: str = name, row: int = row) -> None:
                tokens = inputs[0].numel() // inputs[0].shape[-1]
                routed[f"{type(model).__name__}.{name}"] = tokens * layer.gate.k * row

            handles.append(module.register_forward_pre_hook(note))
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)  # the first pass of a replaced layer is not as the others
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    by_operator = counter.get_flop_counts()
    flops = {name: sum(ops.values()) for name, ops in by_operator.items()}

    def gate(layer: str) -> int:
        """Without its outer products, which torch counts as matrix products."""
        return sum(each for op, each in by_operator[f"{layer}.gate"].items() if "bmm" not in str(op))

    total = flops["Global"] - sum(
        each for name, each in flops.items() if name.endswith(".continuous_position_bias_mlp")
    )
    return total - sum(flops[name] - gate(name) - choices for name, choices in routed.items())


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("style", [{}, {"swiglu": True, "num_key_value_heads": 2, "tie_embeddings": False}])
def test_gpt(fields: dict[str, Any], style: dict[str, Any]) -> None:
    B, S, D, F = 2, 16, 32, 64
    config, settings = section(fields), GPTSettings(4, D, 4, 48, S, ffn_hidden_size=F, **style)
    model = GPT(settings, config, S)
    total = counted(model, torch.randint(0, 48, (B, S)))
    # torch counts the whole square of scores, the formula the causal half.
    total -= settings.num_layers * B * 2 * S * S * D
    assert total == B * S * forward_flops(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "topk", "top_k": 2},
        {"architecture": "shared_expert"},
        {"architecture": "scmoe", "position": "pos2"},
        {"architecture": "scmoe", "merge": "add", "shortcut_norm": "shared"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_swin(fields: dict[str, Any]) -> None:
    B = 3
    settings = SwinSettings(32, 4, 8, (1, 1, 4, 2), (1, 1, 2, 2), num_classes=6, patch_size=2, num_channels=3)
    config = section(fields)
    model = SwinMoE(settings, config)
    total = counted(model, torch.randn(B, 3, 32, 32))
    assert total == B * forward_flops(model)
