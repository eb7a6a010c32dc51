"""The dense parts of a Transformer: norms, rotary positions, causal attention, MLP.

Shape suffixes: B batch, S sequence, D hidden, N query heads, G key/value heads, H head size, F feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTSettings:
    """Shape and style of a GPT. Sizes in elements; GPT-2 style by default, LLaMA style by its fields.

    Attributes:
        num_key_value_heads: key/value heads of grouped-query attention; 0: as many as query heads.
        ffn_hidden_size: 0: Megatron's default, 4 * hidden_size, or with SwiGLU 2/3 of that rounded down to 64.
        normalization: "LayerNorm" or "RMSNorm".
        position_embedding: "learned_absolute" or "rope".
        init_method_std: standard deviation of all weights; output projections get it over sqrt(2 * num_layers).
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int = 0
    ffn_hidden_size: int = 0
    normalization: str = "LayerNorm"
    swiglu: bool = False
    position_embedding: str = "learned_absolute"
    rotary_base: float = 10000.0
    add_bias_linear: bool = True
    tie_embeddings: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    head_size: int = field(init=False)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: sizes that do not divide, named as the flags that set them.
        """
        D, N = self.hidden_size, self.num_attention_heads
        groups = self.num_key_value_heads or N
        default_ffn = int(4 * D * 2 / 3) // 64 * 64 if self.swiglu else 4 * D
        derived = {"num_key_value_heads": groups, "ffn_hidden_size": self.ffn_hidden_size or max(default_ffn, 64),
                   "head_size": D // N if N else 0}  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        rules = {
            f"--hidden-size {D} must be divisible by --num-attention-heads {N}": N < 1 or D % N,
            f"--num-attention-heads {N} must be divisible by --num-key-value-heads {groups}": N < 1 or N % groups,
            f"--position-embedding-type rope needs an even head size, not {self.head_size}": (
                self.position_embedding == "rope" and self.head_size % 2
            ),
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)


def make_norm(settings: GPTSettings) -> nn.Module:
    """torch's own fused LayerNorm or RMSNorm over the hidden size; NVIDIA apex's LayerNorm where it is installed."""
    D, epsilon = settings.hidden_size, settings.layernorm_epsilon
    if settings.normalization == "RMSNorm":
        return nn.RMSNorm(D, eps=epsilon)
    return fused_layer_norm_class()(D, eps=epsilon)


def fused_layer_norm_class() -> type[nn.Module]:
    """NVIDIA apex's FusedLayerNorm on a CUDA machine that has it, torch's LayerNorm elsewhere.

    The package called "apex" on the public index is another project; only NVIDIA's has apex.normalization, and it
    is never a requirement.
    """
    if torch.cuda.is_available():
        try:
            from apex.normalization import FusedLayerNorm
        except ImportError:
            return nn.LayerNorm
        return FusedLayerNorm
    return nn.LayerNorm


class RotaryEmbedding(nn.Module):
    """Rotary position embedding on the two halves of each head (the layout of LLaMA's Hugging Face weights).

    The angles are no buffer: a bf16 engine would round them, and positions beyond 256 would become alike.
    """

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.base, self.head_size = settings.rotary_base, settings.head_size
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, heads_BNSH: Tensor) -> Tensor:
        cosine_SH, sine_SH = self._angles(heads_BNSH.shape[2], heads_BNSH.device)
        first, second = heads_BNSH.float().chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return (heads_BNSH.float() * cosine_SH + rotated * sine_SH).to(heads_BNSH.dtype)

    def _angles(self, sequence: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table[0].shape[0] < sequence or self._table[0].device != device:
            exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=device) / self.head_size
            positions = torch.arange(sequence, dtype=torch.float32, device=device)
            angle_SH = torch.outer(positions, self.base**-exponent).repeat(1, 2)
            self._table = (angle_SH.cos(), angle_SH.sin())
        return self._table[0][:sequence], self._table[1][:sequence]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads through torch's scaled_dot_product_attention."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.heads = (settings.num_attention_heads, settings.num_key_value_heads, settings.num_key_value_heads)
        self.head_size, self.dropout = settings.head_size, settings.attention_dropout
        D, bias = settings.hidden_size, settings.add_bias_linear
        self.query_key_value = nn.Linear(D, sum(self.heads) * self.head_size, bias=bias)
        self.output = nn.Linear(self.heads[0] * self.head_size, D, bias=bias)
        self.rotary = RotaryEmbedding(settings) if settings.position_embedding == "rope" else None

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        B, S, _ = hidden_BSD.shape
        heads_BSNH = self.query_key_value(hidden_BSD).view(B, S, sum(self.heads), self.head_size)
        query, key, value = (part.transpose(1, 2) for part in heads_BSNH.split(self.heads, dim=2))
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        mixed_BNSH = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads[0] != self.heads[1])  # fmt: skip
        return self.output(mixed_BNSH.transpose(1, 2).reshape(B, S, -1))

    def flops_per_token(self, sequence: int) -> int:
        """Forward floating-point operations: projections, and scores and mixing of the causal half."""
        weights = self.query_key_value.weight.numel() + self.output.weight.numel()
        return 2 * weights + 2 * sequence * self.heads[0] * self.head_size


class MLP(nn.Module):
    """Feed-forward network, GELU or SwiGLU; the form of a plain MLP, a shared expert and a routed expert."""

    two_projections = True  # see scmoe_ds.moe.experts.TwoProjections

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        D, width, bias = settings.hidden_size, settings.ffn_hidden_size, settings.add_bias_linear
        self.swiglu = settings.swiglu
        self.input = nn.Linear(D, 2 * width if self.swiglu else width, bias=bias)
        self.output = nn.Linear(width, D, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.activate(self.input(hidden)))

    def activate(self, inner: Tensor) -> Tensor:
        """GELU, or SiLU of the first half times the second."""
        if self.swiglu:
            gate, up = inner.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(inner)

    def flops_per_token(self) -> int:
        """Forward floating-point operations of the two projections."""
        return 2 * (self.input.weight.numel() + self.output.weight.numel())
