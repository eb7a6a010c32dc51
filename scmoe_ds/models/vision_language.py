"""A GPT that reads patches of images beside text.

A patch token holds the place of each patch, as in Qwen-VL's and LLaVA's prompts. Its embedding is a linear projection
of the patch's pixels. All blocks are GPT's own. They are told which tokens are patches, so that a rank with too many of
them may compute its experts in low precision (ReaLB, arXiv 2604.19503).

Shape suffixes: B batch, S sequence, D hidden, M images, C channels, H height, W width, P pixels of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.vision_language_settings import VisionLanguageSettings
from scmoe_ds.moe.gate import TOLERANT


class VisionLanguageGPT(GPT):
    """A GPT with a projection for patches. Arguments and errors are GPT's; `forward` and `hidden_states` also take the
    `images` of `embedded`."""

    settings: VisionLanguageSettings

    def __init__(self, settings: VisionLanguageSettings, config: ScMoEConfig, **more: Any) -> None:
        super().__init__(settings, config, **more)
        self.patch_projection = nn.Linear(settings.patch_pixels, settings.hidden_size)

    def embedded(
        self,
        tokens: Tensor,
        used_token: Tensor | None,
        inputs_embeds: Tensor | None,
        images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `GPT.embedded`, with patches in the places of their tokens.

        Args:
            tokens: [B, S] int64.
            used_token: [B, S], 0 for padding; patch tokens are marked here. None: there is no padding.
            inputs_embeds: [B, S, D] in the place of the tokens' embeddings; None: those.
            images: [..., C, H, W] in the order of their patch tokens, row by row; None: `tokens` have no patch.

        Raises:
            ValueError: images that do not fit the settings, or (on a CPU) another number of patch tokens.
        """
        hidden_BSD, _ = super().embedded(tokens, used_token, inputs_embeds)
        if images is not None:
            hidden_BSD = self._with_patches(hidden_BSD, tokens == self.settings.patch_token, images)
        return hidden_BSD, self.kinds(tokens, used_token)

    def kinds(self, tokens: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[B, S] uint8 for `used_token` of the MoE layers: 0 for padding, 1 for text, TOLERANT for a patch."""
        kinds_BS = (tokens == self.settings.patch_token).to(torch.uint8) * (TOLERANT - 1) + 1
        return kinds_BS if used_token is None else kinds_BS * (used_token != 0)

    def _with_patches(self, hidden_BSD: Tensor, places_BS: Tensor, images: Tensor) -> Tensor:
        settings = self.settings
        if images.shape[-3:] != settings.image_shape:
            raise ValueError(f"images of shape {tuple(images.shape)}: must end in {settings.image_shape}")
        pixels = in_patches(images.reshape(-1, *settings.image_shape), settings.patch_size)
        if not places_BS.is_cuda and int(places_BS.sum()) != len(pixels):  # a GPU's host does not wait for a check
            raise ValueError(
                f"images have {len(pixels)} patches: must be as many as the patch tokens, {int(places_BS.sum())}"
            )
        patches = self.patch_projection(pixels.to(self.patch_projection.weight.dtype)).to(hidden_BSD.dtype)
        return hidden_BSD.masked_scatter(places_BS.unsqueeze(-1), patches)


def gpt_of(settings: GPTSettings, config: ScMoEConfig, **more: Any) -> GPT:
    """The GPT that the settings are of."""
    if isinstance(settings, VisionLanguageSettings):
        return VisionLanguageGPT(settings, config, **more)
    return GPT(settings, config, **more)


def in_patches(images_MCHW: Tensor, size: int) -> Tensor:
    """[M * patches, P]: the squares of `size` pixels a side, row by row, image by image."""
    M, C, H, W = images_MCHW.shape
    rows = images_MCHW.reshape(M, C, H // size, size, W // size, size)
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, C * size * size)
