"""Describes what a checkpoint's tensors belong to: the model, which must not change, and the layout, which may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.models.vision_language_settings import settings_class
from scmoe_ds.parallel.tensor import tensor_parallel_size

FREE_MODEL_FIELDS = {"hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_method_std", "drop_path_rate"}
"""Neither the weights nor the optimizer state depend on these fields; `comparison` says what a resume does."""
BINDING_SECTION_FIELDS = (
    "architecture",
    "position",
    "first_layer_position",
    "shortcut_distance",
    "moe_every",
    "num_experts",
    "top_k",
    "moe_ffn_hidden_size",
    "expert_partition",
    "moe_shared_expert_intermediate_size",
    "merge",
    "shortcut_norm",
    "post_norm",
    "pairs_per_moe",
    "join",
)
CORRECTED = "a correction bias (scmoe.router.load_balance_coeff)"
ADAPTED = "scmoe.adapt"
_BEFORE = {
    "norm_placement": "pre",
    "residual_scale": 1.0,
    "scmoe.pairs_per_moe": 1,
    "scmoe.join": "end",
    "scmoe.moe_ffn_hidden_size": None,
    "scmoe.expert_partition": 1,
    "scmoe.moe_shared_expert_intermediate_size": None,
    CORRECTED: False,
    ADAPTED: None,
}
"""Values of fields that the descriptions of older checkpoints lack."""

PROCESSES = "number of processes"
EXPERT_PARALLEL = "scmoe.expert_parallel_size"
TENSOR_PARALLEL = "--tensor-model-parallel-size"
EXPERT_TENSOR_PARALLEL = "scmoe.expert_tensor_parallelism"
ZERO_STAGE = "zero_optimization.stage"
ROUND_ROBIN = "zero_optimization.round_robin_gradients"
OFFLOADED = "scmoe.offload_experts"
PRECISION = "precision"
BATCH = "sequences per step"
ITERATION = "iteration"
CONSUMED = "consumed samples"


def describe(
    settings: GPTSettings | SwinSettings,
    config: ScMoEConfig,
    world_size: int,
    deepspeed_json: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A JSON object with "model" (what the tensors depend on), "layout" (how ranks and files share them), all fields of
    "gpt" (or "swin") and "scmoe", from which the model can be built again, and "run" (`comparison.run_settings`)."""
    precisions = [name for name in ("bf16", "fp16") if deepspeed_json.get(name, {}).get("enabled")]
    zero = deepspeed_json.get("zero_optimization", {})
    layout = {
        PROCESSES: world_size,
        EXPERT_PARALLEL: config.expert_parallel_size,
        TENSOR_PARALLEL: tensor_parallel_size(),
        EXPERT_TENSOR_PARALLEL: config.expert_tensor_parallelism,
        ZERO_STAGE: zero.get("stage", 0),
        ROUND_ROBIN: bool(zero.get("round_robin_gradients", False)),
        PRECISION: precisions[0] if precisions else "fp32",
    }
    if config.offload_experts is not None:
        layout[OFFLOADED] = True
    shape = {key: value for key, value in asdict(settings).items() if key != "head_size"}
    kind = "gpt" if isinstance(settings, GPTSettings) else "swin"
    section = config.model_dump(mode="json")
    found = {"model": _model(shape, config), "layout": layout, kind: shape, "scmoe": section}
    return found if run is None else {**found, "run": dict(run)}


def describe_model(settings: GPTSettings, config: ScMoEConfig) -> dict[str, Any]:
    """The part of `describe` that needs no process group: "model", "gpt" and "scmoe"."""
    whole = describe(settings, config, 1, {})
    return {key: whole[key] for key in ("model", "gpt", "scmoe")}


def rebuild(description: Mapping[str, Any]) -> tuple[GPTSettings, ScMoEConfig]:
    """Settings of the model in a checkpoint or an export, for one process: `gpt_of(*rebuild(description))`."""
    whole_on_each_rank = {
        "expert_parallel_size": 1,
        "expert_tensor_parallelism": False,
        "overlap": {},
        "offload_experts": None,
    }
    section = {**description["scmoe"], **whole_on_each_rank}
    gpt = description["gpt"]
    return settings_class(gpt)(**gpt), ScMoEConfig.from_deepspeed({"scmoe": section})


def _model(gpt: Mapping[str, Any], config: ScMoEConfig) -> dict[str, Any]:
    shape = {key: value for key, value in gpt.items() if key not in FREE_MODEL_FIELDS}
    section = {f"scmoe.{key}": getattr(config, key) for key in BINDING_SECTION_FIELDS}
    return {**shape, **section, CORRECTED: config.router.has_bias, ADAPTED: _adapted(config)}


def _adapted(config: ScMoEConfig) -> dict[str, Any] | None:
    """What tensors and function of a model depend on because it was adapted. A model of which all layers are converted
    is a plain ScMoE, unless it keeps its base's coefficient network."""
    adapt = config.adapt
    if adapt is None or adapt.base is None:
        return None
    if adapt.layers is None and not adapt.base.keeps_coefficient(config.merge):
        return None
    layers = None if adapt.layers is None else sorted(adapt.layers)
    return {"base": adapt.base.model_dump(), "layers": layers}


def check_model(saved: Mapping[str, Any], current: Mapping[str, Any], name: str) -> None:
    """
    Args:
        saved, current: results of `describe`, then and now.
        name: of the checkpoint, with its flag.

    Raises:
        CheckpointError: the models differ; lists the differences.
    """
    if not isinstance(saved.get("model"), dict):
        raise CheckpointError(
            f"{name} was written by an earlier version of scmoe_ds, whose description does not say "
            "how its tensors are laid out; resume it with that version"
        )
    known = {key: value for key, value in _BEFORE.items() if key in current["model"]}
    if changed := _changed({**known, **saved["model"]}, current["model"]):
        listed = (f"{key}: {then!r} in the checkpoint, {now!r} in this run" for key, (then, now) in changed.items())
        raise CheckpointError(
            f"{name} is a checkpoint of another model: {'; '.join(sorted(listed))}; set that back, or choose another "
            "directory"
        )


def changed_layout(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field to (then, now) for each field of the layout that differs."""
    return _changed(saved.get("layout", {}), current["layout"])


def _changed(then: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    now = json.loads(json.dumps(current))  # tuples become lists, as in the file
    return {key: (then.get(key), now.get(key)) for key in {**now, **then} if now.get(key) != then.get(key)}


def check_layout_is_free(layout: Mapping[str, Any], whose: str) -> None:
    """Raises a CheckpointError if the layout has a setting under which DeepSpeed does not record where the parameters
    lie."""
    tied = {ZERO_STAGE: layout[ZERO_STAGE] not in (1, 2), ROUND_ROBIN: bool(layout[ROUND_ROBIN])}
    for key, is_tied in tied.items():
        if is_tied:
            raise CheckpointError(
                f"{whose}: {key} = {layout[key]} binds a checkpoint to its layout; resume with the very layout that "
                "saved it, or save and resume with ZeRO stage 1 or 2 and without round_robin_gradients"
            )


def layout_text(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """ "number of processes 2 … to number of processes 4 …" """
    then, now = (", ".join(f"{key} {pair[place]}" for key, pair in changed.items()) for place in (0, 1))
    return f"from {then} to {now}"
