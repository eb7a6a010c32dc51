"""The attentions of Hugging Face's MoE models: heads, and how many parameters their matrices, norms and biases have."""

from __future__ import annotations

from dataclasses import dataclass

from scmoe_ds.simulate.hugging_face_config import Config


@dataclass(frozen=True)
class Attention:
    """As the fields of `model.Stage`.

    Attributes:
        span: tokens that a token costs as much as to attend to, of a linear attention; 0: all before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    value_dim: int = 0
    span: int = 0


def usual(config: Config, biases: bool = False, norms: str = "") -> Attention:
    """Grouped queries.

    Args:
        biases: of queries, keys and values, by default.
        norms: of queries and keys: "head" by head, "all" over all heads, "" none.
    """
    D, heads, kv_heads, size = _heads(config)
    queries, keys = heads * size, kv_heads * size
    parameters = D * (queries + 2 * keys) + queries * D
    if config.flag("attention_bias", False):
        parameters += queries + 2 * keys + D
    elif config.flag("qkv_bias", biases):
        parameters += queries + 2 * keys
    parameters += {"head": 2 * size, "all": queries + keys}.get(norms, 0)
    return Attention(heads, kv_heads, size, parameters)


def gated(config: Config) -> Attention:
    """Grouped queries with norms by head, and a sigmoid gate as wide as the queries."""
    found = usual(config, norms="head")
    gate = config.hidden * found.heads * found.head_dim
    return Attention(found.heads, found.kv_heads, found.head_dim, found.parameters + gate)


def mla(config: Config) -> Attention:
    """Latent attention: queries, keys and values from narrow rows."""
    D, heads = config.hidden, config.count("num_attention_heads")
    plain, turned, values = (config.count(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank, latent = config.count("q_lora_rank", default=0), config.count("kv_lora_rank")
    wide = heads * (plain + turned)
    queries = D * rank + rank + rank * wide if rank else D * wide
    keys = D * (latent + turned) + latent + latent * heads * (plain + values)
    return Attention(heads, heads, plain + turned, queries + keys + heads * values * D, values)


def delta_net(config: Config) -> Attention:
    """Gated delta net, a linear attention in chunks."""
    D, key_heads, heads = config.hidden, config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    key_size, size = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    keys, values = key_heads * key_size, heads * size
    projected = D * (2 * keys + 2 * values + 2 * heads)
    convolution = (2 * keys + values) * config.count("linear_conv_kernel_dim")
    parameters = projected + convolution + 2 * heads + size + values * D
    return Attention(heads, key_heads, key_size, parameters, size if size != key_size else 0, span=2 * key_size)


def lightning(config: Config) -> Attention:
    """MiniMax's linear attention in blocks, with a gate and a norm of its output."""
    D, heads, _, size = _heads(config)
    wide = heads * size
    return Attention(heads, heads, size, D * 3 * wide + D * wide + wide + wide * D, span=2 * size)


def _heads(config: Config) -> tuple[int, int, int, int]:
    D, heads = config.hidden, config.count("num_attention_heads")
    size = config.count("head_dim", default=0) or D // heads
    if not config.values.get("head_dim") and D % heads:
        raise config.error("hidden_size", f"must be divisible by num_attention_heads = {heads}")
    kv_heads = config.count("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise config.error("num_attention_heads", f"must be divisible by num_key_value_heads = {kv_heads}")
    return D, heads, kv_heads, size
