"""`scmoe plan` as its user sees it: table and sentences, files that other programs read, one sentence for a mistake."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import SWIN_PRESETS
from scmoe_ds.programs import __main__ as scmoe
from scmoe_ds.programs.flags.check import build_parser as check_parser
from scmoe_ds.programs.flags.plan import build_parser
from scmoe_ds.programs.plan_config import config_of, launch_lines
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.programs.plan_question import question_of
from scmoe_ds.programs.plan_text import count
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.method import METHODS
from scmoe_ds.simulate.search import run
from scmoe_ds.simulate.space import layouts, why_not

ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "clusters/2x8xA800-8x100g.json")
DECIDED = ["--expert-parallel", "8", "--tensor-parallel", "1", "--zero-stage", "1", "--micro-batch", "8"]
TINY = "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 1024 --num-experts 8".split()
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = scmoe.main(["plan", *(() if "--cluster" in flags else ("--cluster", CLUSTER)), *flags])
    return (code, *capsys.readouterr())


class Loads(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, value in attrs if name in ("src", "href") and value]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


def test_a_plan_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, page, written = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "ds.json"
    files = ["--json", str(record), "--html", str(page), "--write", str(written)]
    asked = ["--scale", "8:32", "--explain", "scmoe pos-2", "--row", "ScMoE Pos-2", "--tokens", "1e9"]
    code, out, err = plan(capsys, *TINY, *DECIDED, *files, *asked)
    assert (code, err) == (0, "")
    found = json.loads(record.read_text("utf-8"))
    assert found["simulated"] is True and "simulated" in out.splitlines()[1]
    names = [row["method"]["name"] for row in found["rows"]]
    assert names == [each.name for each in METHODS if each.layer != "autoep"]
    lines = {line.split("  ")[1]: line for line in out.splitlines() if re.match(r" ?\d+  \w", line)}
    assert list(lines)[: len(names)] == names
    for row in found["rows"]:
        line = lines[row["method"]["name"]]
        assert "EP 8 · TP 1 · ZeRO-1 · 8 × " in line and count(row["tokens_per_second"]["likely"]) in line
        assert row["step_ms"]["low"] <= row["step_ms"]["likely"] <= row["step_ms"]["high"]
    for start in ("recommended: take ", "limit: ", "break-even: ", "not shown: AutoEP: ", "weak scaling", "strong"):
        assert any(line.startswith(start) for line in out.splitlines()), start
    assert found["recommendation"] in out
    assert [point["gpus"] for point in found["weak_scaling"]] == [8, 16, 32]
    assert "[--experts" in out and "simulated" in out.split("pair ")[-1]
    text = page.read_text("utf-8")
    loads = Loads()
    loads.feed(text)
    assert loads.found == [] and text.count("<svg") == 3
    assert all(f"<td>{name}</td>" in text for name in names)
    # What is written trains: the section is valid, and check takes the command's flags.
    config = ScMoEConfig.from_deepspeed(json.loads(written.read_text("utf-8")))
    assert (config.architecture, config.position, config.expert_parallel_size) == ("scmoe", "pos2", 8)
    [command] = [line.strip() for line in out.splitlines() if line.startswith("  deepspeed ")]
    words = shlex.split(command)
    assert words[:4] == ["deepspeed", "--hostfile", "HOSTFILE", "pretrain_gpt_scmoe.py"]
    args = check_parser().parse_args(words[4:])
    assert (args.hidden_size, args.deepspeed_config) == (512, str(written))
    assert args.train_iters == math.ceil(1e9 / found["fixed"]["batch"] / 1024)


def question(tmp_path: Path, *flags: str, model: Any = None) -> Any:
    words = [*flags]
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
        words += ["--model", str(tmp_path)]
    return question_of(build_parser().parse_args(["--cluster", CLUSTER, *words]))


@pytest.mark.parametrize("name", [*PRESETS, *SWIN_PRESETS])
def test_flags_that_are_not_given_change_nothing_of_a_preset(name: str, tmp_path: Path) -> None:
    assert question(tmp_path, "--preset", name).model == model_of_preset(name)


@pytest.mark.parametrize("model", [None, "qwen"], ids=["a GPT", "Qwen3-MoE"])
def test_every_row_becomes_a_valid_json(model: Any, tmp_path: Path) -> None:
    asked = question(tmp_path, *(DECIDED if model else [*TINY, *DECIDED]), model=model and QWEN)
    rows = [each for each in METHODS if why_not(asked.model, each) is None]
    names = [each.name for each in rows]
    assert names == (
        ["AutoEP", "top-k, pipelined", "ScMoE Pos-1", "ScMoE Pos-1, late join"]
        if model
        else [each.name for each in METHODS if each.layer != "autoep"]
    )
    for method in rows:
        layout = next(layouts(asked.model, method, asked.cluster, asked.fixed))
        found = run(asked.model, method, layout, machine_of(asked.cluster), asked.routing)
        whole = config_of(asked, found)
        section = ScMoEConfig.from_deepspeed(whole)
        shared = method.architecture != "topk"
        if model:
            assert whole["expert_parallel"] == {"enabled": True, "autoep_size": 8}
            assert section.top_k == 3 if shared else section.architecture == "as_is"
        else:
            assert section.expert_parallel_size == 8 and section.top_k == (1 if shared else 2)
        assert whole["train_batch_size"] == 8 * whole["gradient_accumulation_steps"] * 16
        assert (section.join == "late") == ("late" in method.name)
        assert any("deepspeed" in line for line in launch_lines(asked, found, None))


def test_what_a_json_says_is_decided(tmp_path: Path) -> None:
    path = ROOT / "ds_configs/gpt2_moe_medium_16xA800.json"
    asked = question(tmp_path, "--preset", "gpt2-moe-medium", "--deepspeed_config", str(path), "--zero-stage", "2")
    fixed = asked.fixed
    assert (fixed.batch, fixed.micro_batch, fixed.expert_parallel, fixed.zero_stage) == (256, 8, 16, 2)
    assert fixed.base.precision == "bf16" and fixed.base.reduce_bucket == 200_000_000
    method, layout = asked.given
    assert method.name == "gpt2_moe_medium_16xA800.json: ScMoE Pos-2" and layout.zero_stage == 1
    whole = json.loads(path.read_text("utf-8"))
    del whole["train_micro_batch_size_per_gpu"]
    whole["scmoe"]["expert_parallel_size"] = "auto"
    (tmp_path / "ds.json").write_text(json.dumps(whole))
    free = question(tmp_path, "--preset", "gpt2-moe-medium", "--deepspeed_config", str(tmp_path / "ds.json"))
    assert (free.fixed.batch, free.fixed.micro_batch, free.fixed.expert_parallel) == (256, None, None)


@pytest.mark.parametrize(("experts", "fixed"), [(16, 16), (8, None)])
def test_parts_may_lie_on_more_ranks_than_there_are_experts(experts: int, fixed: int | None, tmp_path: Path) -> None:
    """That size is the row's of the JSON alone, and what is written for another row has whole experts."""
    whole = json.loads((ROOT / "ds_configs/gpt2_moe_medium_16xA800.json").read_text("utf-8"))
    whole["scmoe"] |= {"expert_partition": 2, "num_experts": experts}
    (tmp_path / "ds.json").write_text(json.dumps(whole))
    asked = question(tmp_path, "--preset", "gpt2-moe-medium", "--deepspeed_config", str(tmp_path / "ds.json"))
    method, layout = asked.given
    assert (method.parts, layout.expert_parallel, asked.fixed.expert_parallel) == (2, 16, fixed)
    machine = machine_of(asked.cluster, None)
    in_parts, whole_experts = (
        run(asked.model, each, replace(layout, expert_parallel=8), machine, asked.routing)
        for each in (method, replace(method, parts=1))
    )
    assert in_parts.step.total_ms > whole_experts.step.total_ms
    assert run(asked.model, method, layout, machine, asked.routing).step.total_ms > 0
    assert "expert_partition" not in config_of(asked, whole_experts)["scmoe"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [*TINY, "--expert-parallel", "3"],
            r"--expert-parallel 3 \(expert_parallel_size\): must divide .*possible: 1, 2, 4, 8",
        ),
        ([*TINY, "--global-batch-size", "101"], r"--global-batch-size 101 \(train_batch_size\): must be divisible"),
        ([*TINY, "--timeline", "step.json"], "--timeline step.json: is the drawing of --explain"),
        ([*TINY, "--row", "ScMoE Pos-4"], '--row ScMoE Pos-4: is no row .did you mean "ScMoE Pos-'),
        (
            [*TINY, "--row", "AutoEP", *DECIDED],
            "--row AutoEP: has no row: AutoEP distributes Hugging Face models alone",
        ),
        (["--cluster", "no.json", *TINY], "no.json: cannot be read"),
        ([*TINY, "--moe-ffn-hidden-size", "1000000000", *DECIDED], "fits into no layout of 16 GPUs with 85"),
        ([], "--num-layers: is missing; give --preset, --model"),
        ([*TINY, "--scale", "12:48"], "--scale 12: must be a number of whole nodes of 8 GPUs"),
    ],
    ids=lambda each: each if isinstance(each, str) else " ".join(each[-2:]),
)
def test_a_mistake_is_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, *flags)
    assert code == 2 and err.count("\n") == 1
    assert re.match(f"scmoe plan: error: .*{message}", err)


@pytest.mark.parametrize(
    "words",
    [
        *(["--scale", text] for text in ("8", "64:8")),
        *(["--tokens", text] for text in ("0", "inf", "300B")),
        *(["--skew", text] for text in ("0.5", "nan", "much")),
        *(["--nodes", text] for text in ("0", "-1", "1.5", "10000000")),
        ["--num-layers", "1000000000"],
        ["--seq-length", "0"],
        ["--timeline", "step.foo"],
    ],
    ids=" ".join,
)
def test_flags_that_cannot_be_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan(capsys, *TINY, *words)
    assert end.value.code == 2
    assert re.search(rf"^scmoe plan: error: {words[0]} {words[1]}: must ", capsys.readouterr().err, re.M)
