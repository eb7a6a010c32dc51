"""Models of this package as `scmoe plan` reads them: presets, and the flags of a training. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from scmoe_ds.errors import ModelError
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import MOE_STAGES, STAGES, SWIN_PRESETS, SwinSettings
from scmoe_ds.simulate.json_files import validated
from scmoe_ds.simulate.model import Model, Stage
from scmoe_ds.simulate.model_files import read_model

VOCABULARIES = {name: 32000 if name == "llama2-moe" else 50257 for name in PRESETS}
"""Of the tokenizers that the presets were trained with: GPT-2's and LLaMA-2's."""
_DIVISIBLE = 128
_WITH_SHARED = ("scmoe", "shared_expert", "overlapped_shared_expert")
_TOP_K = 2
"""Of the paper's baselines: a ScMoE has a shared expert and one routed expert less."""
_SWIN_EXPERTS = 8
_SWIN_OWN = {"swin-digits": 4}
_DROPOUT = 0.1
"""Megatron's default."""


def model_of(args: argparse.Namespace, whole: Mapping[str, Any] | None = None) -> Model:
    """The model that a command line names: a preset, a file or name of Hugging Face, or sizes.

    Args:
        args: flags of a training, and --model; what is missing or None is not given.
        whole: a raw DeepSpeed JSON, whose "scmoe" section has numbers of experts. Flags go before it.

    Raises:
        ModelError: none of these or several, or sizes that do not fit.
    """
    section = (whole or {}).get("scmoe")
    sizes = _sizes(args, section if isinstance(section, Mapping) else {})
    preset, named = getattr(args, "preset", None), getattr(args, "model", None)
    given = vars(args)
    if named is not None:
        if preset is not None:
            raise ModelError(f"--model {named}: --preset {preset} is another model; remove one of them")
        return read_model(named, given.get("seq_length"))
    if preset in SWIN_PRESETS:
        return model_of_swin(str(preset), _over(SWIN_PRESETS[str(preset)], given), sizes)
    if preset is not None:
        return model_of_preset(preset, sizes, given)
    if given.get("embed_dim") is not None:
        return model_of_swin("SwinV2-MoE", args, sizes)
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
    if missing := [f"--{name.replace('_', '-')}" for name in needed if given.get(name) is None]:
        raise ModelError(
            f"{missing[0]}: is missing; give --preset, --model or the sizes of a GPT: {', '.join(missing)}"
        )
    return model_of_gpt("GPT", args, sizes)


def _sizes(args: argparse.Namespace, section: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of experts as the "scmoe" section has them, under its names."""
    names = {
        "num_experts": "num_experts",
        "expert_interval": "moe_every",
        "topk": "top_k",
        "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    }
    found = {key: section[key] for key in names.values() if section.get(key) not in (None, "auto")}
    if section.get("architecture", "scmoe") in _WITH_SHARED and "top_k" in found:
        found["top_k"] += 1  # beside its shared expert
    for flag, key in names.items():
        value = getattr(args, flag, None)
        if value is not None:
            found[key] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return found


def _over(below: Mapping[str, Any], given: Mapping[str, Any]) -> argparse.Namespace:
    """Values of a preset, and those of flags that are given."""
    return argparse.Namespace(**{**below, **{key: value for key, value in given.items() if value is not None}})


def model_of_preset(
    name: str, section: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None
) -> Model:
    """One of the paper's models.

    Args:
        name: of `PRESETS` or `SWIN_PRESETS`.
        section: sizes of experts, which go before the preset's.
        given: values of flags, which do, too.

    Raises:
        ModelError: no such preset, or sizes that do not fit.
    """
    section, given = section or {}, given or {}
    if name in SWIN_PRESETS:
        return model_of_swin(name, _over(SWIN_PRESETS[name], given), section)
    if name not in PRESETS:
        raise ModelError(f"--preset {name}: must be one of {', '.join([*PRESETS, *SWIN_PRESETS])}")
    preset = PRESETS[name]
    sizes = {"num_experts": preset.num_experts, "moe_every": preset.moe_every}
    args = _over({**preset.arguments, "vocab_size": VOCABULARIES[name]}, given)
    if given.get("seq_length") is not None and given.get("max_position_embeddings") is None:
        args.max_position_embeddings = args.seq_length
    return model_of_gpt(name, args, {**sizes, **section})


def model_of_gpt(name: str, args: argparse.Namespace, section: Mapping[str, Any]) -> Model:
    """A GPT.

    Args:
        args: values of the flags of scmoe pretrain-gpt; what is missing has the flag's default.
        section: raw, with num_experts, moe_every, and widths of experts.

    Raises:
        ModelError: sizes that do not fit.
    """

    def flag(key: str, default: Any = 0) -> Any:
        value = getattr(args, key, None)
        return default if value is None else value

    D, N, S, L = args.hidden_size, args.num_attention_heads, args.seq_length, args.num_layers
    if D % N:
        raise ModelError(f"--hidden-size {D} must be divisible by --num-attention-heads {N}")
    gated, every = bool(flag("swiglu", False)), int(section.get("moe_every", 2))
    if L % every:
        raise ModelError(f"scmoe.moe_every = {every}: must divide --num-layers {L}")
    narrow = int(4 * D * 2 / 3) // 64 * 64 if gated else 4 * D
    inner = flag("ffn_hidden_size") or max(narrow, 64)
    vocabulary, divisible = flag("vocab_size", 50257), flag("make_vocab_size_divisible_by", _DIVISIBLE)
    rotary = flag("position_embedding_type", "learned_absolute") == "rope"
    stage = _stage(
        layers=L,
        hidden=D,
        tokens=S,
        span=S,
        heads=N,
        kv_heads=flag("num_key_value_heads") or N,
        head_dim=D // N,
        mlp_hidden=inner,
        gated=gated,
        bias=not flag("disable_bias_linear", False),
        norm="rms" if flag("normalization", "LayerNorm") == "RMSNorm" else "layer",
        moe_layers=tuple(range(every - 1, L, every)),
        experts={
            "num_experts": _one_number(section),
            "hidden": section.get("moe_ffn_hidden_size") or inner,
            "top_k": section.get("top_k", _TOP_K),
        },
    )
    return Model(
        name=name,
        stages=(stage,),
        vocabulary=-(-vocabulary // divisible) * divisible,
        tied=not flag("untie_embeddings_and_output_weights", False),
        positions=0 if rotary else (flag("max_position_embeddings") or S),
        dropout=flag("hidden_dropout", _DROPOUT),
        source="the paper's table 8" if name in PRESETS else "flags",
    )


def model_of_swin(name: str, args: argparse.Namespace, section: Mapping[str, Any]) -> Model:
    """A SwinV2-MoE, from the flags of scmoe pretrain-swin; otherwise as `model_of_gpt`."""
    given = {
        "image_size": args.img_size,
        "patch_size": getattr(args, "patch_dim", None) or 4,
        **{key: getattr(args, key) for key in ("window_size", "embed_dim", "depths", "num_heads")},
        **{key: getattr(args, key) for key in ("num_classes", "num_channels") if getattr(args, key, None)},
    }
    try:
        settings = SwinSettings(**given)
    except ValueError as error:
        raise ModelError(str(error)) from None
    every = int(section.get("moe_every", 2))
    places = settings.moe_blocks(every)
    experts = _one_number({"num_experts": _SWIN_OWN.get(name, _SWIN_EXPERTS), **section})
    stages = tuple(_stage_of_swin(settings, number, places, experts) for number in range(STAGES))
    if not stages[MOE_STAGES[0]].moe_layers:
        raise ModelError(f"scmoe.moe_every = {every}: stage 3 has no MoE then; lower it, or raise --depths")
    return Model(
        name=name,
        stages=stages,
        vocabulary=settings.num_classes,
        tied=False,
        images=True,
        patch=settings.num_channels * settings.patch_size**2,
        dropout=getattr(args, "hidden_dropout", None) or 0.0,
        source="the paper's table 9" if name in SWIN_PRESETS else "flags",
    )


def _stage_of_swin(settings: SwinSettings, number: int, places: list[tuple[int, int]], experts: int) -> Stage:
    width, side, heads = settings.width_of(number), settings.side_of(number), settings.num_heads[number]
    inner, moes = int(settings.mlp_ratio * width), tuple(block for stage, block in places if stage == number)
    return _stage(
        layers=settings.depths[number],
        hidden=width,
        tokens=side**2,
        span=min(side, settings.window_size) ** 2,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_hidden=inner,
        causal=False,
        moe_layers=moes,
        experts={"num_experts": experts, "hidden": inner, "top_k": _TOP_K} if moes else None,
    )


def _one_number(section: Mapping[str, Any]) -> int:
    """Experts of every MoE layer; of a pyramid the mean, so that parameters and work add up."""
    number = section.get("num_experts", 8)
    return round(sum(number) / len(number)) if isinstance(number, list) else int(number)


def _stage(**sizes: Any) -> Stage:
    return validated(Stage, sizes, "sizes", ModelError)
