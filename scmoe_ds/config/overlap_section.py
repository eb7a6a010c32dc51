"""`scmoe.overlap`: when the routed experts are computed; and what all of our sections of the JSON have in common."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Union, get_args

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, StrictBool, ValidationInfo, field_validator

from scmoe_ds.config.deepspeed_values import unquoted
from scmoe_ds.config.limits import MOST_CHUNKS

Auto = Literal["auto"]


class Section(DeepSpeedConfigModel):
    """DeepSpeed's config model without its "auto" filter: here "auto" is a value, valid only where declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Adds the fields to the docstring, so that help() and editors show them."""
        lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Args:"]
        for name, field in cls.model_fields.items():
            said = field.description or str(field.annotation.__doc__)
            lines.append(f"    {name}: {said.splitlines()[0]}")
        cls.__doc__ = "\n".join(lines)

    def __init__(self, **data: Any) -> None:
        super().__init__(strict=True, **data)

    @field_validator("*", mode="before")
    @classmethod
    def _no_quiet_conversions(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read "8" and true as the integers 8 and 1; in a hand-written file they are mistakes.
        kind = cls.model_fields[str(info.field_name)].annotation
        for number in value if isinstance(value, list) else ():
            _check_number_of_list(number)
        if (
            isinstance(value, bool)
            and kind is not bool
            and not any(each in (bool, StrictBool) for each in get_args(kind))
        ):
            is_object = info.field_name in ("overlap", "router", "adapt", "base", "distill", "offload_experts")
            remedy = "an object, {…}" if is_object else "a number or a name"
            raise ValueError(f"is true or false; write {remedy}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("is too large")
        if isinstance(value, str) and str not in get_args(kind) and unquoted(value) is not None:
            raise ValueError("is a string; write the number without quotes")
        return value


def _check_number_of_list(value: Any) -> None:
    """All of our lists are of whole numbers."""
    if isinstance(value, bool):
        raise ValueError("has true or false in it; write numbers")
    if isinstance(value, str) and unquoted(value) is not None:
        raise ValueError("has a string in it; write the numbers without quotes")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("has a number that is too large")


class OverlapConfig(Section):
    """`scmoe.overlap`: when the routed experts are computed."""

    enabled: bool = Field(True, strict=True, description="false: the same operators with blocking communication.")
    expert_slot: Union[int, list[int], Auto] = Field(
        "auto",
        description="Before which backbone operator the experts run: 1 … number of operators + 1 (after the last); "
        "a list gives each chunk its own, in ascending order.",
    )
    num_chunks: Union[int, Auto] = Field(
        "auto", description="Pieces that the routed tokens are cut into, so that experts also hide communication."
    )
    calibration_steps: int = Field(
        5, ge=0, strict=True, description='Micro-batches that are timed for "auto"; 0: the slot halves the FLOPs.'
    )
    calibration_file: Union[str, None] = Field(
        None, description="JSON of measured times: read if it exists, otherwise written after the calibration."
    )

    @field_validator("expert_slot", "num_chunks")
    @classmethod
    def _positive_or_auto(cls, value: int | str | list[int]) -> int | str | list[int]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or any(isinstance(number, int) and number < 1 for number in numbers):
            raise ValueError('must be at least 1, or "auto"')
        if isinstance(value, list) and value != sorted(value):
            raise ValueError("the chunks run in order: their slots must ascend")
        return value

    @field_validator("num_chunks")
    @classmethod
    def _few(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value > MOST_CHUNKS:
            raise ValueError(f"more than {MOST_CHUNKS} chunks never paid; use fewer")
        return value
