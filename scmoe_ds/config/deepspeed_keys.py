"""DeepSpeed's keys of the JSON: which there are and what each may hold, read off the installed DeepSpeed.

Its newer sections are pydantic models. For the older ones and the top level a dict records which keys DeepSpeed asks
for, and with which default. DeepSpeed itself ignores keys that it does not know, reads "4" as 4, and leaves out "auto".
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, get_args

import deepspeed.runtime.config as deepspeed_config
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from scmoe_ds.config.messages import fail, unknown_key

Keys = dict[str, Any]
"""Key to what it may hold: a type, or the keys of an object."""

_Dtype = Literal["fp32", "fp16", "bf16", "float32", "float16", "bfloat16"] | None

_NO_MODEL: dict[str, Any] = {
    "optimizer": {"type": "Adam"},
    "scheduler": {"type": "WarmupLR"},
    "torch_autocast": {},
    "flops_profiler": {},
    "activation_checkpointing": {},
    "aio": {},
    "autotuning": {},
    "data_types": {},
    "timers": {},
    "checkpoint": {"writer": {}, "parallel_write": {}},
    "data_efficiency": {"data_sampling": {}, "data_routing": {}},
}
"""Sections without a pydantic model, each with the least content that makes DeepSpeed read it."""

_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": deepspeed_config.HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "weight_quantization": WeightQuantConfig,
}

_RULES: Keys = {
    "train_batch_size": PositiveInt | None,
    "train_micro_batch_size_per_gpu": PositiveInt | None,
    "gradient_accumulation_steps": PositiveInt | None,
    "steps_per_print": PositiveInt | None,
    "gradient_clipping": NonNegativeFloat,
    "gradient_predivide_factor": PositiveFloat,
    "vocabulary_size": PositiveInt | None,
    "communication_data_type": str | None,
    "seq_parallel_communication_data_type": str | None,
    "log_level": Literal[(*log_levels, *map(str.upper, log_levels))] | None,
    "sequence_parallel_size": PositiveInt,
}
"""For keys whose default does not show what they may hold."""

_SECTION_RULES: dict[str, Keys] = {
    "data_types": {
        "grad_accum_dtype": _Dtype,
        "param_dtype": _Dtype,
        "buffer_dtype": _Dtype,
        "keep_in_fp32_modules": Any,
    },
    "flops_profiler": {
        "profile_step": PositiveInt,
        "top_modules": PositiveInt,
        "recompute_fwd_factor": NonNegativeFloat,
        "output_file": str | None,
    },
    "aio": {"block_size": PositiveInt, "queue_depth": PositiveInt, "intra_op_parallelism": PositiveInt},
    "optimizer": {"type": str, "params": dict},
    "scheduler": {"type": str, "params": dict},
}

_KEEPS_AUTO = ("data_types.keep_in_fp32_modules", "pipeline")


class _Recorder(dict[str, Any]):
    """An object of the JSON that remembers which keys it was asked for, and with which defaults."""

    def __init__(self, *content: Any) -> None:
        super().__init__(*content)
        self.asked: Keys = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed asks "key in section.keys()"
        return self


@contextmanager
def quiet() -> Iterator[None]:
    """Silences DeepSpeed's log, which says the same again when it starts."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@cache
def known_keys() -> Keys:
    """All keys of the installed DeepSpeed's JSON."""

    def recorder(content: Any) -> Any:
        return (
            _Recorder({key: recorder(value) for key, value in content.items()})
            if isinstance(content, dict)
            else content
        )

    whole = recorder({**_NO_MODEL, "train_micro_batch_size_per_gpu": 1})
    with quiet():
        deepspeed_config.DeepSpeedConfig(whole)
    keys = _of_recorder(whole) | _RULES
    for section, rules in _SECTION_RULES.items():
        keys[section] |= {key: rule for key, rule in rules.items() if key in keys[section]}
    keys |= {name: _of_model(model) for name, model in _MODELS.items()}
    monitors = DeepSpeedMonitorConfig.model_fields.items()
    keys |= {name: _of_model(model) for name, field in monitors if (model := _model_in(field.annotation))}
    keys["timers"]["throughput"] = _of_model(DeepSpeedThroughputTimerConfig)
    return keys


def _of_recorder(section: _Recorder) -> Keys:
    keys: Keys = {}
    for key, default in section.asked.items():
        content = section[key] if dict.__contains__(section, key) else None
        if isinstance(content, _Recorder) and content.asked:
            keys[key] = _of_recorder(content)
        else:
            keys[key] = Any if default is None or isinstance(default, dict) else type(default)
    return keys


def _of_model(model: type[BaseModel]) -> Keys:
    keys: Keys = {}
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        for each in {name, field.alias or name}:
            keys[each] = _of_model(inner) if inner else annotation
    return keys


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def check_keys(whole: Mapping[str, Any]) -> list[str]:
    """What is wrong with DeepSpeed's part of the JSON, a line each.

    Top-level keys that begin with "_" are the user's own; DeepSpeed does not look at them either.
    """
    theirs = {key: value for key, value in whole.items() if key != "scmoe" and not str(key).startswith("_")}
    removed = {**_removed("_REMOVED_TOP_LEVEL_CONFIG_KEYS", theirs, "")}
    zero = theirs.get("zero_optimization")
    if isinstance(zero, Mapping):
        removed |= _removed("_REMOVED_ZERO_CONFIG_KEYS", zero, "zero_optimization.")
    lines = [f"{path}: {message}" for path, message in removed.items()]
    rest = {key: value for key, value in theirs.items() if key not in removed}
    lines += _check(rest, known_keys(), "", removed)
    return lines or _read_by_deepspeed(rest)


def _removed(name: str, section: Mapping[str, Any], prefix: str) -> dict[str, str]:
    messages: dict[str, str] = getattr(deepspeed_config, name, {})
    return {prefix + key: f"{messages[key].split('. ')[0]}; remove the key" for key in section if key in messages}


def _check(section: Mapping[str, Any], keys: Keys, prefix: str, known_wrong: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        if path in known_wrong or (path == "steps_per_print" and value == math.inf):
            continue  # Accelerate writes infinity, for never
        if key not in keys:
            # At the top level all keys would be too many to name.
            unknown = unknown_key(path, key, keys if prefix else [*keys, "scmoe"])
            far = not prefix and "valid keys" in unknown
            lines.append(f'{path}: unknown key; remove it, or let a key of your own begin with "_"' if far else unknown)
        elif path not in _KEEPS_AUTO and not (value == "auto" and key.startswith("stage3_")):
            holds = keys[key]
            if not isinstance(holds, dict):
                rule = broken_rule(value, holds)
                lines += [str(fail(path, value, rule))] if rule else _not_finite(value, path)
            elif isinstance(value, Mapping):
                lines += _check(value, holds, path + ".", known_wrong)
            elif value is not None or not prefix:
                lines.append(str(fail(path, value, f'must be an object, such as {{"{next(iter(holds))}": …}}')))
    return lines


def section(whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of the JSON; empty where there is none, or something else in its place."""
    value = whole.get(key)
    return value if isinstance(value, Mapping) else {}


def broken_rule(value: Any, holds: Any) -> str | None:
    """Which rule a value breaks, if any: what pydantic says in strict mode, but 5e8 is an integer."""
    if value == "auto":
        return "is filled in by Hugging Face's Trainer alone; write the value, or remove the key"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, float) and value.is_integer() and holds is not float:
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large"
    if isinstance(value, bool) and isinstance(holds, type) and issubclass(holds, Enum):
        return "must be a number"
    wants_text = holds is Any or holds is str or str in get_args(holds)
    if isinstance(value, str) and not wants_text and (literal := unquoted(value)) is not None:
        return f"is a string; write {literal} without quotes"
    try:
        _adapter(holds).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        messages = dict.fromkeys(_TYPE_RULES.get(found["type"], found["msg"]) for found in error.errors())
        text = " or ".join(messages).replace("Input should be", "must be")
        return re.sub(r", (\S+) or \1$", r" or \1", text)  # an enumeration with two names for a number
    return None


_TYPE_RULES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "int_from_float": "must be an integer",
}


@cache
def _adapter(holds: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(holds, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:
        return TypeAdapter(Any)


def unquoted(text: str) -> str | None:
    """The number, true or false that a string spells."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _not_finite(value: Any, path: str) -> list[str]:
    """NaN and Infinity, which are not JSON but which Python reads, somewhere in a value."""
    if isinstance(value, float) and not math.isfinite(value):
        return [str(fail(path, value, "must be a finite number"))]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [line for key, each in items for line in _not_finite(each, f"{path}.{key}")]


# Checked by DeepSpeed at its start: they depend on the number of ranks.
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _read_by_deepspeed(whole: Mapping[str, Any]) -> list[str]:
    """DeepSpeed's own errors when it reads all keys, each under the key that causes it alone."""
    lines: list[str] = []
    rest = {key: value for key, value in whole.items() if key not in _BATCH}
    while message := _refusal(rest):
        culprit = next((key for key, value in rest.items() if _refusal({key: value}) == message), None)
        if culprit is None:
            return [*lines, f"the DeepSpeed JSON: {message}"]
        lines.append(str(fail(culprit, rest.pop(culprit), message)))
    return lines


def _refusal(whole: Mapping[str, Any]) -> str | None:
    try:
        with quiet():
            deepspeed_config.DeepSpeedConfig(copy.deepcopy({**whole, _BATCH[1]: 1}))
    except ValidationError as error:
        return "; ".join(found["msg"].partition(", ")[2] or found["msg"] for found in error.errors())
    except Exception as error:  # assertions, KeyError, AttributeError …: whatever it trips over
        return f"DeepSpeed refuses it ({type(error).__name__}: {error})"
    return None
