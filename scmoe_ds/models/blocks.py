"""Transformer blocks with an MLP or an MoE.

No attribute here may contain the word "expert": DeepSpeed's checkpoints would take it for routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, cast

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import MLP, Attention, GPTSettings, make_norm
from scmoe_ds.models.parallel_layers import Group
from scmoe_ds.moe.build import build_moe
from scmoe_ds.moe.decisions.partition import mark_part
from scmoe_ds.overlap.executor import Activations
from scmoe_ds.parallel.tensor import Split, mark_tensor_parallel, tensor_parallel_rule


class Block(nn.Module):
    """Transformer block. Each sub-layer f with its norm makes x + f(norm(x)) of x: pre-norm, as in GPT-2 and later.

    The second sub-layer is an MLP, or an MoE that a pair (models/pairs.py) calls. The equations of the paper leave the
    norms out.
    """

    pre_norm = True

    def __init__(self, settings: GPTSettings, group: Group, moe: MoE | None = None, owns_moe: bool = True) -> None:
        super().__init__()
        self.dropout, self.owns_moe = settings.hidden_dropout, owns_moe
        self.attention_norm = make_norm(settings)
        self.attention = Attention(settings, group)
        self.mlp_norm = make_norm(settings)
        if moe is None:
            self.mlp = MLP(settings, group)
        elif owns_moe:
            self.moe = moe
        else:  # another block's: DeepSpeed trains and saves it there, and under one name
            self.__dict__["moe"] = moe

    def attend(self, activations: Activations) -> Activations:
        """Eq. 8 and 10: H_mh = H + Attn(H)."""
        x, norm = activations.hidden, self.attention_norm
        return Activations(self.add(x, self.attention(self.reading(x, norm)), norm))

    def feed(self, activations: Activations) -> Activations:
        """Eq. 9: H_mlp = H_mh + MLP(H_mh)."""
        x, norm = activations.hidden, self.mlp_norm
        return Activations(self.add(x, self.mlp(self.reading(x, norm)), norm))

    def moe_input(self, hidden: Tensor) -> Tensor:
        """What the second sub-layer reads of H_mh."""
        return self.reading(hidden, self.mlp_norm)

    def reading(self, hidden: Tensor, norm: nn.Module) -> Tensor:
        """What the sub-layer of a norm reads."""
        return norm(hidden)

    def add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        """Adds to the residual stream what the sub-layer of a norm returned, with dropout on it."""
        return hidden + F.dropout(update, self.dropout, self.training)

    def where_read(self, sub_layer: Literal["attention", "mlp"]) -> tuple[nn.Module, Literal["input", "output"]]:
        """A module and its side at which a hook finds what a sub-layer reads. A pair's MoE has no hooks of its own."""
        if sub_layer == "attention":
            return self.attention, "input"
        return (self.mlp_norm if self.pre_norm else self.attention_norm), "output"


class ScaledBlock(Block):
    """x + s * f(norm(x)) with the residual scale s (Granite)."""

    def __init__(self, settings: GPTSettings, group: Group, moe: MoE | None = None, owns_moe: bool = True) -> None:
        super().__init__(settings, group, moe, owns_moe)
        self.scale = settings.residual_scale

    def add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        return super().add(hidden, self.scale * update, norm)


class PostLNBlock(ScaledBlock):
    """norm(x + s * f(x)): post-norm, as in the original Transformer (s = 1) and in DeepNorm."""

    pre_norm = False

    def reading(self, hidden: Tensor, norm: nn.Module) -> Tensor:
        return hidden

    def add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        return norm(super().add(hidden, update, norm))


def make_moe(settings: GPTSettings, config: ScMoEConfig, num_experts: int, group: Group) -> MoE:
    """The layer that `config.architecture` names; "topk" and "shared_expert" are DeepSpeed's own classes.

    The shared expert is divided among the tensor-parallel ranks; a routed expert only where the section says so.
    """
    divisible, parts = config.expert_tensor_parallelism, config.expert_partition
    width = (config.moe_ffn_hidden_size or settings.ffn_hidden_size) // parts
    # Offloaded experts are never all in memory: they are filled one after another.
    with torch.device("meta") if config.offload_experts is not None else nullcontext():
        routed_mlp = MLP(settings, group if divisible else None, width)
    shared_width = config.moe_shared_expert_intermediate_size
    layer = build_moe(config, settings.hidden_size, routed_mlp, num_experts)
    for copied in layer.deepspeed_moe.experts.deepspeed_experts:  # copies of a parameter lose what was noted on it
        for original, parameter in zip(routed_mlp.parameters(), copied.parameters(), strict=True):
            rule = tensor_parallel_rule(original)
            if parts > 1:
                whole = None if rule is None else Split(rule.dim, tuple(parts * size for size in rule.sections))
                mark_part(parameter, parts, whole)
            rule = rule if divisible else None
            mark_tensor_parallel(parameter, rule, divided=rule is not None and group is not None)
    usual = parts == 1 and config.offload_experts is None
    alike = group is None and shared_width == config.moe_ffn_hidden_size and usual
    if layer.use_residual and not alike:
        layer.mlp = MLP(settings, group, shared_width)  # DeepSpeed's would be of one form with the routed experts
    return layer


def make_blocks(
    settings: GPTSettings, config: ScMoEConfig, num_experts: int, group: Group, shared_moe: MoE | None = None
) -> Sequence[Block]:
    """Dense blocks and, last, one with the MoE, its own or an earlier pair's; `group` are the tensor-parallel ranks."""
    if settings.norm_placement == "post":
        block: type[Block] = PostLNBlock
    else:
        block = Block if settings.residual_scale == 1 else ScaledBlock
    dense = [block(settings, group) for _ in range(config.moe_every - 1)]
    moe = shared_moe or make_moe(settings, config, num_experts, group)
    blocks = nn.ModuleList([*dense, block(settings, group, moe, owns_moe=shared_moe is None)])
    return cast(Sequence[Block], blocks)
