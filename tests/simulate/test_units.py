"""Quantities of a cluster's JSON."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from scmoe_ds.simulate.units import Bandwidth, Bytes, FlopRate, Seconds


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Bandwidth, "25 GB/s", 25e9),
        (Bandwidth, "200 Gbit/s", 25e9),
        (Bytes, "80 GiB", 80 * 2**30),
        (Seconds, "5 us", 5e-6),
        (FlopRate, "312 TFLOP/s", 312e12),
    ],
)
def test_units(kind: object, text: str, value: float) -> None:
    assert TypeAdapter(kind).validate_python(text) == pytest.approx(value)


@pytest.mark.parametrize("bad", [25, "25", "25 GB", "fast", "GB/s", None])
def test_a_number_without_its_unit_is_no_rate(bad: object) -> None:
    with pytest.raises(ValidationError, match="with its unit, such as '25 GB/s'"):
        TypeAdapter(Bandwidth).validate_python(bad)
