"""Sizes of a SwinV2-MoE, and those of the paper's table 9."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # flags are read before torch is imported
    from scmoe_ds.config.section import ScMoEConfig

STAGES = 4
MOE_STAGES = (2, 3)
"""Stages 3 and 4 of the paper, counted from 0."""


@dataclass(frozen=True)
class SwinSettings:
    """Shape of a SwinV2; images, patches and windows are square, sizes in pixels, patches and elements.

    Attributes:
        image_size: pixels a side.
        patch_size: pixels a side of what becomes one token.
        window_size: tokens a side of an attention window; a stage with fewer tokens has one window.
        embed_dim: width of stage 1; every later stage is twice as wide as the one before.
        depths, num_heads: blocks and attention heads per stage.
        num_channels: 1 for grey images, 3 for colours.
        mlp_ratio: feed-forward width over hidden width, of MLPs and of each expert.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
    """

    image_size: int
    window_size: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_classes: int = 1000
    patch_size: int = 4
    num_channels: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: sizes that do not fit, named as the flags that set them.
        """
        for name in ("depths", "num_heads"):  # JSON and flags have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != STAGES:
                raise ValueError(
                    f"--{name.replace('_', '-')} {_text(getattr(self, name))}: needs one number for each "
                    f"of the {STAGES} stages"
                )
        if self.image_size % self.patch_size:
            raise ValueError(f"--img-size {self.image_size} must be divisible by --patch-dim {self.patch_size}")
        tokens, halvings = self.image_size // self.patch_size, 2 ** (STAGES - 1)
        if tokens % halvings:
            raise ValueError(
                f"--img-size {self.image_size} with --patch-dim {self.patch_size} gives {tokens} tokens a "
                f"side, which {STAGES - 1} stage boundaries cannot halve; use a multiple of "
                f"{halvings * self.patch_size} pixels"
            )
        for stage in range(STAGES):
            side, heads = self.side_of(stage), self.num_heads[stage]
            if side > self.window_size and side % self.window_size:
                raise ValueError(
                    f"--window-size {self.window_size} must divide the {side} tokens a side of stage {stage + 1} "
                    f"(--img-size {self.image_size}, --patch-dim {self.patch_size})"
                )
            if heads < 1 or self.width_of(stage) % heads:
                raise ValueError(
                    f"--num-heads {_text(self.num_heads)}: stage {stage + 1} is {self.width_of(stage)} "
                    f"wide, which {heads} heads do not divide"
                )

    def side_of(self, stage: int) -> int:
        """Tokens a side in a stage, counted from 0."""
        return self.image_size // self.patch_size // 2**stage

    def width_of(self, stage: int) -> int:
        """Hidden size in a stage, counted from 0."""
        return self.embed_dim * 2**stage

    def moe_blocks(self, moe_every: int) -> list[tuple[int, int]]:
        """(stage, block) of every MoE, both counted from 0: the last of every `moe_every` blocks of stages 3 and 4."""
        return [(stage, block) for stage in MOE_STAGES for block in range(moe_every - 1, self.depths[stage], moe_every)]


def _text(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers)


def _table_9(embed_dim: int, num_heads: list[int], drop_path_rate: float) -> dict[str, Any]:
    return {
        "img_size": 192,
        "patch_dim": 4,
        "window_size": 12,
        "embed_dim": embed_dim,
        "depths": [2, 2, 18, 2],
        "num_heads": num_heads,
        "num_channels": 3,
        "drop_path_rate": drop_path_rate,
    }


SWIN_PRESETS: dict[str, dict[str, Any]] = {
    "swinv2-moe-s": _table_9(96, [3, 6, 12, 24], 0.2),
    "swinv2-moe-b": _table_9(128, [4, 8, 16, 32], 0.2),
    "swin-digits": {
        "img_size": 16,
        "patch_dim": 1,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 4, 2],
        "num_heads": [1, 2, 4, 8],
        "num_channels": 1,
        "num_classes": 10,
        "drop_path_rate": 0.0,
        "dataset": "digits",
        "init_method_std": 0.1,
    },
}
"""Values of the flags of scmoe pretrain-swin. The paper is silent on stochastic depth: 0.2 is Swin-MoE's own.
Weights of 0.02 suit hundreds of inputs: with 16, a norm enlarges its branch's output, and gradients, a hundredfold."""


def routing_of_stage(config: ScMoEConfig, stage: int) -> tuple[str, int]:
    """Architecture and top-k of the MoE layers of a stage, counted from 0: stage 4 keeps its standard MoE.

    Without a shared expert a token needs a second routed one.
    """
    if config.architecture == "scmoe" and stage != MOE_STAGES[0]:
        return "topk", 2
    return config.architecture, config.top_k
