"""Quantities with units, as a cluster's JSON has them: "25 GB/s" is not "25 Gbit/s", and 25 is neither.

Python's numbers are in base units: bytes, seconds, bytes per second, operations per second.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_PREFIX = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _reader(example: str, **units: float) -> BeforeValidator:
    pattern = re.compile(r"([0-9.eE+-]+)\s*(Ki|Mi|Gi|Ti|[numkMGTPµ]?)(" + "|".join(units) + r")\Z")
    names = {name.replace("_per_", "/"): factor for name, factor in units.items()}

    def read(value: Any) -> float:
        if isinstance(value, float):  # already read: a copy of a description
            return value
        found = pattern.fullmatch(str(value).strip()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"must be a number with its unit, such as {example!r}")
        number, prefix, unit = found.groups()
        return float(number) * (_BINARY | _PREFIX)[prefix] * names[unit]

    pattern = re.compile(pattern.pattern.replace("_per_", "/"))
    return BeforeValidator(read)


Bandwidth = Annotated[float, _reader("25 GB/s", B_per_s=1.0, bit_per_s=1 / 8)]
Bytes = Annotated[float, _reader("80 GB", B=1.0)]
Seconds = Annotated[float, _reader("5 us", s=1.0)]
FlopRate = Annotated[float, _reader("312 TFLOP/s", FLOP_per_s=1.0)]
