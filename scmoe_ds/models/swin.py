"""SwinV2-MoE image classifiers: transformers' Swinv2 with DeepSpeed MoE layers, and their ScMoE form (paper A.8).

What the paper says, and table 9 with it: MoE in stages 3 and 4, the ScMoE change in stage 3 only, 8 or 16 experts,
capacity factor 1.25. Where it is silent this follows Swin-MoE (Tutel's model): an MoE in every second block, stage 4
keeping its one in the ScMoE models too, experts as wide as the MLP that they replace, a linear gate. That MoE stays
the standard one (top-2), so that a token passes two experts in every architecture. Swin-MoE itself is pre-norm; here
the blocks are those of Swinv2, whose norms end the branches:

    h = h + norm(attention(h));  h = h + norm(MLP or MoE(h))

MLP, MoE and attention read the raw residual stream h, and so does a shortcut with `shortcut_norm` "shared": the
backbone has no norm of the tapped value that could be shared. "own" gives the shortcut a LayerNorm. Then the routed
experts and their gate read values of one scale in all blocks, while h grows with every branch that is added to it.

Shape suffixes: B images, C channels, S pixels a side, L tokens of an image, D hidden, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import Swinv2Config, Swinv2Model
from transformers.models.swinv2.modeling_swinv2 import Swinv2Intermediate, Swinv2Output, Swinv2SelfAttention
from transformers.utils import ModelOutput

from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import apart
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.swin_settings import MOE_STAGES, SwinSettings, routing_of_stage
from scmoe_ds.moe.build import build_moe
from scmoe_ds.parallel.output import log
from scmoe_ds.replace import load_balancing_loss
from scmoe_ds.replace.description import describe_replacement
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.replacement import replaced_layers
from scmoe_ds.replace.token_mask import TokenMask
from scmoe_ds.replace.upcycle import MoEFeedForward

IGNORED = -100
"""A label that counts in no loss and no accuracy; fills up the last batch of a validation."""
ARCHITECTURES = ("topk", "shared_expert", "scmoe")


@dataclass
class SwinOutput(ModelOutput):
    """What a forward pass returns: a dict (without what is None) in which DeepSpeed and Hugging Face find the tensors.

    Attributes:
        loss: class_loss + aux_loss_coefficient * moe_loss (scalar fp32), or None without labels.
        class_loss: mean cross entropy in nats per image (scalar fp32), or None without labels.
        moe_loss: sum of the MoE layers' load-balancing losses (scalar fp32).
        exp_counts: per MoE layer, [E] tokens per expert before drops.
        logits: [B, N].
    """

    loss: Tensor | None = None
    class_loss: Tensor | None = None
    moe_loss: Tensor = None  # type: ignore[assignment]  # always given; a ModelOutput wants defaults
    exp_counts: tuple[Tensor, ...] = None  # type: ignore[assignment]  # the same
    logits: Tensor = None  # type: ignore[assignment]  # the same

    @property
    def task_loss(self) -> Tensor | None:
        """What the training loop reports: the loss without the balancing term."""
        return self.class_loss


class SwinMoE(nn.Module):
    """A SwinV2-MoE with a linear head. Built with transformers' initialisation; see `initialize_swin`.

    Args:
        settings: shape; `SWIN_PRESETS` has those of the paper.
        config: the "scmoe" section. Its position, merge, tap and overlap are those of the ScMoE layers of stage 3.

    Attributes:
        sequence: tokens of an image in stage 3, where most of the MoE layers are.

    Raises:
        ScMoEConfigError: an architecture that is not made for Swin, no MoE at all, or a pyramid of another length.
    """

    def __init__(self, settings: SwinSettings, config: ScMoEConfig) -> None:
        super().__init__()
        self.settings, self.config = settings, config
        self.sequence = settings.side_of(MOE_STAGES[0]) ** 2
        self.swin = Swinv2Model(_transformers_config(settings))
        for module in self.swin.modules():
            if isinstance(module, Swinv2SelfAttention):
                module.continuous_position_bias_mlp.register_forward_pre_hook(_in_its_precision)
        self.head = nn.Linear(settings.width_of(MOE_STAGES[-1]), settings.num_classes)
        for (stage, index), num_experts in zip(*_placement(settings, config), strict=True):
            block = self.swin.encoder.layers[stage].blocks[index]
            block.intermediate = MoEFeedForward(_make_moe(self.swin.config, settings, config, stage, num_experts))
            block.output = nn.Identity()  # the second half of Swinv2's MLP; an expert has both
        if config.architecture == "scmoe":
            self._connect_shortcuts()
        self._images = _ImageMask(self)
        for module in self.modules():
            if isinstance(module, MoEFeedForward):
                module.token_mask = self._images
            if isinstance(module, HookedScMoE) and module.pair is not None:
                module.pair.token_mask = self._images

    def forward(self, images: Tensor, labels: Tensor | None = None) -> SwinOutput:
        """
        Args:
            images: [B, C, S, S] floating point.
            labels: [B] int64, `IGNORED` where an image does not count; None: no loss. In evaluation such an image only
                fills the batch: its tokens go to no routed expert.

        Raises:
            ValueError: images of another shape than the model's.
        """
        C, S = self.settings.num_channels, self.settings.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (C, S, S):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: the model wants [batch, {C}, {S}, {S}] "
                "(--num-channels, --img-size)"
            )
        self._images.see(None if self.training else labels)
        pooled_BD = self.swin(images.to(self.head.weight.dtype)).pooler_output
        logits_BN = self.head(pooled_BD)
        moe_loss = load_balancing_loss(self)
        counts = tuple(feed.exp_counts for feed in self.feeds() if feed.exp_counts is not None)
        if labels is None:
            return SwinOutput(moe_loss=moe_loss, exp_counts=counts, logits=logits_BN)
        summed = F.cross_entropy(logits_BN.float(), labels, ignore_index=IGNORED, reduction="sum")
        class_loss = summed / (labels != IGNORED).sum().clamp(min=1)
        loss = class_loss + self.config.aux_loss_coefficient * moe_loss
        return SwinOutput(loss, apart(class_loss), apart(moe_loss), counts, apart(logits_BN))

    def feeds(self) -> list[MoEFeedForward]:
        """The blocks' MoE, in order; each stands where Swinv2 has its `intermediate`."""
        return [module for module in self.modules() if isinstance(module, MoEFeedForward)]

    def moe_layers(self) -> list[MoE]:
        """The MoE layer behind each element of an output's `exp_counts`."""
        return [feed.moe for feed in self.feeds()]

    def _connect_shortcuts(self) -> None:
        stage = self.swin.encoder.layers[MOE_STAGES[0]]
        fields = self.config.model_dump(exclude_unset=True)
        # The layers have their sizes already, and these fields are about all MoE layers of a model.
        section = {key: value for key, value in fields.items() if key not in ("num_experts", "replace")}
        layers = replaced_layers(stage, ScMoEConfig(**section))
        if self.config.shortcut_norm == "own" and self.config.tap is None:
            for layer in layers:
                assert layer.pair is not None
                width = self.settings.width_of(MOE_STAGES[0])
                layer.shortcut_norm = layer.pair.norm = nn.LayerNorm(width, eps=self.settings.layernorm_epsilon)
        log(*describe_replacement(stage, layers))


class _ImageMask(TokenMask):
    """The images that fill a batch, for stages with any number of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, [])
        self._used_B: Tensor | None = None

    def see(self, labels: Tensor | None) -> None:
        used_B = None if labels is None else labels != IGNORED
        self._used_B = None if used_B is None or bool(used_B.all()) else used_B

    def of(self, hidden: Tensor) -> Tensor | None:
        return None if self._used_B is None else self._used_B.unsqueeze(1).expand(hidden.shape[:2])


def _in_its_precision(mlp: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Relative coordinates for the MLP that makes a bias of them: a bf16 engine converts parameters, but no buffers."""
    return (args[0].to(next(mlp.parameters()).dtype),)


def initialize_swin(model: SwinMoE, seed: int) -> None:
    """Weights that depend on the seed and on each parameter's name only; attention starts as in transformers' Swinv2.

    Args:
        model: on the CPU.
    """
    initialize_parameters(model, seed, model.settings.init_method_std, sum(model.settings.depths))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):  # of cosine attention, in logarithms
                parameter.fill_(math.log(10.0))
            elif name.endswith("patch_embeddings.projection.bias"):
                # A patch of zeros would be a query of length 0, at which the gradient of its direction is 1e12.
                generator = torch.Generator().manual_seed(seed)
                parameter.normal_(0.0, model.settings.init_method_std, generator=generator)


def _placement(settings: SwinSettings, config: ScMoEConfig) -> tuple[list[tuple[int, int]], Sequence[int]]:
    """(stage, block) of every MoE layer, and its number of experts."""
    if config.architecture not in ARCHITECTURES:
        raise ScMoEConfigError(
            f'scmoe.architecture = "{config.architecture}": a SwinV2-MoE is one of {", ".join(ARCHITECTURES)}'
        )
    if config.join == "late":
        rule = "the norms of a Swin end its branches, so that nothing can join behind an attention; set end"
        raise fail("scmoe.join", config.join, rule)
    for field in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if (width := getattr(config, field)) is not None:
            raise fail(f"scmoe.{field}", width, "each stage of a Swin has its own width; remove the field")
    places = settings.moe_blocks(config.moe_every)
    if not any(stage == MOE_STAGES[0] for stage, _ in places):
        raise ScMoEConfigError(
            f"scmoe.moe_every = {config.moe_every}: stage 3 has {settings.depths[MOE_STAGES[0]]} "
            "block(s) and no MoE then; lower it, or raise --depths"
        )
    return places, config.experts_of_layers(len(places))


def _make_moe(swin: Swinv2Config, settings: SwinSettings, config: ScMoEConfig, stage: int, num_experts: int) -> MoE:
    """DeepSpeed's own layer with experts of the form of Swinv2's MLP."""
    width = settings.width_of(stage)
    expert = nn.Sequential(Swinv2Intermediate(swin, width), Swinv2Output(swin, width))
    architecture, top_k = routing_of_stage(config, stage)
    # What a ScMoE routes, the replacement decides.
    own = "shared_expert" if architecture == "shared_expert" else "topk"
    return build_moe(config, width, expert, num_experts, architecture=own, top_k=top_k)


def _transformers_config(settings: SwinSettings) -> Swinv2Config:
    shape: dict[str, Any] = dict(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        num_channels=settings.num_channels,
        embed_dim=settings.embed_dim,
        depths=list(settings.depths),
        num_heads=list(settings.num_heads),
        window_size=settings.window_size,
        mlp_ratio=settings.mlp_ratio,
        drop_path_rate=settings.drop_path_rate,
        hidden_dropout_prob=settings.hidden_dropout,
        attention_probs_dropout_prob=settings.attention_dropout,
        layer_norm_eps=settings.layernorm_epsilon,
    )
    return Swinv2Config(**shape)
