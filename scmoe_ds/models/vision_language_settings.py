"""Shape and style of a GPT that reads images beside text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scmoe_ds.models.layers import GPTSettings


@dataclass(frozen=True, kw_only=True)
class VisionLanguageSettings(GPTSettings):
    """As GPTSettings. Images are square, and their patches are read row by row.

    Attributes:
        patch_token: the id in the vocabulary that holds a patch's place.
        image_size, patch_size: pixels a side.
        num_channels: 1 for grey images, 3 for colours.
    """

    patch_token: int
    image_size: int
    patch_size: int
    num_channels: int = 1

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: as GPTSettings; patches that do not divide an image; a patch token outside of the vocabulary.
        """
        super().__post_init__()
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size = {self.patch_size}: must divide image_size = {self.image_size}; choose another of them"
            )
        if not 0 <= self.patch_token < self.vocab_size:
            raise ValueError(
                f"patch_token = {self.patch_token}: must be below vocab_size = {self.vocab_size}; add one to that"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return self.num_channels, self.image_size, self.image_size

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_pixels(self) -> int:
        """Numbers of a patch, all channels."""
        return self.num_channels * self.patch_size**2


def settings_class(found: Mapping[str, Any]) -> type[GPTSettings]:
    """Of what a checkpoint's description says under "gpt"."""
    return VisionLanguageSettings if "patch_token" in found else GPTSettings


def reads_images(settings: GPTSettings) -> bool:
    """Whether a GPT of these settings is a VisionLanguageGPT."""
    return isinstance(settings, VisionLanguageSettings)
