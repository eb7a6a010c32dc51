"""Which layers run as ScMoE: by their numbers, and none of them for a while."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from scmoe_ds.moe.conversion import Conversion


def test_numbers_say_which_layers_are_converted() -> None:
    layers = {number: SimpleNamespace(converted=False) for number in (0, 1, 3)}  # layer 2 stays as it was
    conversion = Conversion(layers)
    conversion.only([3, 0])
    assert [layer.converted for layer in layers.values()] == [True, False, True]
    assert conversion.converted == [0, 3] and conversion.numbers == [0, 1, 3]
    with pytest.raises(RuntimeError), conversion.as_source():
        assert conversion.converted == []
        raise RuntimeError("a teacher's pass that fails")
    assert conversion.converted == [0, 3]
    with pytest.raises(ValueError, match=r"MoE layer 2: cannot be converted; the convertible layers are 0, 1, 3"):
        conversion.only([2])
    assert conversion.converted == [0, 3]
