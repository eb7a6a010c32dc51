"""What a resume does when a setting differs from the checkpoint's: one table.

`description` compares model and layout. Everything else that decides the numbers of a run is recorded with a checkpoint
(`run_settings`) and compared here, whichever way the checkpoint is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from scmoe_ds.checkpoint.description import BATCH, BINDING_SECTION_FIELDS, FREE_MODEL_FIELDS
from scmoe_ds.config.names import in_present_words
from scmoe_ds.errors import CheckpointError

MICRO_BATCH = "train_micro_batch_size_per_gpu"
DATA = "data"
JSON_KEYS = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "fp16",
    "bf16",
    "torch_autocast",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
)
"""DeepSpeed's keys, beside the batch sizes, that decide the numbers of a step."""


class Outcome(Enum):
    """What happens to a setting that differs. In each case but `REFUSED` this run's value holds from here on."""

    REFUSED = "cannot be taken over"
    TAKEN_OVER = "a line says so"
    CHANGES_THE_RUN = "a warning says that the run is no longer the one that was saved"
    FREE = "has no effect on the numbers, or another line names it (the layout)"


TABLE: dict[str, Outcome] = {
    "optimizer.type": Outcome.REFUSED,
    # "auto" follows --train-iters: the rest of the curve may bend although nobody has changed the JSON.
    "scheduler.params.total_num_steps": Outcome.CHANGES_THE_RUN,
    "*16.enabled": Outcome.FREE,
    **{f"{key}*": Outcome.TAKEN_OVER for key in JSON_KEYS},
    BATCH: Outcome.CHANGES_THE_RUN,
    MICRO_BATCH: Outcome.CHANGES_THE_RUN,
    DATA: Outcome.CHANGES_THE_RUN,
    "--seed": Outcome.CHANGES_THE_RUN,
    "--split": Outcome.CHANGES_THE_RUN,
    "--seq-length": Outcome.CHANGES_THE_RUN,
    "--train-iters": Outcome.CHANGES_THE_RUN,
    "--valid-data-path": Outcome.CHANGES_THE_RUN,
    "--*-dropout": Outcome.TAKEN_OVER,
    "--drop-path-rate": Outcome.TAKEN_OVER,
    "--layernorm-epsilon": Outcome.CHANGES_THE_RUN,
    "--init-method-std": Outcome.FREE,
    "scmoe.gate_softmax": Outcome.CHANGES_THE_RUN,
    "scmoe.*capacity*": Outcome.TAKEN_OVER,
    "scmoe.drop_tokens": Outcome.TAKEN_OVER,
    "scmoe.use_rts": Outcome.TAKEN_OVER,
    "scmoe.top2_2nd_expert_sampling": Outcome.TAKEN_OVER,
    "scmoe.noisy_gate_policy": Outcome.TAKEN_OVER,
    "scmoe.aux_loss_coefficient": Outcome.TAKEN_OVER,
    "scmoe.router.load_balance_*": Outcome.TAKEN_OVER,
    "scmoe.router.z_loss_coefficient": Outcome.TAKEN_OVER,
    "scmoe.router*": Outcome.CHANGES_THE_RUN,
    "scmoe.adapt.base*": Outcome.FREE,  # `description.check_model` compares it, and the layers
    "scmoe.adapt.layers": Outcome.FREE,
    "scmoe.adapt.shared_expert": Outcome.FREE,  # it is one by now
    "scmoe.adapt.source": Outcome.FREE,  # wherever it lies; "the teacher" is a fingerprint of its files
    "the teacher": Outcome.CHANGES_THE_RUN,
    "scmoe.adapt*": Outcome.CHANGES_THE_RUN,
    "scmoe.wire_dtype": Outcome.TAKEN_OVER,
    "scmoe.expert_*": Outcome.FREE,
    "scmoe.dispatch": Outcome.FREE,
    "scmoe.all_to_all": Outcome.FREE,
    "scmoe.offload_experts*": Outcome.FREE,
    "scmoe.overlap*": Outcome.FREE,
    "scmoe.replace": Outcome.FREE,
    "scmoe.tap": Outcome.FREE,
    "scmoe.shared_from": Outcome.FREE,
}
"""Pattern of a setting's name to what a resume does. The first pattern that matches decides."""

_SAME_STATE = {"adamw": "adam"}
"""Optimizers that keep the same state under the same names."""


@dataclass(frozen=True)
class Difference:
    """A setting of this run that is not the checkpoint's."""

    name: str
    then: Any
    now: Any
    outcome: Outcome

    def __str__(self) -> str:
        return f"{self.name} = {_shown(self.now)} (was {_shown(self.then)})"


def run_settings(
    whole: Mapping[str, Any],
    micro_batch_size: int,
    accumulation_steps: int,
    replicas: int,
    data: Mapping[str, Any],
    **flags: Any,
) -> dict[str, Any]:
    """A JSON object for `describe`: the settings beside model and layout that decide a run.

    Args:
        whole: the DeepSpeed JSON.
        replicas: data-parallel ranks.
        data: {"content": identifies the training data wherever it lies, "shown": its name for messages}.
        flags: by their names, with underscores.
    """
    record = {key: whole.get(key) for key in JSON_KEYS}
    record |= {MICRO_BATCH: micro_batch_size, BATCH: micro_batch_size * accumulation_steps * replicas, DATA: data}
    return record | {_flag(name): value for name, value in flags.items()}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ and are not free, in the order of this run's record.

    Args:
        saved, current: results of `describe`, then and now. A setting that one of them lacks is not compared.
    """
    then, now = _decisive(saved), _decisive(json.loads(json.dumps(current)))
    found = []
    for name in [name for name in now if name in then]:
        old, new = _flatten(name, then[name]), _flatten(name, now[name])
        for key in new | old:
            if _identity(key, old.get(key)) != _identity(key, new.get(key)):
                found.append(Difference(key, old.get(key), new.get(key), outcome_of(key)))
    return [each for each in found if each.outcome is not Outcome.FREE]


def outcome_of(name: str) -> Outcome:
    """What the table says. A setting that is not in it changes the run."""
    return next((found for pattern, found in TABLE.items() if fnmatchcase(name, pattern)), Outcome.CHANGES_THE_RUN)


def check_refused(found: Sequence[Difference], flag: str, path: object) -> None:
    """Raises a CheckpointError if a setting cannot be taken over."""
    for each in found:
        if each.outcome is Outcome.REFUSED:
            raise CheckpointError(
                f"{each.name} = {_shown(each.now)}: the optimizer state in {flag} {path} is of {_shown(each.then)}; "
                "set it back, or start a new run with the weights alone: "
                f"scmoe convert export {path} OUT, then --load OUT and another --save"
            )


def select(found: Sequence[Difference], outcome: Outcome) -> str:
    """The differences of one outcome as text; empty if there is none."""
    return "; ".join(str(each) for each in found if each.outcome is outcome)


def _decisive(description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that belong neither to the model nor to the layout: name in messages to value."""
    named = dict(description.get("run") or {})
    if BATCH in description:  # of a checkpoint that an earlier version wrote
        named.setdefault(BATCH, description[BATCH])
    for kind in ("gpt", "swin"):
        shape = description.get(kind, {})
        named |= {_flag(key): value for key, value in shape.items() if key in FREE_MODEL_FIELDS}
    section = in_present_words(description.get("scmoe", {}))
    named |= {f"scmoe.{key}": value for key, value in section.items() if key not in BINDING_SECTION_FIELDS}
    return named


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flatten(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or "content" in value:
        return {name: value}
    return {path: leaf for key, each in value.items() for path, leaf in _flatten(f"{name}.{key}", each).items()}


def _identity(name: str, value: Any) -> Any:
    """What is compared: the content of data, the kind of state of an optimizer, else the value."""
    if isinstance(value, dict):
        return value["content"]
    if name == "optimizer.type" and isinstance(value, str):
        return _SAME_STATE.get(value.lower(), value.lower())
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['shown']} [{', '.join(map(str, value['content']))}]"
    return "not set" if value is None else json.dumps(value)
