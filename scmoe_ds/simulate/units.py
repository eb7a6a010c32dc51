"""Quantities with units, as a cluster's JSON has them: "25 GB/s" is not "25 Gbit/s", and 25 is neither.

Python's numbers are in base units: bytes, seconds, bytes per second, operations per second.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

_PREFIX = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
FROM_FILE = {"file": True}
"""Context of pydantic for what a user wrote: there even 25.0 needs a unit. Elsewhere floats have been read before."""
_SPELLINGS = {"Gb/s": "Gbit/s", "Gbps": "Gbit/s", "Mbps": "Mbit/s", "Gb": "GB", "FLOPS": "FLOP/s", "FLOPs": "FLOP/s"}


class _Quantity:
    """How pydantic reads one kind of quantity, and what a JSON Schema says of it."""

    def __init__(self, example: str, prefixes: str, **units: float) -> None:
        self.example = example
        self.units = {name.replace("_per_", "/"): factor for name, factor in units.items()}
        self.pattern = f"{_NUMBER} *({prefixes})({'|'.join(self.units)})"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{self.pattern}$", "examples": [self.example]}

    def read(self, value: Any, info: ValidationInfo) -> float:
        """The number in base units.

        Raises:
            ValueError: no number, no unit, another kind's unit, or below 0.
        """
        if isinstance(value, float) and not (info.context or {}).get("file"):  # read before: a copy of a description
            return value
        found = re.fullmatch(self.pattern, value.strip()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"must be a number with its unit, such as {self.example!r}{_advice(value)}")
        number, prefix, unit = found.groups()
        read = float(number) * (_BINARY | _PREFIX)[prefix] * self.units[unit]
        if not math.isfinite(read):
            raise ValueError("is too large for a number")
        return read


def _advice(value: object) -> str:
    if not isinstance(value, str):
        return ""
    if value.strip().startswith("-"):
        return ", and not negative"
    right = next((right for wrong, right in _SPELLINGS.items() if value.strip().endswith(wrong)), None)
    return f"; write {right!r}" if right else ""


_SIZES = "Ki|Mi|Gi|Ti|[kMGTP]?"
Bandwidth = Annotated[float, _Quantity("25 GB/s", _SIZES, B_per_s=1.0, bit_per_s=1 / 8)]
Bytes = Annotated[float, _Quantity("80 GB", _SIZES, B=1.0)]
Seconds = Annotated[float, _Quantity("5 us", "[numµ]?", s=1.0)]
FlopRate = Annotated[float, _Quantity("312 TFLOP/s", "[kMGTP]?", FLOP_per_s=1.0)]


def in_words(value: float, unit: str) -> str:
    """A quantity with its unit, such as "200 GB/s" for 2e11 and "B/s"; three digits."""
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}
    factor = next((each for each in prefixes if abs(value) >= each), 1.0)
    return f"{float(f'{value / factor:.3g}'):g} {prefixes[factor]}{unit}"
