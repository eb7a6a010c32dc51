"""Megatron-core's shortcut MoE (its pull request 6959) is one setting of ours; computed with megatron-core's own MoE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair

WIDTH, EXPERTS, SEQUENCE = 16, 4, 12
SECTION = {
    "position": "pos1",
    "moe_every": 1,
    "merge": "add",
    "shortcut_norm": "own",
    "post_norm": True,
    "num_experts": EXPERTS,
    "top_k": 2,
    "drop_tokens": False,
    "top2_2nd_expert_sampling": False,
}


@pytest.fixture
def megatron() -> Iterator[Any]:
    """megatron-core's groups of one process. Its router asks CUDA for the device, and takes Transformer Engine's product
    for there, which it defines where that is installed only."""
    connect()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    parallel_state.initialize_model_parallel()
    no_engine = mock.patch.object(moe_utils, "te_general_gemm", None, create=True)
    with no_engine, mock.patch.object(torch.cuda, "current_device", lambda: "cpu"):
        yield parallel_state
    parallel_state.destroy_model_parallel()


def routed_by_megatron(pair: StagedPair, tokens_BSD: Tensor) -> Tensor:
    """Σ G·E of megatron-core's MoELayer with the pair's gate and experts: [B, S, D]."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        ffn_hidden_size=4 * WIDTH,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        use_cpu_initialization=True,
        add_bias_linear=False,
        activation_func=F.gelu,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    submodules = spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules  # a partial from 0.17 on
    layer = MoELayer(settings, submodules, layer_number=1)
    ours = pair.layer.deepspeed_moe
    with torch.no_grad():
        layer.router.weight.copy_(ours.gate.wg.weight)
        for theirs, expert in zip(layer.experts.local_experts, ours.experts.deepspeed_experts, strict=True):
            theirs.linear_fc1.weight.copy_(expert.input.weight)
            theirs.linear_fc2.weight.copy_(expert.output.weight)
    output, _ = layer(tokens_BSD.transpose(0, 1).contiguous())
    return output.transpose(0, 1)


def test_megatrons_shortcut_is_one_setting_of_ours(megatron: Any) -> None:
    shape = GPTSettings(1, WIDTH, 2, 64, SEQUENCE, ffn_hidden_size=4 * WIDTH, add_bias_linear=False)
    pair = make_pair(shape, ScMoEConfig.from_deepspeed({"scmoe": SECTION}), EXPERTS, "pos1", SEQUENCE)
    initialize_parameters(pair, 1, 0.4, 1)
    for norm in (pair.shortcut_norm, pair.post_norm, pair.blocks[0].attention_norm, pair.blocks[0].mlp_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    hidden = torch.randn(2, SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(2))
    block = pair.blocks[0]
    attended = hidden + block.attention(block.attention_norm(hidden))
    routed = routed_by_megatron(pair, pair.shortcut_norm(hidden))
    shared = block.moe.mlp(block.mlp_norm(attended))
    expected = attended + pair.post_norm(shared + routed)
    found = pair(hidden).hidden
    assert routed.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
