"""The "scmoe" section: defaults, derived values, schema. Its errors are in test_bad_input.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds import ScMoEConfig, ScMoEConfigError
from scmoe_ds.config.loading import load
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.schema import json_schema


def section(**fields: object) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": fields})


def test_defaults_are_the_papers_best_setting() -> None:
    config = section()
    assert (config.architecture, config.position, config.merge, config.top_k) == ("scmoe", "pos2", "cg1", 1)
    assert (config.moe_every, config.capacity_factor, config.aux_loss_coefficient) == (2, 2.0, 0.01)
    assert config.dispatch == "exact" and config.overlap.enabled and config.overlap.expert_slot == "auto"


@pytest.mark.parametrize(
    ("architecture", "k"),
    [
        ("scmoe", 1),
        ("shared_expert", 1),
        ("dgmoe", 1),
        ("topk", 2),
        ("pipelined_topk", 2),
        ("overlapped_shared_expert", 1),
    ],
)
def test_one_line_changes_the_architecture_at_equal_compute(architecture: str, k: int) -> None:
    assert section(architecture=architecture).top_k == k
    assert section(architecture=architecture, top_k="auto").top_k == k


def test_auto_merge_is_the_one_of_the_architecture_and_counts_as_not_given() -> None:
    assert section(architecture="overlapped_shared_expert").merge == "cg2"
    assert section(architecture="overlapped_shared_expert", merge="auto").merge == "cg2"
    assert section(architecture="overlapped_shared_expert", merge="add").merge == "add"
    assert section(merge="auto").merge == "cg1" and section(merge="auto").written == {}
    config = section(architecture="overlapped_shared_expert")
    assert section(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("fields", "operators"),
    [
        ({"position": "pos1"}, 2),  # attention, shared
        ({"position": "pos2"}, 3),  # mlp, attention, shared
        ({"position": "pos3"}, 4),  # attention, mlp, attention, shared
        ({"position": "pos1", "moe_every": 1}, 2),
        ({"position": "pos2", "moe_every": 4}, 3),
        ({"position": "pos2", "moe_every": 4, "shortcut_distance": 3}, 7),
        ({"position": "pos2", "architecture": "dgmoe"}, 2),
        ({"architecture": "pipelined_topk"}, 0),
        ({"architecture": "overlapped_shared_expert"}, 2),  # the shared expert's two halves
        ({"architecture": "overlapped_shared_expert", "moe_every": 1}, 2),
    ],
)
def test_number_of_operators_is_what_the_model_has(fields: dict, operators: int) -> None:
    from scmoe_ds.models.layers import GPTSettings
    from scmoe_ds.models.make_pairs import make_pair
    from scmoe_ds.overlap.executor import backbone

    config = section(**fields)
    assert config.num_operators() == operators
    assert len(backbone(make_pair(GPTSettings(4, 8, 2, 16, 8), config, 8, config.position, 8))) == operators
    section(**fields, overlap={"expert_slot": operators + 1})
    with pytest.raises(
        ScMoEConfigError, match=rf"expert_slot = {operators + 2}: the backbone has {operators} operators"
    ):
        section(**fields, overlap={"expert_slot": operators + 2})


def test_each_chunk_may_have_its_slot() -> None:
    overlap = section(overlap={"expert_slot": [2, 3, 3]}).overlap
    assert overlap.expert_slot == [2, 3, 3] and overlap.num_chunks == "auto"
    section(overlap={"expert_slot": [2, 4], "num_chunks": 2})


def test_slot_of_a_first_layer_with_a_shorter_window() -> None:
    with pytest.raises(ScMoEConfigError, match="use 1 … 3"):
        section(position="pos2", first_layer_position="pos1", overlap={"expert_slot": 4})


def test_pyramid() -> None:
    config = section(num_experts=[4, 8])
    assert config.experts_of_layers(2) == [4, 8]
    with pytest.raises(ScMoEConfigError, match="needs 3 numbers"):
        config.check_model(6)


def test_reads_a_file_and_a_dict_alike(tmp_path: Path) -> None:
    whole = {"train_batch_size": 1, "scmoe": {"merge": "add"}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(whole))
    assert ScMoEConfig.from_deepspeed(file) == ScMoEConfig.from_deepspeed(whole)


def test_a_loaded_config_is_not_validated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load({"train_batch_size": 1, "scmoe": {"merge": "add"}})
    monkeypatch.setattr(ScMoEConfig, "_from_section", lambda _: pytest.fail("validated twice"))
    read = ScMoEConfig.from_deepspeed
    assert load(loaded) is loaded and read(loaded) is read(loaded.section) is loaded.section
    assert loaded.whole["train_batch_size"] == 1 and loaded.section.written == {"merge": "add"}


@pytest.mark.parametrize("config", [None, 3, b"ds.json", ["ds.json"]])
def test_what_is_no_config_is_named(config: Any) -> None:
    with pytest.raises(ScMoEConfigError, match=rf"config is a {type(config).__name__}: .* as a path or as a dict"):
        ScMoEConfig.from_deepspeed(config)


def test_a_section_written_in_python_has_the_same_errors() -> None:
    with pytest.raises(ScMoEConfigError, match=r'scmoe\.num_expert: unknown key \(did you mean "num_experts"\?\)'):
        ScMoEConfig(num_expert=4)
    with pytest.raises(ScMoEConfigError, match=r"^scmoe\.top_k = 9: cannot exceed the number of experts \(8\)$"):
        ScMoEConfig(top_k=9)


def test_a_name_may_look_like_a_number() -> None:
    assert section(replace=True, tap="2").tap == "2"


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        section().position = "pos1"


def test_schema_lists_every_field_with_a_description() -> None:
    schema = json_schema()
    fields = schema["properties"]["scmoe"]["properties"]
    assert set(fields) == set(ScMoEConfig.model_fields)
    assert set(schema["$defs"]["OverlapConfig"]["properties"]) == set(OverlapConfig.model_fields)
    described = [name for name, field in fields.items() if "description" in field or "$ref" in field]
    assert sorted(described) == sorted(fields)
    assert schema["properties"]["scmoe"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"layer": [1]}, 'scmoe.adapt.layer: unknown key (did you mean "layers"?)'),
        ({"distill": {"alfa": 1.0}}, 'scmoe.adapt.distill.alfa: unknown key (did you mean "alpha"?)'),
        ({"distill": {"alpha": -1.0}}, "scmoe.adapt.distill.alpha = -1.0: must be greater than or equal to 0"),
        ({"distill": {"alpha": 0.0, "beta": 0.0}}, "scmoe.adapt.distill.alpha = 0.0: all three weights are 0"),
        ({"distill": {"gamma": 1.0, "teacher_logits": "d"}}, "scmoe.adapt.distill.gamma = 1.0: stored logits hold no"),
        ({"distill": True}, "scmoe.adapt.distill = true: is true or false; write an object, {…}"),
        ({"base": {"architecture": "topk"}}, 'scmoe.adapt.base.architecture = "topk": must be'),
        ({"layers": [1, 1]}, "scmoe.adapt.layers = [1, 1]: name each MoE layer once"),
        ({"source": ""}, 'scmoe.adapt.source = "": name the trained model'),
        ({"distill": {"teacher_logits": ""}}, 'scmoe.adapt.distill.teacher_logits = "": name a directory'),
        ({"layers": [True]}, "scmoe.adapt.layers = [true]: has true or false in it; write numbers"),
        ({"layers": ["1"]}, 'scmoe.adapt.layers = ["1"]: has a string in it; write the numbers without quotes'),
        ({"layers": [2**63]}, "scmoe.adapt.layers = [9223372036854775808]: has a number that is too large"),
        ({"layers": [-1]}, "scmoe.adapt.layers = [-1]: MoE layers are numbered from 0"),
    ],
)
def test_errors_of_adapt_name_their_path(adapt: dict[str, Any], said: str) -> None:
    with pytest.raises(ScMoEConfigError) as error:
        ScMoEConfig(adapt=adapt)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, [], "cpu"])
def test_what_is_no_object_is_told_without_names_of_classes(value: Any) -> None:
    with pytest.raises(ScMoEConfigError, match=r"^scmoe\.offload_experts = .*: must be an object, {…}$"):
        section(offload_experts=value)


def test_adapt_makes_a_scmoe_only() -> None:
    with pytest.raises(ScMoEConfigError, match=r'scmoe\.architecture = "topk": scmoe\.adapt makes a ScMoE'):
        ScMoEConfig(architecture="topk", adapt={})
