"""DeepSpeed's "expert_parallel" section (AutoEP) beside the "scmoe" section: which fields mean something then.

AutoEP replaces the MoE blocks of a Hugging Face model. Sizes, routing and losses are the model's; how many ranks share
the experts, AutoEP's own section says. The "scmoe" section adds the schedule.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from scmoe_ds.config.deepspeed_json import at, is_on, section
from scmoe_ds.config.messages import fail
from scmoe_ds.config.router_section import OF_SCORES

PATH = "expert_parallel"
_MODEL = "the Hugging Face model decides it"
_NO_CAPACITY = "no token is dropped"
_DECIDED = {
    "num_experts": _MODEL,
    "moe_ffn_hidden_size": _MODEL,
    "moe_shared_expert_intermediate_size": _MODEL,
    "moe_every": _MODEL,
    "pairs_per_moe": _MODEL,
    "gate_softmax": _MODEL,
    "noisy_gate_policy": _MODEL,
    "aux_loss_coefficient": "the model adds its own balancing loss (output_router_logits and router_aux_loss_coef of "
    "its config)",
    "use_rts": _NO_CAPACITY,
    "top2_2nd_expert_sampling": _MODEL,
    "capacity_factor": _NO_CAPACITY,
    "eval_capacity_factor": _NO_CAPACITY,
    "min_capacity": _NO_CAPACITY,
    "drop_tokens": _NO_CAPACITY,
    "expert_parallel_size": f"{PATH}.autoep_size says it",
    "expert_tensor_parallelism": f"{PATH}.expert_tensor_parallel_size says it",
    "replace": "AutoEP replaces the layers of this model",
    "shared_from": "the model's own shared experts stay",
    "post_norm": "it would add parameters to the model",
}
"""Field to why it may not be written."""
_ARCHITECTURES = ("as_is", "scmoe")
MODELS_OWN = "model"
"""The score function of a router that is the model's."""
_OF_SCMOE = {"position": "pos1", "first_layer_position": None, "merge": "add", "shortcut_norm": "shared", "join": "end"}
"""Fields that change the model's mathematics, and their defaults: those that add no parameter, for an MoE per block."""
_OF_SURGERY = {**_OF_SCMOE, "shortcut_norm": "own"}
"""The same for a section with "adapt", which asks for a surgery as that of `scmoe adapt`. A tap has no norm to copy."""
_CHANGES = 'changes the model\'s mathematics, which "as_is" keeps; set "architecture": "scmoe", or remove it'


def uses_autoep(whole: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed makes AutoEP layers of the model's MoE blocks."""
    return is_on(whole, f"{PATH}.enabled")


def with_autoep(whole: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The "scmoe" section as it is meant beside AutoEP; without AutoEP, as it is.

    Raises:
        ScMoEConfigError: a field that is decided elsewhere, or an architecture for the one case in the other.
    """
    architecture = given.get("architecture") or ("scmoe" if given.get("adapt") is not None else None)
    if not uses_autoep(whole):
        if architecture == "as_is":
            rule = f'is for Hugging Face models that DeepSpeed\'s AutoEP distributes; add "{PATH}": {{"enabled": true}}'
            raise fail("scmoe.architecture", architecture, rule)
        if at(given, "router.score_func") == MODELS_OWN:
            rule = f'is for models that AutoEP distributes; write "softmax" or "sigmoid", or add "{PATH}"'
            raise fail("scmoe.router.score_func", MODELS_OWN, rule)
        return dict(given)
    if architecture is not None and architecture not in _ARCHITECTURES:
        rule = f'with {PATH}, use "as_is" (the model\'s mathematics) or "scmoe"; or remove the {PATH} section'
        raise fail("scmoe.architecture", architecture, rule)
    for field in ("join", "first_layer_position", "top_k", "adapt") if architecture != "scmoe" else ():
        if given.get(field) not in (None, "end", "auto"):
            raise fail(f"scmoe.{field}", given[field], _CHANGES)
    for field in ("source", "base"):
        if at(given, f"adapt.{field}") is not None:
            rule = f"is for scmoe pretrain's GPT; with {PATH}, the model that you hand over is the source; remove it"
            raise fail(f"scmoe.adapt.{field}", at(given, f"adapt.{field}"), rule)
    for field, rule in _DECIDED.items():
        if field in given and given[field] not in ("auto", None):
            raise fail(f"scmoe.{field}", given[field], f"with {PATH} (AutoEP), {rule}; remove one of them")
    if given.get("dispatch") == "padded":
        raise fail("scmoe.dispatch", "padded", 'AutoEP layers have no capacity to pad to; use "exact", or remove it')
    router = _router(given.get("router", {}))
    if architecture != "scmoe":
        return {"architecture": "as_is", **given, "router": router}
    # Hooks drive the layers, as those of "replace".
    hooked = {"architecture": "scmoe", "replace": True, "router": router}
    defaults = _OF_SCMOE if given.get("adapt") is None or given.get("tap") is not None else _OF_SURGERY
    return {**defaults, **{name: value for name, value in given.items() if value != "auto"}, **hooked}


def _router(given: Any) -> Any:
    """`scmoe.router` beside AutoEP: the model routes, and the section may balance loads and add a z-loss."""
    if not isinstance(given, Mapping):
        return given
    for field in ("score_func", *OF_SCORES):
        if field in given and given[field] not in (MODELS_OWN, None):
            raise fail(f"scmoe.router.{field}", given[field], f"with {PATH} (AutoEP), {_MODEL}; remove one of them")
    return {**given, "score_func": MODELS_OWN}


def refusals_of_autoep(whole: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Settings of AutoEP with which its layers cannot run under a schedule: path, whether it is so, and the rule."""
    if not uses_autoep(whole):
        yield PATH, bool(section(whole, PATH)), 'is not enabled; set "enabled": true, or remove it'
        return
    found = importlib.util.find_spec("deepspeed.module_inject.auto_ep_presets") is not None
    rule = (
        f"DeepSpeed {version('deepspeed')} has no AutoEP with presets; install deepspeed>=0.19.8, or remove the section"
    )
    yield PATH, not found, rule
    backend = at(whole, f"{PATH}.comm_backend")
    yield f"{PATH}.comm_backend", backend == "deepep", 'the "scmoe" section moves the rows; use "comm", or remove one'
    for path in ("tensor_parallel.autotp_size", "sequence_parallel_size"):
        ranks = at(whole, path)
        rule = f'divides what the "scmoe" section schedules; with {PATH}, remove it, or the "scmoe" section'
        yield path, isinstance(ranks, int) and ranks > 1, rule
    folded = at(whole, f"{PATH}.expert_tensor_parallel_size") not in (None, 1)
    yield f"{PATH}.expert_tensor_parallel_size", folded, 'splits what the "scmoe" section schedules; use 1'


def idle_settings(whole: Mapping[str, Any]) -> list[str]:
    """Settings of AutoEP's own exchange, which the "scmoe" section's takes the place of."""
    names = ("async_split_plan", "combine_impl", "row_weighting_impl", "validate_folding_routing")
    off = (None, False, "auto")
    return [f"{PATH}.{name}" for name in names if at(whole, f"{PATH}.{name}") not in off]


def autoep_size(whole: Mapping[str, Any]) -> int:
    """Ranks that share one set of experts."""
    return int(at(whole, f"{PATH}.autoep_size") or 1)
