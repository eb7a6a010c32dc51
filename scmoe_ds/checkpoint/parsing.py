"""Turns a description from a file into settings, and checks all of it before anything is built.

`scmoe.json` and `config.json` may come from others. pydantic checks types and ranges. The names in the weights' files
limit the number of layers and experts: a forged number must not build a model of that size.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint.files import DamagedCheckpointError, damaged
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError, first_line
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.models.vision_language_settings import settings_class

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights, by the names that `Parsed.dtype` and flags have for them."""
T = TypeVar("T")
_MOST = 2**31
"""The largest size. Python's integers have no limit, and torch's overflow far beyond this one."""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The checked description of a checkpoint or an export.

    Attributes:
        settings: shape and style.
        config: the "scmoe" section of its training.
        dtype: of the saved or exported weights.
    """

    settings: GPTSettings | SwinSettings
    config: ScMoEConfig
    dtype: str


def parse(description: Mapping[str, Any], path: Path) -> Parsed:
    """The checked settings of a description.

    Args:
        description: an object of JSON.
        path: the directory of its file, for the message.

    Raises:
        DamagedCheckpointError: a key is missing, unknown, of another type or out of range.
    """

    def build() -> Parsed:
        gpt = description.get("gpt")
        kinds = {"gpt": settings_class(gpt) if isinstance(gpt, dict) else GPTSettings, "swin": SwinSettings}
        found = [kind for kind in kinds if kind in description]
        if len(found) != 1:
            raise ValueError('it has neither "gpt" nor "swin", or both')
        settings = _settings(kinds[found[0]], found[0], description[found[0]])
        config = ScMoEConfig.from_deepspeed({"scmoe": description.get("scmoe")})
        return Parsed(settings, config, _dtype(description))

    return _in_one_sentence(build, path)


def check_counts(parsed: Parsed, names: Collection[str], path: Path) -> None:
    """Refuses more blocks or experts than the files have parameters: each has at least one.

    Args:
        names: of the parameters in the files.

    Raises:
        DamagedCheckpointError: there are too many, or the section does not fit the number of layers.
    """

    def check() -> None:
        settings, config = parsed.settings, parsed.config
        if isinstance(settings, GPTSettings):
            blocks = settings.num_layers
            layers = config.moe_layers(blocks)
        else:
            blocks = sum(settings.depths)
            layers = blocks // config.moe_every
        counts = config.num_experts
        experts = sum(counts) if isinstance(counts, list) else counts * layers
        if not 0 < blocks <= len(names) or experts > len(names):
            raise ValueError(f"it has {blocks} blocks and {experts} experts, the files only {len(names)} parameters")
        if isinstance(settings, GPTSettings):
            config.check_model(blocks)

    _in_one_sentence(check, path)


def without_memory(build: Callable[[], T], path: Path) -> T:
    """Builds a model on the meta device. Raises a DamagedCheckpointError if no tensor can have such sizes."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as error:
        what = f"its description is of no model that can be built ({first_line(error)})"
        raise damaged(path, what, "reading") from None


def _settings(kind: Callable[..., T], name: str, found: Any) -> T:
    """A dataclass from a JSON object, whose types pydantic checks strictly."""
    types = typing.get_type_hints(kind)
    declared: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # T has no bound that means a dataclass
        if field.init:
            default = ... if field.default is dataclasses.MISSING else field.default
            limits = Field(default, ge=0, le=_MOST) if types[field.name] is int else default
            declared[field.name] = (list[int] if types[field.name] == tuple[int, ...] else types[field.name], limits)
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    model: type[BaseModel] = create_model(name, __config__=config, **declared)
    try:
        checked = model.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"{place} = {str(first['input'])[:60]}: {first['msg']}") from None
    return kind(**checked)


def _dtype(description: Mapping[str, Any]) -> str:
    layout = description.get("layout")
    if layout is None:  # an export
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        found, names_of = description.get("torch_dtype", "float32"), "torch_dtype"
    else:
        names = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
        found, names_of = _layout(layout)[fields.PRECISION], f"layout.{fields.PRECISION}"
    if not isinstance(found, str) or found not in names:
        raise ValueError(f"{names_of} = {str(found)[:60]}: must be one of {', '.join(names)}")
    return names[found]


def _layout(layout: Any) -> Mapping[str, Any]:
    if not isinstance(layout, dict):
        raise ValueError("layout: must be an object")
    sizes = (fields.PROCESSES, fields.EXPERT_PARALLEL, fields.TENSOR_PARALLEL)
    flags = dict.fromkeys((fields.EXPERT_TENSOR_PARALLEL, fields.ROUND_ROBIN), bool)
    kinds: dict[str, type] = {**flags, fields.ZERO_STAGE: int, fields.PRECISION: str}
    for key in sizes:
        if type(layout.get(key)) is not int or layout[key] < 1:
            raise ValueError(f"layout.{key} = {str(layout.get(key))[:60]}: must be a number of ranks")
    if fields.OFFLOADED in layout:
        kinds[fields.OFFLOADED] = bool
    for key, kind in kinds.items():
        if type(layout.get(key)) is not kind:
            raise ValueError(f"layout.{key} = {str(layout.get(key))[:60]}: must be of type {kind.__name__}")
    # A newer version may distribute its tensors in a way that this version does not know.
    if unknown := layout.keys() - {*sizes, *kinds}:
        raise ValueError(f"layout.{min(unknown)[:60]}: this version knows no such field")
    return layout


def _in_one_sentence(step: Callable[[], T], path: Path) -> T:
    try:
        return step()
    except DamagedCheckpointError:
        raise
    except (ScMoEConfigError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        lines = "; ".join(str(error).splitlines()) or type(error).__name__
        raise damaged(path, f"its description is damaged or of another version: {lines[:400]}", "reading") from None
