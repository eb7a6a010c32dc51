"""Sizes of a Hugging Face MoE model from its config.json, which is read as it is, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ModelError
from scmoe_ds.simulate.hugging_face_attention import Attention, delta_net, gated, lightning, mla, usual
from scmoe_ds.simulate.hugging_face_config import Config
from scmoe_ds.simulate.json_files import finding, read_object, validated
from scmoe_ds.simulate.model import Model

_LONGEST = 4096
"""Tokens of a sample, where nothing says how many and the model takes more."""


@dataclass(frozen=True)
class Family:
    """What differs between models of different types.

    Attributes:
        attention: of a block.
        inner: keys of the width inside a routed expert.
        dense: key of the width inside the MLP of a block without an MoE.
        shared: width inside the shared expert.
        shared_gate: whether a sigmoid weights it.
        linear: attention of the blocks whose "layer_types" is not "full_attention".
    """

    attention: Callable[[Config], Attention] = usual
    inner: str = "moe_intermediate_size"
    dense: str = "intermediate_size"
    shared: Callable[[Config], int] = lambda config: 0
    shared_gate: bool = False
    linear: Callable[[Config], Attention] | None = None


def _counted_shared(config: Config) -> int:
    return config.count("n_shared_experts", default=0, least=0) * config.count("moe_intermediate_size")


def _wide_shared(config: Config) -> int:
    return config.count("shared_expert_intermediate_size", "shared_intermediate_size", default=0, least=0)


def _usual_with(biases: bool = False, norms: str = "") -> Callable[[Config], Attention]:
    return lambda config: usual(config, biases, norms)


_INSIDE = "intermediate_size"
FAMILIES: dict[str, Family] = {
    "mixtral": Family(inner=_INSIDE),
    "qwen2_moe": Family(_usual_with(biases=True), shared=_wide_shared, shared_gate=True),
    "qwen3_moe": Family(_usual_with(norms="head")),
    "qwen3_next": Family(gated, shared=_wide_shared, shared_gate=True, linear=delta_net),
    "qwen3_5_moe": Family(gated, shared=_wide_shared, shared_gate=True, linear=delta_net),
    "deepseek_v2": Family(mla, shared=_counted_shared),
    "deepseek_v3": Family(mla, shared=_counted_shared),
    "glm4_moe": Family(
        lambda config: usual(config, False, "head" if config.flag("use_qk_norm", False) else ""), shared=_counted_shared
    ),
    "olmoe": Family(_usual_with(norms="all"), inner=_INSIDE),
    "granitemoe": Family(inner=_INSIDE),
    "granitemoeshared": Family(inner=_INSIDE, shared=_wide_shared),
    "minimax": Family(inner=_INSIDE, linear=lightning),
    "minimax_m2": Family(_usual_with(norms="all"), inner=_INSIDE),
    "longcat_flash": Family(mla, inner="expert_ffn_hidden_size", dense="ffn_hidden_size"),
    "scmoe_gpt": Family(),
}
_LAYERED_ATTENTION = {"qwen3_next": 4, "qwen3_5_moe": 4, "minimax": 2}
"""Where "layer_types" is missing: every so many blocks have full attention."""


def read_hugging_face(path: str | Path, tokens: int | None = None) -> Model:
    """The model that a config.json describes.

    Args:
        path: the file, or its directory.
        tokens: of a sample; None: as many as the model takes, 4096 at most.

    Raises:
        ModelError: an unreadable file, a model without an MoE, or of a type whose sizes are not known here.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return model_of_config(read_object(file, ModelError), str(file), tokens)


def model_of_config(values: Mapping[str, Any], source: str, tokens: int | None = None) -> Model:
    """As `read_hugging_face`, of a config.json that is read already."""
    kind = str(values.get("model_type"))
    if isinstance(values.get("text_config"), Mapping):
        values = {"tie_word_embeddings": values.get("tie_word_embeddings", False), **values["text_config"]}
    kind = kind.removeprefix("scmoe_") if kind != "scmoe_gpt" else kind
    kind = kind.removesuffix("_text")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        what = "is a dense model or one" if "experts" not in " ".join(values) else "is an MoE"
        rule = f"{what} whose sizes are not known here; write them as JSON (docs/plan.md), or take one of {known}"
        raise ModelError(f"{source}: {finding('model_type', kind, rule)}")
    config = Config(values, source)
    longest = config.count("max_position_embeddings", default=_LONGEST)
    if tokens is not None and tokens > longest and kind == "scmoe_gpt":
        raise ModelError(f"--seq-length {tokens}: {source} has {longest} positions; take no more")
    tokens = tokens or min(longest, _LONGEST)
    raw = _own(config, tokens) if kind == "scmoe_gpt" else _stages(kind, config, tokens)
    name = str(values.get("_name_or_path") or Path(source).parent.name or kind)
    return validated(Model, {"name": name, "source": source, **raw}, source, ModelError)


def _stages(kind: str, config: Config, tokens: int) -> dict[str, Any]:
    family, two = FAMILIES[kind], kind == "longcat_flash"
    layers = config.layers * (2 if two else 1)
    moe = set(range(1, layers, 2)) if two else set(_moe_layers(config, layers))
    if not moe:
        raise ModelError(f"{config.source}: has no block with an MoE, and nothing to plan; take a model with experts")
    linear = _linear_layers(kind, config, layers) if family.linear else [False] * layers
    stages, first = [], 0
    for is_linear, run in groupby(linear):
        count = len(list(run))
        attention = (family.linear if is_linear and family.linear else family.attention)(config)
        places = [number - first for number in range(first, first + count) if number in moe]
        stages.append(_stage(family, config, attention, count, places, tokens, two))
        first += count
    return {
        "stages": stages,
        "vocabulary": config.vocabulary,
        "tied": config.flag("tie_word_embeddings", False),
        "autoep": True,
    }


def _stage(
    family: Family, config: Config, attention: Attention, layers: int, places: list[int], tokens: int, two: bool
) -> dict[str, Any]:
    experts = None
    if places:
        chosen = config.count("num_experts_per_tok", "moe_topk")
        routed = config.count("num_experts", "num_local_experts", "n_routed_experts")
        if chosen > routed:
            key = "num_experts_per_tok" if config.values.get("num_experts_per_tok") else "moe_topk"
            raise config.error(key, f"cannot exceed the number of experts ({routed})")
        # Identity experts compute nothing, and their tokens do not travel.
        identity = config.count("zero_expert_num", default=0, least=0)
        experts = {
            "num_experts": routed,
            "hidden": config.count(family.inner),
            "top_k": max(round(chosen * routed / (routed + identity)), 1) if identity else chosen,
            # The second MLP of a LongCat block runs beside the experts, as a shared one does.
            "shared_hidden": config.count(family.dense) if two else family.shared(config),
            "shared_gate": family.shared_gate,
        }
    return {
        "layers": layers,
        "hidden": config.hidden,
        "tokens": tokens,
        "span": min(attention.span or tokens, tokens),
        "causal": not attention.span,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "value_dim": attention.value_dim,
        "attention_parameters": attention.parameters,
        "mlp_hidden": config.count(family.dense, default=0) if len(places) < layers else 0,
        "gated": True,
        "bias": False,
        "norm": "rms",
        "moe_layers": places,
        "experts": experts,
    }


def _moe_layers(config: Config, layers: int) -> list[int]:
    first = config.count("first_k_dense_replace", default=0, least=0)
    every = config.count("decoder_sparse_step", "moe_layer_freq", default=1)
    plain = config.values.get("mlp_only_layers") or []
    by_step = "decoder_sparse_step" in config.values
    chosen = [n for n in range(first, layers) if ((n + 1) % every == 0 if by_step else n % every == 0)]
    return [number for number in chosen if number not in plain]


def _linear_layers(kind: str, config: Config, layers: int) -> list[bool]:
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return [each != "full_attention" for each in kinds]
    every = config.count("full_attention_interval", default=_LAYERED_ATTENTION[kind])
    return [bool((number + 1) % every) for number in range(layers)]


def _own(config: Config, tokens: int) -> dict[str, Any]:
    """A GPT that this package has exported."""
    every, layers, values = config.count("moe_every", default=2), config.layers, config.values
    number = values.get("num_experts")
    experts = round(sum(number) / len(number)) if isinstance(number, list) and number else config.count("num_experts")
    inner, gates = config.count("intermediate_size"), values.get("normalization", "LayerNorm")
    heads = config.count("num_attention_heads")
    shared = values.get("moe_architecture", "scmoe") in ("scmoe", "shared_expert")
    stage = {
        "layers": layers,
        "hidden": config.hidden,
        "tokens": tokens,
        "span": tokens,
        "heads": heads,
        "kv_heads": config.count("num_key_value_heads", default=heads),
        "head_dim": config.hidden // heads,
        "mlp_hidden": inner,
        "gated": config.flag("swiglu", False),
        "bias": config.flag("add_bias_linear", True),
        "norm": "rms" if gates == "RMSNorm" else "layer",
        "moe_layers": list(range(every - 1, layers, every)),
        "experts": {
            "num_experts": experts,
            "hidden": config.count("moe_intermediate_size", default=inner),
            # Of the top-k model with as much computation: a shared expert takes the place of a routed one.
            "top_k": config.count("num_experts_per_tok", default=1) + shared,
        },
    }
    learned = values.get("position_embedding", "learned_absolute") == "learned_absolute"
    return {
        "stages": [stage],
        "vocabulary": config.vocabulary,
        "tied": config.flag("tie_word_embeddings", True),
        "positions": config.count("max_position_embeddings") if learned else 0,
        "dropout": float(values.get("hidden_dropout") or 0.0),
    }
