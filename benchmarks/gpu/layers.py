"""The MoE layers that are compared on one card: this package's, DeepSpeed's, and AutoEP's parts in AutoEP's order."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.gpu.setting import LayerShape
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.layer import StagedMoE

OURS, DEEPSPEED, AUTOEP = "scmoe_ds", "DeepSpeed MoE", "AutoEP"


def settings_of(shape: LayerShape, sequence: int, vocabulary: int = 64) -> GPTSettings:
    """Of the model around the layer."""
    return GPTSettings(**shape.settings, vocab_size=vocabulary, max_position_embeddings=sequence)


def make(kind: type[MoE], shape: LayerShape, device: torch.device, k: int = 1) -> MoE:
    """A layer of bf16 with all experts on this rank."""
    expert = MLP(settings_of(shape, 64))
    layer = kind(shape.hidden_size, expert, shape.num_experts, 1, k, capacity_factor=shape.capacity_factor)
    layer.set_deepspeed_parallelism()
    return layer.to(device, torch.bfloat16)


def make_all(shape: LayerShape, device: torch.device) -> tuple[dict[str, nn.Module], str | None]:
    """All layers of a shape, and why AutoEP's is not among them.

    AutoEP has experts with SwiGLU and without biases only. Which kernels it has depends on the card and on the versions
    of DeepSpeed, torch and Triton: it is tried out here, and left out where it fails.
    """
    layers: dict[str, nn.Module] = {OURS: make(StagedMoE, shape, device), DEEPSPEED: make(MoE, shape, device)}
    layers[DEEPSPEED].load_state_dict(layers[OURS].state_dict())
    if not shape.settings.get("swiglu"):
        return layers, "its experts have SwiGLU"
    try:
        layer = AutoEPLayer(shape, settings_of(shape, 64).ffn_hidden_size).to(device, torch.bfloat16)
        hidden = torch.randn(1, 64, shape.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        layer(hidden)[0].sum().backward()
    except Exception as error:
        return layers, f"{type(error).__name__}: {error}"
    return layers | {AUTOEP: layer}, None


def expert_flops(shape: LayerShape, rows: int) -> float:
    """Forward operations of the experts on so many rows."""
    settings = settings_of(shape, 64)
    return 2.0 * rows * shape.hidden_size * settings.ffn_hidden_size * (3 if settings.swiglu else 2)


class AutoEPLayer(nn.Module):
    """What `AutoEPMoELayer` of DeepSpeed computes at expert-parallel size 1, top-1, from the parts that it is made of.

    AutoEP itself replaces modules of Hugging Face models. Here its router, permutation, experts and weighted sum are
    called in its order, the fused ones where it would choose them. Random weights.
    """

    def __init__(self, shape: LayerShape, ffn_hidden_size: int) -> None:
        super().__init__()
        from deepspeed.moe.ep_experts import GroupedExperts
        from deepspeed.moe.ep_router import TokenChoiceTopKRouter

        on_gpu = torch.cuda.is_available()
        self.router = TokenChoiceTopKRouter(
            shape.hidden_size, shape.num_experts, None, None, 1, "softmax", False, 1.0, False
        )
        self.experts = GroupedExperts(shape.hidden_size, ffn_hidden_size, shape.num_experts, use_grouped_mm=on_gpu)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)

    def stages(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Its output, and each stage as a function of no arguments, for times of its own."""
        from deepspeed.module_inject.auto_ep_layer import permute_by_local_expert, unpermute_by_local_expert

        tokens = hidden.reshape(-1, hidden.shape[-1])

        def gate() -> Any:
            return self.router(tokens)

        scores, chosen, counts = gate()

        def encode() -> Any:
            order = torch.argsort(chosen.view(-1), stable=True)
            return order, permute_by_local_expert(tokens[order], counts)

        order, (rows, indices, aligned, count) = encode()

        def experts() -> Tensor:
            return self.experts(rows, aligned)

        computed = experts()

        def decode() -> Tensor:
            restored = unpermute_by_local_expert(computed, indices, count)
            return self._combine(restored, scores, order, hidden.shape)

        return decode(), {"gate": gate, "encode": encode, "experts": experts, "decode": decode}

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        """[1, T, D] → the same, with DeepSpeed's returns."""
        output, _ = self.stages(hidden)
        return output, output.new_zeros(()), None

    @staticmethod
    def _combine(rows: Tensor, scores: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
        from deepspeed.module_inject.auto_ep_layer import combine_from_routed
        from deepspeed.ops.triton_ops import autoep_fused_token_ops as fused

        if rows.is_cuda and fused.is_available():
            return fused.fused_weighted_restore(
                rows, top_scores=scores, token_indices_sorted=order, top_k=1, shape=tuple(shape)
            )
        return combine_from_routed(rows, scores, order, 1, "post", "weighted_sum", tuple(shape))
