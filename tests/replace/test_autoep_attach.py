"""Engines that deepspeed.initialize has made, put under schedules by `attach`: what a model was adapted with holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import scmoe_ds
from lab.moe_families import batch, tiny
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.attach import attach, prepare_autoep
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.replace.origin import settings_noted
from tests.replace.test_autoep_shortcuts import whole

PLAIN = {"overlap": {"calibration_steps": 0}}
SECOND = {"preset_model": "qwen3_moe", "moe_layer_pattern": r"model\.layers\.1\.mlp"}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    scmoe_ds.connect()


def written(section: dict[str, Any], **autoep: Any) -> dict[str, Any]:
    """A JSON with this section and no field more."""
    given = whole(ep=1)
    return {**given, "expert_parallel": {**given["expert_parallel"], **autoep}, "scmoe": {**PLAIN, **section}}


def attached(model: torch.nn.Module, given: dict[str, Any]) -> Any:
    section = ScMoEConfig.from_deepspeed(given)
    prepare_autoep(model, given, section)
    engine = deepspeed.initialize(model=model, config={**given, "scmoe": {}})[0]
    attach(engine, given, section)
    return engine


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    tiny("qwen3_moe").save_pretrained(out / "source")  # type: ignore[operator]
    adapt_hugging_face(out / "source", out / "adapted", {"join": "late", "shortcut_norm": "shared", "layers": [1]})
    return out


def test_what_is_left_out_is_as_the_model_was_adapted_and_what_differs_is_refused(directories: Path) -> None:
    given = written({"adapt": {"distill": {"alpha": 0.0}}})
    engine = attached(scmoe_ds.from_pretrained(directories / "adapted", given), given)
    assert engine.conversion.numbers == [1] and engine.distill is not None
    noted = settings_noted(engine.module)
    assert noted is not None and (noted["join"], noted["shortcut_norm"]) == ("late", "shared")
    assert noted["adapt"]["layers"] == [1]
    for field, value in (("architecture", "as_is"), ("join", "end"), ("merge", "cg1"), ("position", "pos3")):
        model = scmoe_ds.from_pretrained(directories / "adapted", given)
        prepare_autoep(model, given)
        engine = deepspeed.initialize(model=model, config={**given, "scmoe": {}})[0]
        other = written({"architecture": "scmoe", field: value})
        with pytest.raises(ScMoEConfigError, match=rf'scmoe.{field} = "{value}": Qwen3Moe.* was adapted with'):
            attach(engine, other, ScMoEConfig.from_deepspeed(other))


def test_a_norm_of_its_own_is_the_default_of_surgery_alone() -> None:
    shared = {"adapt": {}, "shortcut_norm": "shared"}
    cases = {
        "shared": [{"architecture": "scmoe"}, shared, {"adapt": {}, "tap": "{block}:input"}],
        "own": [{"adapt": {}}],
    }
    for norm, sections in cases.items():
        assert {ScMoEConfig.from_deepspeed(written(section)).shortcut_norm for section in sections} == {norm}


def test_a_pattern_that_leaves_layers_out_gives_no_adapted_files(
    directories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "scmoe_ds")
    given = written({"architecture": "scmoe"}, **SECOND)
    engine = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=given)[0]
    assert engine.conversion.numbers == [0] and settings_noted(engine.module) is None
    assert "moe_layer_pattern leaves out MoE layers" in caplog.text and "without shortcuts" in caplog.text
    given = written({}, **SECOND)
    with pytest.raises(ScMoEConfigError, match="moe_layer_pattern: leaves out MoE layers of a model that was adapted"):
        scmoe_ds.initialize(model=scmoe_ds.from_pretrained(directories / "adapted", given), config=given)


def test_layers_that_are_converted_by_going_on_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "scmoe_ds")

    def engine_for(**adapt: Any) -> Any:
        section = {"shortcut_norm": "shared", "adapt": adapt}
        return scmoe_ds.initialize(model=tiny("qwen3_moe"), config=written(section))[0]

    engine = engine_for(layers=[1])
    engine.backward(engine(**batch(0, 0)).loss)
    engine.step()
    engine.save_checkpoint(str(tmp_path))
    for adapt, said in (({}, True), ({"layers": [1]}, False), ({"convert_every": 5}, False)):
        caplog.clear()
        engine_for(**adapt).load_checkpoint(str(tmp_path))
        lines = [line for line in caplog.messages if "was trained with MoE layer 1 converted; MoE layer 0 runs" in line]
        assert bool(lines) is said, (adapt, caplog.messages)
