"""Every file of ds_configs/ and examples/: valid, consistent with its name, its preset and its README."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed.runtime.constants
import deepspeed.runtime.precision_config
import deepspeed.runtime.zero.config
import pytest
import torch
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.launcher.runner import parse_args as launcher_arguments
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from scmoe_ds.arguments import SECTION_FLAGS, build_parser, gpt_settings, parse_arguments
from scmoe_ds.config import OverlapConfig, ScMoEConfig
from scmoe_ds.engine import batch_sizes
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.name != "scmoe.schema.json")
ON_HARDWARE = [path for path in CONFIGS if re.search(r"_\d+xA\d+$", path.stem)]
README = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "ds_configs" / "scmoe.schema.json").read_text(encoding="utf-8"))
EXAMPLES = ROOT / "examples"

ACTIVATION_BYTES = {("gpt", "scmoe"): 45, ("gpt", "topk"): 68, ("llama", "scmoe"): 83, ("llama", "topk"): 131}
"""Per token, layer and hidden unit; what the README's estimate uses, checked against autograd below."""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def world_size(path: Path) -> int:
    return int(re.findall(r"_(\d+)xA\d+$", path.stem)[0])


def preset_name(path: Path) -> str:
    return path.stem.rsplit("_", 1)[0].replace("_", "-")


def table_row(name: str, text: str = README) -> list[str]:
    """The cells after the one that holds `name` in backquotes, of the only table row that starts with it."""
    rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"{len(rows)} rows for {name}"
    return [cell.strip() for cell in rows[0].strip("|").split("|")][1:]


def test_the_files_are_there() -> None:
    hardware = {("gpt2_moe_small", "8xA800"), ("gpt2_moe_medium", "8xA800"), ("gpt2_moe_medium", "16xA800"),
                ("gpt3_moe_xl", "8xA800"), ("gpt3_moe_xl", "16xA800"), ("llama2_moe", "8xA800"),
                ("llama2_moe", "16xA800"), ("gpt2_moe_small", "8xA30"), ("gpt2_moe_medium", "8xA30")}  # fmt: skip
    assert {path.stem for path in CONFIGS} >= {"_".join(names) for names in hardware} | {"gpt_small_gpu"}
    assert {preset_name(path) for path in ON_HARDWARE} == set(PRESETS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_valid_and_known_to_deepspeed(path: Path) -> None:
    whole = load(path)
    ScMoEConfig.from_deepspeed(path)
    DeepSpeedConfig(dict(whole))  # its sections reject unknown keys; its top level does not, hence the next lines
    modules = (deepspeed.runtime.constants, deepspeed.runtime.zero.config, deepspeed.runtime.precision_config)
    known = {value for module in modules for name, value in vars(module).items() if name.isupper()
             and isinstance(value, str)} | set(DeepSpeedMonitorConfig.model_fields)  # fmt: skip
    assert set(whole) - known == {"scmoe"}
    optimizer, scheduler = whole["optimizer"], whole["scheduler"]
    assert set(optimizer) == set(scheduler) == {"type", "params"}
    assert optimizer["type"] == "AdamW" and scheduler["type"] == "WarmupCosineLR"
    assert set(optimizer["params"]) <= set(inspect.signature(torch.optim.AdamW).parameters) | {"torch_adam"}
    assert set(scheduler["params"]) <= set(inspect.signature(WarmupCosineLR).parameters)
    assert scheduler["params"]["total_num_steps"] == "auto"
    assert whole["tensorboard"]["job_name"] == path.stem


@pytest.mark.parametrize("path", ON_HARDWARE, ids=lambda path: path.stem)
def test_agrees_with_its_name(path: Path) -> None:
    whole, config, ranks = load(path), ScMoEConfig.from_deepspeed(path), world_size(path)
    preset = PRESETS[preset_name(path)]
    config.check_world(ranks)
    config.check_model(preset.arguments["num_layers"])
    assert (config.num_experts, config.moe_every) == (preset.num_experts, preset.moe_every)
    assert config.capacity_factor == 2.0 and config.aux_loss_coefficient == 0.01
    assert config.position == ("pos1" if preset.moe_every == 1 else "pos2")
    micro, steps = batch_sizes(whole, ranks)
    assert micro * steps * ranks == whole["train_batch_size"]
    assert whole["train_batch_size"] * preset.arguments["seq_length"] == 2**19
    assert whole["bf16"]["enabled"] and whole["zero_optimization"]["stage"] in (1, 2)
    # One expert per GPU where there are as many; otherwise groups that stay inside a node of 8.
    assert config.expert_parallel_size == (16 if preset.num_experts == ranks == 16 else 8)


@pytest.mark.parametrize("architecture", ["scmoe", "topk", "shared_expert", "dgmoe"])
@pytest.mark.parametrize("path", ON_HARDWARE, ids=lambda path: path.stem)
def test_one_line_switches_to_a_baseline(path: Path, architecture: str, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count('"architecture": "scmoe"') == 1
    other = tmp_path / "config.json"
    other.write_text(text.replace('"architecture": "scmoe"', f'"architecture": "{architecture}"'), encoding="utf-8")
    flags = ["--preset", preset_name(path), "--train-iters", "1907", "--deepspeed_config", str(other)]
    _, whole, config = parse_arguments(flags)
    assert config.top_k == (2 if architecture == "topk" else 1)
    assert whole["scheduler"]["params"]["total_num_steps"] == 1907
    # "auto" values are left out of the files, so that flags can set them.
    assert parse_arguments([*flags, "--scmoe-expert-slot", "1"])[2].overlap.expert_slot == 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_small_gpu_config_runs_on_any_number_of_gpus(ranks: int) -> None:
    path = ROOT / "ds_configs" / "gpt_small_gpu.json"
    sizes = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"]
    flags = [*sizes, "--train-iters", "100", "--deepspeed_config", str(path), "--moe-expert-parallel-size", str(ranks)]
    _, whole, config = parse_arguments(flags)
    config.check_world(ranks)
    assert batch_sizes(whole, ranks) == (8, 1)
    assert config.expert_parallel_size == ranks


def schema_errors(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """What a JSON Schema validator would find, for the keywords that pydantic writes here; refuses others."""
    known = {"title", "description", "default", "$schema", "$defs", "required", "$ref", "anyOf", "enum", "const",
             "type", "minimum", "exclusiveMinimum", "items", "properties", "additionalProperties"}  # fmt: skip
    assert set(schema) <= known, f"{path}: teach schema_errors {set(schema) - known}"
    if "$ref" in schema:
        return schema_errors(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    if "anyOf" in schema:
        found = [schema_errors(value, option, path) for option in schema["anyOf"]]
        return [] if [] in found else [error for errors in found for error in errors]
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
                             "integer": int, "number": (int, float)}  # fmt: skip
    if "type" in schema:
        wrong = not isinstance(value, types[schema["type"]])
        if wrong or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            return [f"{path}: {value!r} is not of type {schema['type']}"]
    broken = [f"{path}: {value!r} is not one of {schema[key]!r}" for key in ("enum", "const") if key in schema
              and value not in (schema[key] if key == "enum" else [schema[key]])]  # fmt: skip
    if "minimum" in schema and value < schema["minimum"]:
        broken.append(f"{path}: {value!r} is below {schema['minimum']}")
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        broken.append(f"{path}: {value!r} must exceed {schema['exclusiveMinimum']}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            broken += schema_errors(item, schema.get("items", {}), f"{path}[{index}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        broken += [f"{path}.{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in properties:
                broken += schema_errors(item, properties[key], f"{path}.{key}")
            elif schema.get("additionalProperties", True) is False:
                broken.append(f"{path}.{key}: unknown key")
    return broken


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_validates_against_the_schema(path: Path) -> None:
    assert schema_errors(load(path), SCHEMA) == []


@pytest.mark.parametrize(
    ("section", "finding"),
    [
        ({"positon": "pos2"}, "$.scmoe.positon: unknown key"),
        ({"position": "pos4"}, "$.scmoe.position: 'pos4' is not one of"),
        ({"num_experts": [8, "16"]}, "$.scmoe.num_experts[1]: '16' is not of type integer"),
        ({"moe_every": 0}, "$.scmoe.moe_every: 0 is below 1"),
        ({"capacity_factor": 0}, "$.scmoe.capacity_factor: 0 must exceed 0"),
        ({"post_norm": "yes"}, "$.scmoe.post_norm: 'yes' is not of type boolean"),
        ({"overlap": {"slot": 1}}, "$.scmoe.overlap.slot: unknown key"),
        ({"overlap": {"expert_slot": "automatic"}}, "$.scmoe.overlap.expert_slot: 'automatic' is not one of"),
    ],
)
def test_schema_finds_slips(section: dict[str, Any], finding: str) -> None:
    assert any(error.startswith(finding) for error in schema_errors({"scmoe": section}, SCHEMA))


def write_schema(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "write_schema.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_schema_file_is_current() -> None:
    done = write_schema("--check")
    assert done.returncode == 0, done.stderr


def test_stale_schema_is_found_and_mended(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    assert write_schema("--check", "--output", str(schema), cwd=tmp_path).returncode == 1
    schema.write_text(json.dumps(SCHEMA | {"title": "old"}), encoding="utf-8")
    stale = write_schema("--check", "--output", str(schema), cwd=tmp_path)
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert write_schema("--output", str(schema), cwd=tmp_path).returncode == 0
    assert json.loads(schema.read_text(encoding="utf-8")) == SCHEMA


def parameters(name: str, architecture: str) -> tuple[int, int, GPTSettings]:
    """(dense, routed experts of all ranks, shape), counted on a model without memory."""
    parser = build_parser()
    parser.set_defaults(**PRESETS[name].arguments)
    settings = gpt_settings(parser.parse_args([]), 32000 if name.startswith("llama") else 50304)
    preset = PRESETS[name]
    config = ScMoEConfig(architecture=architecture, num_experts=preset.num_experts, moe_every=preset.moe_every,
                         position="pos1" if preset.moe_every == 1 else "pos2")  # fmt: skip
    with torch.device("meta"):
        model = GPT(settings, config)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[getattr(parameter, "allreduce", True)] += parameter.numel()
    return counts[True], counts[False], settings


@pytest.mark.parametrize("path", ON_HARDWARE, ids=lambda path: path.stem)
def test_table_of_files(path: Path) -> None:
    """The README's row, recomputed from the file and the preset; memory by the formula under the table."""
    whole, config, ranks = load(path), ScMoEConfig.from_deepspeed(path), world_size(path)
    name, ep = preset_name(path), config.expert_parallel_size
    micro, steps = batch_sizes(whole, ranks)
    memory_gb = []
    for architecture in ("scmoe", "topk"):
        dense, experts, shape = parameters(name, architecture)
        tokens = micro * shape.max_position_embeddings
        model_bytes = 4 * (dense + experts / ep)
        adam_bytes = 12 * (dense / ranks + experts / ep / (ranks // ep))
        per_unit = ACTIVATION_BYTES["llama" if shape.swiglu else "gpt", architecture]
        activation_bytes = per_unit * tokens * shape.hidden_size * shape.num_layers
        logit_bytes = 10 * tokens * shape.vocab_size
        memory_gb.append(round((model_bytes + adam_bytes + activation_bytes + logit_bytes) / 1e9 + 2))
        if architecture == "scmoe":
            per_gpu = f"{(dense + experts / ep) / 1e6:.0f} M"
    assert max(memory_gb) <= (0.75 * 80 if "A800" in path.stem else 0.75 * 24)
    hardware = re.search(r"(\d+)x(A\d+)$", path.stem)
    assert hardware is not None
    assert table_row(path.name) == [
        name, f"{hardware[1]} × {hardware[2]}", f"{ep} × {ranks // ep}", str(whole["zero_optimization"]["stage"]),
        f"{micro} × {steps}", str(whole["train_batch_size"] * shape.max_position_embeddings), per_gpu,
        f"{memory_gb[0]} / {memory_gb[1]}"]  # fmt: skip


def saved_bytes(style: str, architecture: str, layers: int) -> int:
    """What autograd keeps for the backward pass of one forward pass, parameters left out."""
    llama = {"num_key_value_heads": 2, "normalization": "RMSNorm", "swiglu": True, "position_embedding": "rope",
             "add_bias_linear": False}  # fmt: skip
    settings = GPTSettings(layers, 512, 8, 128, 128, hidden_dropout=0.1, **(llama if style == "llama" else {}))
    every, position = (1, "pos1") if style == "llama" else (2, "pos2")
    config = ScMoEConfig(architecture=architecture, moe_every=every, position=position)
    torch.manual_seed(0)
    model = GPT(settings, config).bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 128, (1, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens).loss
    assert loss is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("style", "architecture"), ACTIVATION_BYTES)
def test_activation_bytes_of_the_estimate(style: str, architecture: str) -> None:
    layers = 4
    per_layer = (saved_bytes(style, architecture, 2 * layers) - saved_bytes(style, architecture, layers)) / layers
    assert per_layer / (128 * 512) == pytest.approx(ACTIVATION_BYTES[style, architecture], abs=1.5)
    assert f"{ACTIVATION_BYTES[style, architecture]} B" in README


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_readme_names_every_file(path: Path) -> None:
    assert table_row(path.name)


@pytest.mark.parametrize(
    ("field", "default"),
    [(name, field.get_default()) for name, field in ScMoEConfig.model_fields.items() if name != "overlap"]
    + [(f"overlap.{name}", field.get_default()) for name, field in OverlapConfig.model_fields.items()],
)
def test_readme_has_every_field_with_its_default(field: str, default: object) -> None:
    assert table_row(field)[0] == f"`{json.dumps(default)}`"


@pytest.mark.parametrize("flag", SECTION_FLAGS)
def test_readme_maps_every_flag(flag: str) -> None:
    options = [action.option_strings[0] for action in build_parser()._actions if action.dest == flag]
    assert table_row(options[0])[0] == f"`{SECTION_FLAGS[flag]}`"


def test_readme_names_no_field_that_does_not_exist() -> None:
    table = README[README.index("| field | default |") :].split("\n\n")[0]
    fields = re.findall(r"^\| `([a-z0-9_.]+)` \|", table, flags=re.MULTILINE)
    known = {*ScMoEConfig.model_fields, *(f"overlap.{name}" for name in OverlapConfig.model_fields)}
    assert fields and set(fields) == known - {"overlap"}


@pytest.mark.parametrize(("name", "slots"), [("hostfile_1x8", [8]), ("hostfile_2x8", [8, 8])])
def test_hostfiles(name: str, slots: list[int]) -> None:
    assert list(fetch_hostfile(str(EXAMPLES / name)).values()) == slots


def test_environment_file() -> None:
    """DeepSpeed splits every line at "=" and exports it: a blank line is an error there, a comment an export."""
    lines = (EXAMPLES / "deepspeed_env.example").read_text(encoding="utf-8").splitlines()
    assert lines and all(re.fullmatch(r"[A-Z][A-Z0-9_]*=[\w@%+=:,./-]+", line) for line in lines)
    assert not any(line.startswith("CUDA_DEVICE_MAX_CONNECTIONS") for line in lines)
    runner = PDSHRunner(launcher_arguments(["train.py"]), "")
    for line in lines:
        runner.add_export(*line.split("=", maxsplit=1))
    assert len(runner.exports) == len(lines)


@pytest.mark.parametrize("name", ["pretrain_gpt2_moe_medium_16xA800.sh", "pretrain_gpt2_moe_medium.slurm"])
def test_scripts(name: str) -> None:
    """Shell syntax, launcher flags and training flags, read by the parsers that will read them."""
    path = EXAMPLES / name
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    launcher, training = re.findall(r"deepspeed (--hostfile.*?) pretrain_gpt_scmoe\.py (.*?)(?:'|\"\$@\"|\n)", text)[0]
    launcher = re.sub(r"\$\{MASTER_ADDR:\+(.*?)\}", r"\1", launcher).replace('"$SLURM_NODEID"', "0")
    launcher = launcher.replace('"$MASTER_PORT"', "29500")
    assert launcher_arguments([*launcher.split(), "pretrain_gpt_scmoe.py"]).user_script == "pretrain_gpt_scmoe.py"
    flags = training.split()
    at = flags.index("--deepspeed_config") + 1
    assert flags[at] == "ds_configs/gpt2_moe_medium_16xA800.json"
    flags[at] = str(ROOT / flags[at])
    args, whole, config = parse_arguments(flags)
    config.check_world(16)
    assert args.train_iters * whole["train_batch_size"] * args.seq_length == pytest.approx(1e9, rel=0.01)


@pytest.mark.parametrize("text", [README, (EXAMPLES / "README.md").read_text(encoding="utf-8")], ids=["ds", "examples"])
def test_paths_in_the_readmes_exist(text: str) -> None:
    paths = re.findall(r"\b(?:ds_configs|examples|tools)/[\w./-]*\w", text)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
