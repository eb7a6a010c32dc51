"""What a user can get wrong ends before training: exit code 2, one message, no traceback, nothing half-written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program

JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "tensorboard": {"enabled": True, "output_path": "BOARD", "job_name": "job"},
    "scmoe": {"num_experts": 4},
}
FLAGS = {
    "--num-layers": "2",
    "--hidden-size": "16",
    "--num-attention-heads": "2",
    "--seq-length": "16",
    "--train-iters": "1",
    "--eval-iters": "1",
    "--split": "8,1,1",
}

# Cases that the file or the command line alone decides: (change of the JSON, change of the flags, message).
CONFIG_CASES: dict[str, tuple[dict, dict, str]] = {
    "unknown key": ({"scmoe.positon": "pos2"}, {}, r'scmoe\.positon: unknown key \(did you mean "position"\?\)'),
    "unknown key in overlap": (
        {"scmoe.overlap": {"enable": 1}},
        {},
        r'overlap\.enable: unknown key \(did you mean "enabled"',
    ),
    "key of overlap outside": ({"scmoe.expert_slot": 2}, {}, r'did you mean "overlap": \{"expert_slot"\}'),
    "no section": ({"scmoe": None, "scmeo": {}}, {}, r'no "scmoe" section .*, but "scmeo": add'),
    "section is a list": ({"scmoe": []}, {}, r"scmoe = \[\]: must be a JSON object"),
    "architecture": ({"scmoe.architecture": "moe"}, {}, r'scmoe\.architecture = "moe": .*dgmoe'),
    "position": ({"scmoe.position": "pos4"}, {}, r'scmoe\.position = "pos4"'),
    "position of every block": ({"scmoe.moe_every": 1}, {}, r'scmoe\.position = "pos2": .*use pos1'),
    "layers of nothing": (
        {"scmoe.adapt": {}},
        {"--adapt-layers": "0"},
        r"scmoe\.adapt\.layers = \[0\]: how the other layers run is not known; .*--adapt-from",
    ),
    "offload with a typing error": (
        {"scmoe.offload_experts": {"divice": "cpu"}},
        {},
        r"scmoe\.offload_experts\.divice: unknown key .*device",
    ),
    "offload to nowhere": (
        {"scmoe.offload_experts": {"device": "nvme"}},
        {},
        r"scmoe\.offload_experts\.nvme_path = null: name a directory",
    ),
    "offload under another stage": (
        {"scmoe.offload_experts": {}, "zero_optimization.stage": 0},
        {},
        r"zero_optimization\.stage = 0: must be 1 or 2 beside scmoe\.offload_experts",
    ),
    "offload in fp16": (
        {"scmoe.offload_experts": {}, "fp16": {"enabled": True}},
        {},
        r"fp16\.enabled = true: DeepSpeed adds fp16 gradients up in fp32, .* use bf16 beside scmoe\.offload_experts",
    ),
    "offload with another optimizer": (
        {"scmoe.offload_experts": {}, "optimizer.params.torch_adam": False},
        {},
        r'optimizer\.type = "AdamW": must be Adam or AdamW with "torch_adam": true',
    ),
    "offload of padded buffers": (
        {"scmoe.offload_experts": {}, "scmoe.dispatch": "padded"},
        {},
        r'scmoe\.dispatch = "padded": .* set exact beside scmoe\.offload_experts',
    ),
    "offload in chunks": (
        {"scmoe.offload_experts": {}, "scmoe.overlap": {"num_chunks": 2}},
        {},
        r"scmoe\.overlap\.num_chunks = 2: .* set 1 beside",
    ),
    "offload of DeepSpeed's layers": (
        {"scmoe.offload_experts": {}, "scmoe.architecture": "topk"},
        {},
        r'scmoe\.architecture = "topk": DeepSpeed\'s own layers keep their experts',
    ),
    "no layer": (
        {"scmoe.adapt": {"source": "s", "layers": []}},
        {},
        r"scmoe\.adapt\.layers = \[\]: names no MoE layer",
    ),
    "student over its source": (
        {"scmoe.adapt": {"source": "s"}},
        {"--save": "s"},
        r"--save s: is the source \(scmoe\.adapt\.source\), whose checkpoints",
    ),
    "teacher without a name": ({"scmoe.adapt": {"distill": {}}}, {}, r"scmoe\.adapt\.source = null: .*--distill-from"),
    "logits without their weight": (
        {"scmoe.adapt": {"distill": {"alpha": 0, "beta": 1, "teacher_logits": "d"}}},
        {},
        r'scmoe\.adapt\.distill\.teacher_logits = "d": with alpha = 0',
    ),
    "stored logits and layers": (
        {"scmoe.adapt": {"source": "s", "distill": {}}},
        {"--distill-gamma": "1", "--teacher-logits": "d"},
        r"scmoe\.adapt\.distill\.gamma = 1\.0: stored logits hold no outputs",
    ),
    "another teacher": (
        {"scmoe.adapt": {"source": "s"}},
        {"--distill-from": "t"},
        r'--distill-from asks for scmoe\.adapt\.source = "t", but .* has "s"',
    ),
    "two teachers": (
        {},
        {"--adapt-from": "s", "--distill-from": "t"},
        r'--distill-from asks for scmoe\.adapt\.source = "t", but --adapt-from asks for "s"; remove one of them',
    ),
    "first layer position": (
        {"scmoe.position": "pos1", "scmoe.first_layer_position": "pos2", "scmoe.moe_every": 1},
        {},
        r"scmoe\.first_layer_position",
    ),
    "shortcut distance": ({"scmoe.shortcut_distance": 2}, {}, r"scmoe\.shortcut_distance = 2: .*use at most 1"),
    "merge": ({"scmoe.merge": "cg3"}, {}, r'scmoe\.merge = "cg3"'),
    "experts not divisible": (
        {"scmoe.num_experts": 3, "scmoe.expert_parallel_size": 2},
        {},
        r"scmoe\.num_experts = 3: must be divisible by scmoe\.expert_parallel_size = 2",
    ),
    "experts as text": ({"scmoe.num_experts": "4"}, {}, r"scmoe\.num_experts = \"4\": is a string"),
    "no experts": ({"scmoe.num_experts": 0}, {}, r"scmoe\.num_experts = 0: .*at least 1"),
    "empty pyramid": ({"scmoe.num_experts": []}, {}, r"scmoe\.num_experts = \[\]"),
    "pyramid of another length": ({"scmoe.num_experts": [4, 4]}, {}, r"needs 1 numbers, one per MoE layer"),
    "top_k too large": ({"scmoe.top_k": 5}, {}, r"scmoe\.top_k = 5: cannot exceed the number of experts \(4\)"),
    "top_k zero": ({"scmoe.top_k": 0}, {}, r"scmoe\.top_k = 0: must be at least 1"),
    "experts true": ({"scmoe.num_experts": [True]}, {}, r"scmoe\.num_experts = \[true\]: has true or false in it"),
    "slots true": (
        {"scmoe.overlap": {"expert_slot": [True, 2]}},
        {},
        r"scmoe\.overlap\.expert_slot = \[true, 2\]: has true or false in it",
    ),
    "top_k true": ({"scmoe.top_k": True}, {}, r"scmoe\.top_k = true: is true or false"),
    "dgmoe with top_k 2": ({"scmoe.architecture": "dgmoe", "scmoe.top_k": 2}, {}, r"scmoe\.top_k = 2: dgmoe"),
    "a shared MoE of another architecture": ({"scmoe.pairs_per_moe": 2}, {}, r"scmoe\.pairs_per_moe = 2: only dgmoe"),
    "a MoE shared by more pairs than there are": (
        {"scmoe.architecture": "dgmoe", "scmoe.pairs_per_moe": 2},
        {},
        r"scmoe\.pairs_per_moe = 2: must divide the 1 pairs of --num-layers 2",
    ),
    "pyramid of shared MoEs": (
        {"scmoe.architecture": "dgmoe", "scmoe.pairs_per_moe": 2, "scmoe.num_experts": [4, 8]},
        {"--num-layers": "4"},
        r"scmoe\.num_experts = \[4, 8\]: pairs that share a MoE",
    ),
    "moe_every": ({"scmoe.moe_every": 0}, {}, r"scmoe\.moe_every = 0"),
    "moe_every and depth": ({}, {"--num-layers": "3"}, r"scmoe\.moe_every = 2: must divide --num-layers 3"),
    "capacity factor": ({"scmoe.capacity_factor": -1}, {}, r"scmoe\.capacity_factor = -1"),
    "capacity factor infinite": ({"scmoe.eval_capacity_factor": float("inf")}, {}, r"scmoe\.eval_capacity_factor"),
    "noise": ({"scmoe.noisy_gate_policy": "rsample"}, {}, r"scmoe\.noisy_gate_policy = \"rsample\""),
    "RSample with k 2": ({"scmoe.noisy_gate_policy": "RSample", "scmoe.top_k": 2}, {}, r"RSample with top_k 1 only"),
    "drop_tokens 1": ({"scmoe.drop_tokens": 1}, {}, r"scmoe\.drop_tokens = 1: .*boolean"),
    "join": ({"scmoe.join": "soon"}, {}, r'scmoe\.join = "soon": must be \'end\' or \'late\''),
    "late join of DeepSpeed's layer": (
        {"scmoe.join": "late", "scmoe.architecture": "shared_expert"},
        {},
        r'scmoe\.join = "late": DeepSpeed\'s own layers run in one piece',
    ),
    "late join and post-norm": (
        {"scmoe.join": "late"},
        {"--norm-placement": "post"},
        r'scmoe\.join = "late": with --norm-placement post',
    ),
    "late join and full recompute": (
        {"scmoe.join": "late"},
        {"--recompute-granularity": "full"},
        r'scmoe\.join = "late": --recompute-granularity full',
    ),
    "width of an expert": ({"scmoe.moe_ffn_hidden_size": 0}, {}, r"scmoe\.moe_ffn_hidden_size = 0: .*at least|greater"),
    "width of no shared expert": (
        {"scmoe.architecture": "topk", "scmoe.moe_shared_expert_intermediate_size": 8},
        {},
        r"moe_shared_expert_intermediate_size = 8: topk has no shared expert",
    ),
    "router as text": ({"scmoe.router": "sigmoid"}, {}, r'scmoe\.router = "sigmoid": must be an object'),
    "router's field": (
        {"scmoe.router": {"score_fn": 1}},
        {},
        r'router\.score_fn: unknown key \(did you mean "score_func"',
    ),
    "score function": (
        {"scmoe.router": {"score_func": "relu"}},
        {},
        r'router\.score_func = "relu": must be \'softmax\'',
    ),
    "a bias for DeepSpeed's gate": (
        {"scmoe.router": {"load_balance_coeff": 0.001}},
        {},
        r"scmoe\.router\.load_balance_coeff = 0.001: DeepSpeed's gate has no such part; set \"score_func\"",
    ),
    "one weight of 1": (
        {"scmoe.router": {"score_func": "sigmoid", "route_norm": True}, "scmoe.top_k": 1},
        {},
        r"scmoe\.router\.route_norm = true: a token's only weight would be 1",
    ),
    "groups that do not divide": (
        {"scmoe.router": {"score_func": "sigmoid", "num_expert_groups": 3, "num_limited_groups": 1}},
        {},
        r"scmoe\.router\.num_expert_groups = 3: must divide the number of experts \(4\)",
    ),
    "a router and another softmax": (
        {"scmoe.router": {"score_func": "softmax"}, "scmoe.gate_softmax": "kept"},
        {},
        r'scmoe\.gate_softmax = "kept": DeepSpeed\'s gate alone reads it',
    ),
    "aux loss": ({"scmoe.aux_loss_coefficient": -0.1}, {}, r"scmoe\.aux_loss_coefficient = -0.1"),
    "dispatch": ({"scmoe.dispatch": "dense"}, {}, r'scmoe\.dispatch = "dense"'),
    "slot": (
        {"scmoe.overlap": {"expert_slot": 9}},
        {},
        r"scmoe\.overlap\.expert_slot = 9: the backbone has 3 operators",
    ),
    "slot zero": ({"scmoe.overlap": {"expert_slot": 0}}, {}, r"scmoe\.overlap\.expert_slot = 0"),
    "chunks": (
        {"scmoe.overlap": {"num_chunks": 0}},
        {},
        r'scmoe\.overlap\.num_chunks = 0: must be at least 1, or "auto"',
    ),
    "too many chunks": ({"scmoe.overlap": {"num_chunks": 9}}, {}, r"scmoe\.overlap\.num_chunks = 9: more than 8"),
    "slots that descend": ({"scmoe.overlap": {"expert_slot": [3, 2]}}, {}, r"expert_slot = \[3, 2\]: .*must ascend"),
    "slots and chunks": (
        {"scmoe.overlap": {"expert_slot": [2, 3], "num_chunks": 3}},
        {},
        r"expert_slot = \[2, 3\]: .*num_chunks = 3; remove one",
    ),
    "slots beyond": (
        {"scmoe.overlap": {"expert_slot": [2, 9]}},
        {},
        r"expert_slot = \[2, 9\]: the backbone has 3 operators",
    ),
    "slot of a baseline": (
        {"scmoe.architecture": "pipelined_topk", "scmoe.overlap": {"expert_slot": 2}},
        {},
        r"expert_slot = 2: the backbone has 0 operators here; use 1 … 1",
    ),
    "no slots": ({"scmoe.overlap": {"expert_slot": []}}, {}, r"scmoe\.overlap\.expert_slot = \[\]: must be at least 1"),
    "calibration file": ({"scmoe.overlap": {"calibration_file": 3}}, {}, r"scmoe\.overlap\.calibration_file = 3"),
    "calibration steps": ({"scmoe.overlap": {"calibration_steps": -1}}, {}, r"scmoe\.overlap\.calibration_steps = -1"),
    "trace": ({}, {"--scmoe-trace": "0"}, r"--scmoe-trace 0: must be at least 1"),
    "ZeRO-3": ({"zero_optimization.stage": 3}, {}, r"zero_optimization\.stage = 3: .*use stage 1 or 2"),
    "DeepCompile": ({"compile": {"deepcompile": True}}, {}, r"compile\.deepcompile"),
    "pipeline": ({"pipeline": {"stages": 2}}, {}, r'pipeline = {"stages": 2}: .*remove the section'),
    "offloaded parameters": (
        {"zero_optimization.offload_param": {"device": "cpu"}},
        {},
        r"zero_optimization\.offload_param = .*ZeRO-3 only",
    ),
    "offload to NVMe": (
        {"zero_optimization.offload_optimizer": {"device": "nvme"}},
        {},
        r'offload_optimizer\.device = "nvme": .*use "cpu"',
    ),
    "activation checkpointing": (
        {"activation_checkpointing": {"partition_activations": True}},
        {},
        r"activation_checkpointing\.partition_activations = true: .*--recompute-granularity",
    ),
    "fp16 without support": ({"fp16": {"enabled": True}}, {}, r"fp16\.enabled = true: the accelerator .* use bf16"),
    "AutoEP": (
        {"expert_parallel": {"enabled": True}},
        {},
        r"scmoe\.num_experts = 4: with expert_parallel \(AutoEP\).*remove one",
    ),
    "expert-parallel size and world": ({"scmoe.expert_parallel_size": 2}, {}, r"must divide the world size 1"),
    "batch sizes": ({"train_batch_size": 7}, {}, r"train_batch_size = 7: must equal .* = 6; leave one"),
    "batch size missing": ({"train_micro_batch_size_per_gpu": None}, {}, r"train_micro_batch_size_per_gpu is missing"),
    "batch size as text": ({"train_micro_batch_size_per_gpu": "2"}, {}, r'train_micro_batch_size_per_gpu = "2"'),
    "flag against JSON": (
        {},
        {"--num-experts": "8"},
        r"--num-experts asks for scmoe\.num_experts = 8, but .*ds\.json has 4; remove one",
    ),
    "flag against JSON, nested": (
        {"scmoe.overlap": {"expert_slot": 1}},
        {"--scmoe-expert-slot": "2"},
        r"--scmoe-expert-slot asks for scmoe\.overlap\.expert_slot = 2, but .* has 1",
    ),
    "flag with a bad value": ({}, {"--topk": "9"}, r"scmoe\.top_k = 9: cannot exceed"),
    "dropping against JSON": (
        {"scmoe.drop_tokens": True},
        {"--disable-moe-token-dropping": None},
        r"--disable-moe-token-dropping asks for scmoe\.drop_tokens = false",
    ),
    "heads": ({}, {"--num-attention-heads": "3"}, r"--hidden-size 16 must be divisible by --num-attention-heads 3"),
    "key-value heads": ({}, {"--num-key-value-heads": "3"}, r"--num-attention-heads 2 must be divisible"),
    "sequence too long": (
        {},
        {"--max-position-embeddings": "8"},
        r"--seq-length 16 exceeds --max-position-embeddings 8",
    ),
    "layers": ({}, {"--num-layers": "0"}, r"--num-layers 0: must be at least 1"),
    "dropout": ({}, {"--hidden-dropout": "1.5"}, r"--hidden-dropout 1.5: must be in \[0, 1\)"),
    "residual scale": ({}, {"--residual-scale": "0"}, r"--residual-scale 0 must be a positive number"),
    "residual scale, no number": ({}, {"--residual-scale": "nan"}, r"--residual-scale nan must be a positive number"),
    "tensor parallel": ({}, {"--tensor-model-parallel-size": "2"}, r"--tensor-model-parallel-size 2"),
    "save interval without save": ({}, {"--save-interval": "5"}, r"--save-interval needs --save"),
    "keep-last without save": ({}, {"--keep-last": "2"}, r"--keep-last needs --save"),
    "keep-last 0": ({}, {"--keep-last": "0", "--save": "saved"}, r"--keep-last 0: must be at least 1"),
    "auto-resume without save": ({}, {"--auto-resume": None}, r"--auto-resume needs --save"),
    "no JSON given": ({}, {"--deepspeed_config": "REMOVE"}, r"--deepspeed_config is missing"),
    "JSON missing": ({}, {"--deepspeed_config": "absent.json"}, r"absent\.json: cannot read the DeepSpeed JSON"),
    "tokenizer without model": ({}, {"--tokenizer-type": "HuggingFaceTokenizer"}, r"--tokenizer-model"),
    "tokenizer not there": ({}, {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": "absent"}, r"absent"),
    "BPE without merges": (
        {},
        {"--tokenizer-type": "GPT2BPETokenizer", "--vocab-file": "absent"},
        r"--merge-file|absent",
    ),
    "data missing": ({}, {"--data-path": "absent"}, r"absent\.(bin|idx)"),
    "split": ({}, {"--split": "a,b"}, r"--split"),
    "weights": ({}, {"--data-path": "DATA 0.5"}, r"--data-path|weight"),
    "sequence longer than the data": ({}, {"--seq-length": "100000"}, r"less than one sample"),
    "save under a file": ({}, {"--save": "DATA.bin/x"}, r"--save .*cannot write there \(Not a directory\)"),
    "load a file": ({}, {"--load": "DATA.bin"}, r"--load .*is a file, not a directory"),
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    """One process group for all cases; `main` leaves a group alone that it did not make."""
    connect()


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 300).tolist() for _ in range(20)]
    return write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix


def run(directory: Path, data: str, json_changes: dict, flag_changes: dict) -> int:
    whole = copy.deepcopy(JSON)
    for path, value in json_changes.items():
        *parents, key = path.split(".")
        target = whole
        for parent in parents:
            target = target[parent]
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    whole["tensorboard"]["output_path"] = str(directory / "board")
    file = directory / "ds.json"
    file.write_text(json.dumps(whole))
    flags = {**FLAGS, "--deepspeed_config": str(file), "--data-path": data, **flag_changes}
    flags = {name: (value or "").replace("DATA", data).split() for name, value in flags.items() if value != "REMOVE"}
    return pretrain_gpt_program.main([word for name, values in flags.items() for word in [name, *values]])


def snapshot(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def expect_refusal(
    directory: Path, data: str, json_changes: dict, flags: dict, message: str, capfd: pytest.CaptureFixture
) -> None:
    before = snapshot(directory) | {"ds.json"}
    capfd.readouterr()
    code = run(directory, data, json_changes, flags)
    output = capfd.readouterr()
    assert code == 2, output.err
    assert "Traceback" not in output.err
    errors = [line for line in output.err.splitlines() if line.startswith("pretrain_gpt_scmoe.py: error: ")]
    assert len(errors) == 1, output.err
    text = output.err[output.err.index(errors[0]) :]
    assert re.search(message, text), text
    left = {name for name in snapshot(directory) - before if "cache" not in name and name != "data"}
    assert not left, f"left behind: {left}"


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_bad_settings(case: str, tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    json_changes, flags, message = CONFIG_CASES[case]
    expect_refusal(tmp_path, data, json_changes, flags, message, capfd)


def test_the_settings_that_the_cases_change_are_good(tmp_path: Path, data: str) -> None:
    assert run(tmp_path, data, {}, {"--save": str(tmp_path / "ok")}) == 0
    assert (tmp_path / "ok" / "latest").read_text() == "global_step1"


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "must be an object"), ('{"a": 1, "a": 2}', "Duplicate keys")]
)
def test_bad_json(text: str, message: str, tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    expect_refusal(tmp_path, data, {}, {"--deepspeed_config": str(file)}, message, capfd)


def cut(path: str, keep: float) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(suffix: str, tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    cut(data + suffix, 0.6)
    expect_refusal(tmp_path, data, {}, {}, re.escape(data) + r"\.(bin|idx)", capfd)


def test_vocabulary_smaller_than_the_datas_ids(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    prefix = write_indexed_dataset(str(tmp_path / "wide"), [[1, 2, 400] * 200] * 20, 500).prefix
    expect_refusal(tmp_path, prefix, {}, {}, r"400", capfd)


def make_checkpoint(directory: Path, data: str) -> str:
    save = str(directory / "saved")
    assert run(directory, data, {}, {"--save": save}) == 0
    return save


OTHER_SHAPES: dict[str, tuple[dict, dict, str]] = {
    "hidden size": ({}, {"--hidden-size": "32"}, r"hidden_size: 16 in the checkpoint, 32 in this run"),
    "norm placement": (
        {},
        {"--norm-placement": "post"},
        r"norm_placement: 'pre' in the checkpoint, 'post' in this run",
    ),
    "depth": ({}, {"--num-layers": "4"}, r"num_layers: 2 in the checkpoint, 4 in this run"),
    "experts": ({"scmoe.num_experts": 8}, {}, r"scmoe\.num_experts: 4 in the checkpoint, 8 in this run"),
    "merge": ({"scmoe.merge": "add"}, {}, r"scmoe\.merge: 'cg1' in the checkpoint, 'add'"),
    "join": ({"scmoe.join": "late"}, {}, r"scmoe\.join: 'end' in the checkpoint, 'late' in this run; set that back"),
    "without ZeRO": (
        {"zero_optimization.stage": 0},
        {},
        r"\(this run\): zero_optimization\.stage = 0 binds a checkpoint to its layout.* stage 1 or 2",
    ),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_checkpoint_of_another_shape(case: str, tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    json_changes, flags, message = OTHER_SHAPES[case]
    save = make_checkpoint(tmp_path, data)
    expect_refusal(tmp_path, data, json_changes, {"--load": save, **flags}, message, capfd)


def test_damaged_checkpoint(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    save = make_checkpoint(tmp_path, data)
    cut(f"{save}/global_step1/mp_rank_00_model_states.pt", 0.5)
    expect_refusal(tmp_path, data, {}, {"--load": save}, r"bytes instead of .* damaged or incomplete", capfd)
    (Path(save) / "latest").write_text("global_step9")
    expect_refusal(tmp_path, data, {}, {"--load": save}, r"latest names global_step9, but", capfd)


def test_auto_resume_passes_over_a_damaged_checkpoint(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    flags: dict = {"--save": str(tmp_path / "saved"), "--save-interval": "1", "--keep-last": "2", "--auto-resume": None}
    assert run(tmp_path, data, {}, {**flags, "--train-iters": "4"}) == 0
    assert "from iteration 0 to 4" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("saved/global_step*")) == ["global_step3", "global_step4"]
    damaged = tmp_path / "saved/global_step4/layer_0_expert_2_mp_rank_00_model_states.pt"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"scrambled")
    assert run(tmp_path, data, {}, {**flags, "--train-iters": "5"}) == 0
    output = capfd.readouterr().out
    assert re.search(r"passed over: .*global_step4: layer_0_expert_2_mp_rank_00_model_states\.pt is damaged", output)
    assert "from iteration 3 to 5" in output
    assert sorted(path.name for path in tmp_path.glob("saved/global_step*")) == ["global_step4", "global_step5"]
    expect_refusal(
        tmp_path, data, {}, {**flags, "--hidden-size": "32"}, r"--auto-resume .*another model: .*hidden_size: 16", capfd
    )


def test_there_are_at_least_forty_cases() -> None:
    assert len(CONFIG_CASES) + len(OTHER_SHAPES) >= 40


def test_a_diverged_run_is_not_saved(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    whole = {"optimizer.params.lr": 1e30}
    flags = {"--train-iters": "6", "--save": str(tmp_path / "saved"), "--save-interval": "2", "--log-interval": "100"}
    assert run(tmp_path, data, whole, flags) == 2
    assert re.search(
        r"iteration \d: loss is (nan|inf) in micro-batch 1 of 1 on data-parallel rank 0, training samples \d+–\d+ \(documents .* was not saved",
        capfd.readouterr().err,
    )
    assert not list(tmp_path.glob("saved/global_step[3-9]"))
