"""Layers that are converted one after the other, by the steps that an engine has made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.stepwise import convert_stepwise
from scmoe_ds.moe.conversion import Conversion


def test_a_loaded_checkpoint_is_evaluated_with_the_layers_of_its_step() -> None:
    layers: dict[int, Any] = {number: SimpleNamespace(converted=True) for number in range(4)}
    conversion = Conversion(layers)
    engine = SimpleNamespace(module=nn.Identity(), global_steps=0, overlap=SimpleNamespace(waits=False))

    def load(directory: str, tag: str | None = None) -> tuple[str, dict[str, Any]]:
        engine.global_steps = 25
        return directory, {}

    engine.load_checkpoint = load
    convert_stepwise(engine, conversion, ScMoEConfig(adapt={"convert_every": 10}))
    assert conversion.converted == [3] and engine.overlap.waits
    assert engine.load_checkpoint("saved", tag="last") == ("saved", {})
    assert conversion.converted == [1, 2, 3]
