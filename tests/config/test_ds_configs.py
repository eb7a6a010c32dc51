"""Every file of ds_configs/: valid, consistent with its name, its preset and its README."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import deepspeed.runtime.constants
import deepspeed.runtime.precision_config
import deepspeed.runtime.zero.config
import pytest
import torch
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from scmoe_ds.config.adapt_section import AdaptConfig, BaseConfig, DistillConfig
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.offload_section import OffloadConfig
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.config.schema import json_schema
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models import swin
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import SWIN_PRESETS, SwinSettings
from scmoe_ds.programs.flags.gpt import build_parser, gpt_settings, parse_arguments
from scmoe_ds.programs.flags.swin import build_parser as build_image_parser
from scmoe_ds.programs.flags.swin import parse_image_arguments, swin_settings
from scmoe_ds.programs.flags.to_json import SECTION_FLAGS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.name != "scmoe.schema.json")
ON_HARDWARE = [path for path in CONFIGS if re.search(r"_\d+xA\d+$", path.stem)]
SCHEMA = json_schema()
README = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
IMAGES = 1_281_167
"""In ImageNet-1K's training set."""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def world_size(path: Path) -> int:
    return int(re.findall(r"_(\d+)xA\d+$", path.stem)[0])


def preset_name(path: Path) -> str:
    return path.stem.rsplit("_", 1)[0].replace("_", "-")


FOR_GPT = [path for path in ON_HARDWARE if preset_name(path) in PRESETS]
FOR_SWIN = [path for path in ON_HARDWARE if preset_name(path) in SWIN_PRESETS]


def table_row(name: str, text: str = README) -> list[str]:
    """The cells after the one that holds `name` in backquotes, of the only table row that starts with it."""
    rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"{len(rows)} rows for {name}"
    return [cell.strip() for cell in rows[0].strip("|").split("|")][1:]


def test_the_files_are_there() -> None:
    hardware = {
        ("gpt2_moe_small", "8xA800"),
        ("gpt2_moe_medium", "8xA800"),
        ("gpt2_moe_medium", "16xA800"),
        ("gpt3_moe_xl", "8xA800"),
        ("gpt3_moe_xl", "16xA800"),
        ("llama2_moe", "8xA800"),
        ("llama2_moe", "16xA800"),
        ("gpt2_moe_small", "8xA30"),
        ("gpt2_moe_medium", "8xA30"),
        ("swinv2_moe_s", "8xA800"),
        ("swinv2_moe_s", "8xA30"),
        ("swinv2_moe_b", "8xA800"),
        ("swinv2_moe_b", "8xA30"),
    }
    assert {path.stem for path in CONFIGS} >= {"_".join(names) for names in hardware} | {"gpt_small_gpu"}
    assert {preset_name(path) for path in ON_HARDWARE} == {*PRESETS, *SWIN_PRESETS} - {"swin-digits"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_valid_and_known_to_deepspeed(path: Path) -> None:
    whole = load(path)
    ScMoEConfig.from_deepspeed(path)
    DeepSpeedConfig(dict(whole))  # its sections reject unknown keys; its top level does not, hence the next lines
    modules = (deepspeed.runtime.constants, deepspeed.runtime.zero.config, deepspeed.runtime.precision_config)
    known = {
        value for module in modules for name, value in vars(module).items() if name.isupper() and isinstance(value, str)
    } | set(DeepSpeedMonitorConfig.model_fields)
    assert set(whole) - known - {"expert_parallel"} == {"scmoe"}
    if "expert_parallel" in whole:  # for a loop of one's own, where nobody fills in an "auto"
        return
    optimizer, scheduler = whole["optimizer"], whole["scheduler"]
    assert set(optimizer) == set(scheduler) == {"type", "params"}
    assert optimizer["type"] == "AdamW" and scheduler["type"] == "WarmupCosineLR"
    assert set(optimizer["params"]) <= set(inspect.signature(torch.optim.AdamW).parameters) | {"torch_adam"}
    assert set(scheduler["params"]) <= set(inspect.signature(WarmupCosineLR).parameters)
    assert scheduler["params"]["total_num_steps"] == "auto"
    assert whole["tensorboard"]["job_name"] == path.stem


@pytest.mark.parametrize("path", FOR_GPT, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", FOR_SWIN, ids=lambda path: path.stem)
def test_swin_trains_as_in_the_paper(path: Path) -> None:
    whole, config, ranks = load(path), ScMoEConfig.from_deepspeed(path), world_size(path)
    config.check_world(ranks)
    assert (config.num_experts, config.expert_parallel_size, ranks) == (8, 8, 8)
    assert (config.capacity_factor, config.aux_loss_coefficient) == (1.25, 0.01)
    settings = settings_of(preset_name(path))
    assert settings.image_size == 192 and len(settings.moe_blocks(config.moe_every)) == 10
    micro, steps = batch_sizes(whole, ranks)
    assert micro * steps * ranks == whole["train_batch_size"] == 1024
    assert whole["optimizer"]["params"]["lr"] == 1.25e-4
    assert whole["scheduler"]["params"]["warmup_num_steps"] == 10 * (IMAGES // 1024)
    assert whole["bf16"]["enabled"] and whole["zero_optimization"]["stage"] == 1
    assert f"--train-iters {90 * (IMAGES // 1024)} " in README


BASELINES = [
    (path, name)
    for paths, names in ((FOR_GPT, ["scmoe", "topk", "shared_expert", "dgmoe"]), (FOR_SWIN, swin.ARCHITECTURES))
    for path in paths
    for name in names
]


@pytest.mark.parametrize(("path", "architecture"), BASELINES, ids=lambda value: getattr(value, "stem", value))
def test_one_line_switches_to_a_baseline(path: Path, architecture: str, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count('"architecture": "scmoe"') == 1
    other = tmp_path / "config.json"
    other.write_text(text.replace('"architecture": "scmoe"', f'"architecture": "{architecture}"'), encoding="utf-8")
    parse = parse_image_arguments if path in FOR_SWIN else parse_arguments
    flags = ["--preset", preset_name(path), "--train-iters", "20000", "--deepspeed_config", str(other)]
    _, loaded = parse(flags)
    assert loaded.section.top_k == (2 if architecture == "topk" else 1)
    assert loaded.whole["scheduler"]["params"]["total_num_steps"] == 20000
    # "auto" values are left out of the files, so that flags can set them.
    assert parse([*flags, "--scmoe-expert-slot", "1"])[1].section.overlap.expert_slot == 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_small_gpu_config_runs_on_any_number_of_gpus(ranks: int) -> None:
    path = ROOT / "ds_configs" / "gpt_small_gpu.json"
    sizes = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"]
    flags = [*sizes, "--train-iters", "100", "--deepspeed_config", str(path), "--moe-expert-parallel-size", str(ranks)]
    _, loaded = parse_arguments(flags)
    loaded.section.check_world(ranks)
    assert batch_sizes(loaded.whole, ranks) == (8, 1)
    assert loaded.section.expert_parallel_size == ranks


def settings_of(name: str) -> GPTSettings | SwinSettings:
    parser = build_image_parser() if name in SWIN_PRESETS else build_parser()
    parser.set_defaults(**(SWIN_PRESETS[name] if name in SWIN_PRESETS else PRESETS[name].arguments))
    args = parser.parse_args([])
    if name in SWIN_PRESETS:
        return swin_settings(args)
    return gpt_settings(args, 32000 if name.startswith("llama") else 50304)


def model_of(settings: GPTSettings | SwinSettings, config: ScMoEConfig) -> torch.nn.Module:
    return GPT(settings, config) if isinstance(settings, GPTSettings) else swin.SwinMoE(settings, config)


def parameters(settings: GPTSettings | SwinSettings, config: ScMoEConfig) -> tuple[int, int]:
    """(dense, routed experts of all ranks), counted on a model without memory."""
    config = config.model_copy(update={"expert_parallel_size": 1})
    with torch.device("meta"):
        model = model_of(settings, config)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[getattr(parameter, "allreduce", True)] += parameter.numel()
    return counts[True], counts[False]


@pytest.mark.parametrize("path", ON_HARDWARE, ids=lambda path: path.stem)
def test_table_of_files(path: Path) -> None:
    """The README's row but for the memory, which tests/check/test_presets.py compares, from the file and the preset."""
    whole, ranks, name = load(path), world_size(path), preset_name(path)
    ep, (micro, steps) = whole["scmoe"]["expert_parallel_size"], batch_sizes(whole, ranks)
    settings = settings_of(name)
    dense, experts = parameters(settings, ScMoEConfig.from_deepspeed(whole))
    *row, memory = table_row(path.name)
    assert max(map(int, memory.split(" / "))) <= (0.75 * 80 if "A800" in path.stem else 0.75 * 24)
    hardware = re.search(r"(\d+)x(A\d+)$", path.stem)
    assert hardware is not None
    batch = whole["train_batch_size"]
    images = path in FOR_SWIN
    assert row == [
        f"{name} (images)" if images else name,
        f"{hardware[1]} × {hardware[2]}",
        f"{ep} × {ranks // ep}",
        str(whole["zero_optimization"]["stage"]),
        f"{micro} × {steps}",
        f"{batch} images" if images else str(batch * settings.max_position_embeddings),
        f"{(dense + experts / ep) / 1e6:.0f} M",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_readme_names_every_file(path: Path) -> None:
    assert table_row(path.name)


OBJECTS = {
    "overlap": OverlapConfig,
    "router": RouterConfig,
    "adapt": AdaptConfig,
    "adapt.base": BaseConfig,
    "adapt.distill": DistillConfig,
    "offload_experts": OffloadConfig,
}


@pytest.mark.parametrize(
    ("field", "default"),
    [
        (name, field["default"])
        for name, field in SCHEMA["properties"]["scmoe"]["properties"].items()
        if name not in OBJECTS
    ]
    + [
        (f"{name}.{field}", value["default"])
        for name, kind in OBJECTS.items()
        for field, value in SCHEMA["$defs"][kind.__name__]["properties"].items()
        if f"{name}.{field}" not in OBJECTS
    ],
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
    nested = {f"{name}.{field}" for name, kind in OBJECTS.items() for field in kind.model_fields}
    assert fields and set(fields) == (nested | ScMoEConfig.model_fields.keys()) - OBJECTS.keys()
