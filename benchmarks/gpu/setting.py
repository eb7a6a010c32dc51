"""What all steps share: the device, the sizes, and where files go. Imports no torch: the parent process needs none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """How a step runs.

    Attributes:
        rehearsal: on the CPU, with sizes so small that its numbers mean nothing. It tests the steps themselves.
        directory: for files that a step leaves, such as traces.
        name: how their names begin.
    """

    rehearsal: bool
    directory: str
    name: str

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        import torch

        return torch.device("cpu" if self.rehearsal else "cuda")

    def size(self, real: T, rehearsed: T) -> T:
        """The size of the measurement, or that of a rehearsal."""
        return rehearsed if self.rehearsal else real

    def file(self, ending: str) -> Path:
        """Path of a file that the step leaves."""
        return Path(self.directory) / f"{self.name}{ending}"


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer and the model around it.

    Attributes:
        settings: fields of `GPTSettings`, without the vocabulary and the length of a sequence.
    """

    name: str
    settings: dict[str, Any]
    num_experts: int
    capacity_factor: float = 2.0

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return int(self.settings["hidden_size"])


_LLAMA = {
    "num_key_value_heads": 4,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding": "rope",
}


def layer_shapes(setting: Setting) -> list[LayerShape]:
    """GPT2-MoE-Medium and LLaMA2-MoE of the paper's table 8, with all experts on one card."""
    if setting.rehearsal:
        small = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        return [LayerShape("GPT2, small", small, 4), LayerShape("LLaMA2, small", small | _LLAMA, 4)]
    medium = {"num_layers": 2, "hidden_size": 1024, "num_attention_heads": 16}
    llama = {"num_layers": 2, "hidden_size": 2048, "num_attention_heads": 16, **_LLAMA}
    return [LayerShape("GPT2-MoE-Medium", medium, 16), LayerShape("LLaMA2-MoE", llama, 8)]


def token_counts(setting: Setting) -> tuple[int, ...]:
    """Tokens of a pass; the last is the one that targets speak of."""
    return setting.size((4096, 16384), (24, 48))
