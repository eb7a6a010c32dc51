"""DeepSpeed's keys of the JSON: which there are and what each may hold, read off the installed DeepSpeed.

Its newer sections are pydantic models. For the older ones and the top level a dict records which keys DeepSpeed asks
for, and with which default.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt

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
    "expert_parallel": {"enabled": False},
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
    "expert_parallel": {"autoep_size": PositiveInt, "top_k": PositiveInt | str, "routed_scaling_factor": float | str},
}


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
        if not isinstance(keys.get(section), dict):  # a DeepSpeed before AutoEP does not ask for its section
            continue
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
