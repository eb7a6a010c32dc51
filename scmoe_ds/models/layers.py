"""The dense parts of a Transformer: norms, causal attention, MLP.

Shape suffixes: B batch, S sequence, D hidden, N query heads, G key/value heads, H head size, F feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.models.parallel_layers import Group, column_parallel, own_random_numbers, row_parallel, size_of
from scmoe_ds.models.rotary import RotaryEmbedding
from scmoe_ds.moe.kernels import kernels_of


@dataclass(frozen=True)
class GPTSettings:
    """Shape and style of a GPT. Sizes in elements; GPT-2 style by default, LLaMA style by its fields.

    Attributes:
        num_key_value_heads: key/value heads of grouped-query attention; 0: as many as query heads.
        ffn_hidden_size: 0: Megatron's default, 4 * hidden_size, or with SwiGLU 2/3 of that rounded down to 64.
        normalization: "LayerNorm" or "RMSNorm".
        position_embedding: "learned_absolute" or "rope".
        init_method_std: standard deviation of all weights; output projections get it over sqrt(2 * num_layers).
        norm_placement: "pre": x + f(norm(x)), as GPT-2 and later; "post": norm(x + f(x)), the original Transformer's
            (which had no final norm; this model keeps it).
        residual_scale: factor on each sub-layer's f before it is added; Granite's residual_multiplier, and the inverse
            of DeepNorm's alpha.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int = 0
    ffn_hidden_size: int = 0
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    swiglu: bool = False
    position_embedding: Literal["learned_absolute", "rope"] = "learned_absolute"
    rotary_base: float = 10000.0
    add_bias_linear: bool = True
    tie_embeddings: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    norm_placement: Literal["pre", "post"] = "pre"
    residual_scale: float = 1.0
    head_size: int = field(init=False)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: sizes that do not divide, named as the flags that set them.
        """
        D, N = self.hidden_size, self.num_attention_heads
        groups = self.num_key_value_heads or N
        default_ffn = int(4 * D * 2 / 3) // 64 * 64 if self.swiglu else 4 * D
        derived = {
            "num_key_value_heads": groups,
            "ffn_hidden_size": self.ffn_hidden_size or max(default_ffn, 64),
            "head_size": D // N if N else 0,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        rules = {
            f"--hidden-size {D} must be divisible by --num-attention-heads {N}": N < 1 or D % N,
            f"--num-attention-heads {N} must be divisible by --num-key-value-heads {groups}": N < 1 or N % groups,
            f"--norm-placement {self.norm_placement} is neither pre nor post": self.norm_placement
            not in ("pre", "post"),
            f"--residual-scale {self.residual_scale:g} must be a positive number": not 0
            < self.residual_scale
            < math.inf,
            f"--position-embedding-type rope needs an even head size, not {self.head_size}": (
                self.position_embedding == "rope" and self.head_size % 2
            ),
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)

    def check_tensor_parallel(self, ranks: int, widths: Mapping[str, int | None]) -> None:
        """
        Args:
            widths: of experts that are divided, by the names of their flags; None: none of their own.

        Raises:
            ValueError: heads, feed-forward size or vocabulary that cannot be divided among so many ranks.
        """
        divided = {
            "--num-attention-heads": self.num_attention_heads,
            "--num-key-value-heads": self.num_key_value_heads,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "the padded vocabulary": self.vocab_size,
            **{name: width or 0 for name, width in widths.items()},
        }
        for name, size in divided.items():
            if size % ranks:
                raise ValueError(f"--tensor-model-parallel-size {ranks} must divide {name} {size}")


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


class AttentionCache(Protocol):
    """Keys and values of the tokens that an attention layer has seen; see scmoe_ds.inference.kv_cache.

    Attributes:
        capacity: most tokens of a sequence.
    """

    capacity: int

    def positions(self, sequence: int) -> Tensor:
        """[B, S] int64 places of the next `sequence` tokens of every row."""

    def extend(self, key_BGSH: Tensor, value_BGSH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes in the next tokens.

        Returns:
            keys and values that they may look at, [B, G, kept, H], and [B, 1, S, kept] which of them each may; None
            for a plain causal mask.
        """


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads through torch's scaled_dot_product_attention.

    Args:
        settings: sizes.
        group: tensor-parallel ranks, among which the heads are divided.

    Attributes:
        heads: query, key and value heads of this rank.
        cache: tokens that came before, while text is generated; None: there are none.
    """

    def __init__(self, settings: GPTSettings, group: Group = None) -> None:
        super().__init__()
        self.group, self.head_size, self.dropout = group, settings.head_size, settings.attention_dropout
        heads = (settings.num_attention_heads, settings.num_key_value_heads, settings.num_key_value_heads)
        self.heads = tuple(number // size_of(group) for number in heads)
        D, bias = settings.hidden_size, settings.add_bias_linear
        self.query_key_value = column_parallel(D, [number * self.head_size for number in heads], bias, group)
        self.output = row_parallel(heads[0] * self.head_size, D, bias, group)
        rotary = settings.position_embedding == "rope"
        self.rotary = RotaryEmbedding(settings.head_size, settings.rotary_base) if rotary else None
        self.cache: AttentionCache | None = None

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        B, S, _ = hidden_BSD.shape
        heads_BSNH = self.query_key_value(hidden_BSD).view(B, S, sum(self.heads), self.head_size)
        cache, mask = self.cache, None
        if self.rotary is None:
            parts = heads_BSNH.split(self.heads, dim=2)
        else:
            queries, keys, values = self.heads
            turned, still = heads_BSNH.split([queries + keys, values], dim=2)
            turned = self.rotary(turned, *(() if cache is None else (cache.positions(S), cache.capacity)))
            parts = (*turned.split([queries, keys], dim=2), still)
        query, key, value = (part.transpose(1, 2) for part in parts)
        if cache is not None:
            key, value, mask = cache.extend(key, value)
        dropout = self.dropout if self.training else 0.0
        with own_random_numbers(self.group if dropout else None, hidden_BSD.device):
            mixed_BNSH = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                enable_gqa=self.heads[0] != self.heads[1],
            )
        return self.output(mixed_BNSH.transpose(1, 2).reshape(B, S, -1))

    def flops_per_token(self, sequence: int) -> int:
        """Forward floating-point operations: projections, and scores and mixing of the causal half."""
        weights = self.query_key_value.weight.numel() + self.output.weight.numel()
        return 2 * weights + 2 * sequence * self.heads[0] * self.head_size


class MLP(nn.Module):
    """Feed-forward network, GELU or SwiGLU; the form of a plain MLP, a shared expert and a routed expert.

    Args:
        settings: sizes.
        group: tensor-parallel ranks, among which the inner dimension is divided.
        width: of the inner dimension; None: `settings.ffn_hidden_size`.
    """

    def __init__(self, settings: GPTSettings, group: Group = None, width: int | None = None) -> None:
        super().__init__()
        D, width, bias = settings.hidden_size, width or settings.ffn_hidden_size, settings.add_bias_linear
        self.swiglu = settings.swiglu
        # See scmoe_ds.moe.experts.TwoProjections; divided projections communicate and are not called apart.
        self.two_projections = group is None
        self.input = column_parallel(D, [width, width] if self.swiglu else [width], bias, group)
        self.output = row_parallel(width, D, bias, group)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.activate(self.input(hidden)))

    def activate(self, inner: Tensor) -> Tensor:
        """GELU, or SiLU of the first half times the second."""
        if self.swiglu:
            return kernels_of(inner).swiglu(inner)
        return F.gelu(inner)

    def flops_per_token(self) -> int:
        """Forward floating-point operations of the two projections."""
        return 2 * (self.input.weight.numel() + self.output.weight.numel())
