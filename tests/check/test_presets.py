"""Every file of ds_configs/ would run, and the memory column of their README is what the check finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost.preset_memory import DIRECTORY, needed_gb, table
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.moe import kernels
from scmoe_ds.programs.check import main

TABLE = table()


def shallow(preset: str, layers: int) -> list[str]:
    """Flags that leave a few of a preset's blocks, which are alike."""
    return ["--num-layers", str(layers)] if preset in PRESETS else ["--depths", "2", "2", str(layers), "2"]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_of_the_table(name: str) -> None:
    """Two blocks run, and need less than the whole model in the table."""
    preset, column = TABLE[name]
    assert 2 < needed_gb(name, preset, "scmoe", *shallow(preset, 2)) < float(column.split(" / ")[0])


@pytest.mark.parametrize("name", ["gpt2_moe_medium_8xA30.json", "llama2_moe_8xA800.json"])
def test_the_memory_of_the_table(name: str) -> None:
    """Two shallow models give what two blocks add, and so the memory of the whole."""
    preset, column = TABLE[name]
    two, four = (needed_gb(name, preset, "scmoe", *shallow(preset, layers)) for layers in (2, 4))
    expected = two + (four - two) * (PRESETS[preset].arguments["num_layers"] - 2) / 2
    assert float(column.split(" / ")[0]) == pytest.approx(expected, abs=0.6 + 0.03 * expected)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "gpt_small_gpu.json",
            "--moe-expert-parallel-size 2 --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
            "--world-size 2",
        ),
        (
            "gpt_small_cpu.json",
            "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --world-size 2",
        ),
        ("swin_digits_cpu.json", "--preset swin-digits"),
    ],
)
def test_a_small_file(name: str, flags: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert main(["--deepspeed_config", str(DIRECTORY / name), *flags.split(), "--json", str(found)]) == 0
    assert json.loads(found.read_text("utf-8"))["fits"]


def test_what_is_installed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for Linux brings Triton along, which cannot launch a kernel on tensors without values."""
    name = next(iter(TABLE))
    kernels.choose_kernels.cache_clear()
    monkeypatch.setattr(kernels, "top1_kernels", lambda: pytest.fail("Triton without a GPU"))
    assert needed_gb(name, TABLE[name][0], "scmoe", *shallow(TABLE[name][0], 2)) > 2


def test_all_files_are_checked() -> None:
    """But for those of Hugging Face's models, which are no GPT of ours."""
    others = {"qwen3_moe.json"}
    small = {"gpt_small_gpu.json", "gpt_small_cpu.json", "swin_digits_cpu.json", "scmoe.schema.json"}
    assert {path.name for path in DIRECTORY.glob("*.json")} == TABLE.keys() | small | others
