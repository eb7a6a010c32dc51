"""Flags: Megatron-DeepSpeed's are taken with their meaning or refused with what serves; a wrong one ends in one line."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ArgumentError, ScMoEConfigError
from scmoe_ds.programs.flags import megatron as megatron_flags
from scmoe_ds.programs.flags import table
from scmoe_ds.programs.flags.analysis import build_parser as build_analysis_parser
from scmoe_ds.programs.flags.checks import check_output_directory, require_flags
from scmoe_ds.programs.flags.evaluate import build_parser as build_evaluate_parser
from scmoe_ds.programs.flags.generate import build_parser as build_generate_parser
from scmoe_ds.programs.flags.gpt import build_parser, parse_arguments
from scmoe_ds.programs.flags.megatron_refused import REFUSED
from scmoe_ds.programs.flags.other_names import OTHER_NAMES
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of
from scmoe_ds.programs.flags.swin import build_parser as build_image_parser
from scmoe_ds.programs.flags.swin import parse_image_arguments
from scmoe_ds.programs.load import check_flags
from tests.programs.test_megatron_scripts import OPTIONS, PAGE

SIZES = ["--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"]
JSON: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "betas": [0.9, 0.95]}},
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "scmoe": {"num_experts": 4},
}

REFUSED_IN_SCRIPTS = [
    "--skip-train",
    "--inference",
    "--ds-inference",
    "--profile-name",
    "--rampup-batch-size",
    "--load-teacher",
    "--mos",
    "--kd",
    "--universal-checkpoint",
    "--sequence-parallel",
    "--ds-sequence-parallel-fpdt",
    "--fp8-hybrid",
    "--retro-add-retriever",
    "--kd-alpha-ce",
    "--train-idx-path",
    "--aml-data-download-path",
    "--enable-zbh1-pipeline",
]


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., tuple[argparse.Namespace, dict[str, Any]]]:
    def run(
        *flags: str, whole: dict[str, Any] = JSON, image: bool = False
    ) -> tuple[argparse.Namespace, dict[str, Any]]:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(whole))
        sizes = ["--preset", "swin-digits"] if image else SIZES
        length = [] if "--train-samples" in flags or "--train-tokens" in flags else ["--train-iters", "10"]
        argv = [*sizes, *length, *flags, "--deepspeed_config", str(path)]
        args, config = parse_image_arguments(argv) if image else parse_arguments(argv)
        return args, dict(config.whole)

    return run


def test_flags_without_effect_are_named_in_one_line(parse: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "scmoe_ds"):
        parse("--tensorboard-queue-size", "1", "--use-flash-attn-v2", "--no-pipeline-parallel")
    [line] = [record.message for record in caplog.records if "no effect" in record.message]
    assert "--tensorboard-queue-size (" in line and "--use-flash-attn-v2 (" in line and "pipeline" not in line


def test_no_flag_of_the_scripts_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    given = set(re.findall(r"--\S+", OPTIONS))
    assert given <= parser._option_string_actions.keys()
    for flag in REFUSED_IN_SCRIPTS:
        with pytest.raises(SystemExit) as error:
            parser.parse_args([flag])
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"{flag} is not taken here: " in message


def test_the_tables_are_those_of_the_parser() -> None:
    options = build_parser()._option_string_actions
    shown = {name for name, action in options.items() if action.help != argparse.SUPPRESS}
    assert set(megatron_flags.SAME) <= shown
    taken = (
        megatron_flags.JSON_FLAGS,
        megatron_flags.SCHEDULE_FLAGS,
        megatron_flags.LENGTH_FLAGS,
        megatron_flags.SAME_AS,
        megatron_flags.IN_FORCE,
        megatron_flags.NO_EFFECT,
    )
    hidden = options.keys() - shown - {"-h", "--help", "--help-all"}
    assert set().union(*taken) == hidden
    assert not REFUSED.keys() & options.keys()
    page = PAGE.read_text(encoding="utf-8")
    for text in (table.megatron_table(), table.other_tables()):
        assert text in page, "python -m scmoe_ds.programs.flags.table writes the tables"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num-experts", "1"],
            r"--num-experts 1: this is Megatron-DeepSpeed's word for a dense MLP, .* use at least 2",
        ),
        (["--num-experts", "4", "1"], r"--num-experts 1: "),
        (
            ["--micro-batch-size", "8"],
            r"--micro-batch-size asks for train_micro_batch_size_per_gpu = 8, but .*ds\.json has 4",
        ),
        (["--global-batch-size", "16"], r"train_batch_size = 16, but .* has 8"),
        (["--lr", "1e-4"], r"--lr asks for optimizer\.params\.lr = 0\.0001, but .* has 0\.001; remove one"),
        (
            ["--adam-beta2", "0.999"],
            r"--adam-beta1 and --adam-beta2 asks for optimizer\.params\.betas = \[0\.9, 0\.999\]",
        ),
        (["--optimizer", "sgd"], r'optimizer\.type = "SGD", but .* has "AdamW"'),
        (["--zero-stage", "2"], r"zero_optimization\.stage = 2, but .* has 1"),
        (["--clip-grad", "0.5"], r"gradient_clipping = 0\.5, but .* has 1\.0"),
        (["--lr-decay-style", "inverse-square-root"], r"--lr-decay-style inverse-square-root: .*use cosine"),
        (["--min-lr", "-1"], r"--min-lr -1\.0: must be in 0 … 0\.001, the learning rate"),
        (["--lr-warmup-fraction", "nan"], r"--lr-warmup-fraction nan: must be in 0 … 1"),
        (["--lr-decay-iters", "0"], r"--lr-decay-iters 0: must be at least 1"),
        (["--train-samples", "0"], r"--train-samples 0: must be at least 1"),
        (["--train-iters", "2000000000"], r"--train-iters 2000000000: must be at most 1000000000"),
        (["--num-workers", "5000"], r"--num-workers 5000: must be at most 1024"),
        (["--rotary-base", "nan"], r"--rotary-base nan: must be a finite number above 0"),
        (["--init-method-std", "-1"], r"--init-method-std -1\.0: must be a finite number above 0"),
        (["--layernorm-epsilon", "0"], r"--layernorm-epsilon 0\.0: must be a finite number above 0"),
        (["--tokenizer-type", "ByteTokenizer", "--vocab-file", "v"], r"--tokenizer-type ByteTokenizer: --vocab-file"),
        (
            ["--tokenizer-type", "GPT2BPETokenizer", "--tokenizer-model", "m"],
            r"--tokenizer-model is for HuggingFaceTokenizer",
        ),
    ],
)
def test_a_flag_that_contradicts(flags: list[str], message: str, parse: Any) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse(*flags)


def test_a_flag_that_is_in_force_and_one_that_the_json_leaves_out(parse: Any) -> None:
    _, whole = parse(
        "--micro-batch-size",
        "4",
        "--lr",
        "0.001",
        "--bf16",
        "--clip-grad",
        "1",
        "--zero-stage",
        "1",
        "--optimizer",
        "adam",
        "--adam-beta2",
        "0.95",
        "--weight-decay",
        "0.1",
        "--cpu-optimizer",
        "--accumulate-allreduce-grads-in-fp32",
    )
    expected = copy.deepcopy(JSON)
    expected["optimizer"]["params"]["weight_decay"] = 0.1
    expected["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    expected["data_types"] = {"grad_accum_dtype": "fp32"}
    assert whole == expected
    _, whole = parse(
        "--lr",
        "0.5",
        whole={**JSON, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_allow_untested_optimizer": True},
    )
    assert whole["optimizer"] == {"type": "SGD", "params": {"lr": 0.5}}


def test_two_precisions(parse: Any) -> None:
    with pytest.raises(ScMoEConfigError, match=r"^bf16\.enabled = true: fp16\.enabled is true as well; keep one"):
        parse("--fp16")


def test_loss_scales(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole = parse("--initial-loss-scale", "4294967296", "--loss-scale-window", "500.0", "--min-loss-scale", "1.0")
    assert whole["fp16"] == {"initial_scale_power": 32, "loss_scale_window": 500, "min_loss_scale": 1}
    with pytest.raises(SystemExit):
        parse("--initial-loss-scale", "1000")
    assert "--initial-loss-scale 1000: must be a power of two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [
        (["--train-samples", "100"], 12),  # 8 samples a step; Megatron leaves out the rest
        (["--train-tokens", "1281"], 11),  # 128 tokens a step; the first step that reaches it
        (["--train-tokens", "100000", "--train-iters", "7"], 7),
    ],
)
def test_length_of_a_run(flags: list[str], iterations: int, parse: Any) -> None:
    assert parse(*flags)[0].train_iters == iterations


def test_a_length_without_batch_size(parse: Any) -> None:
    without = {key: value for key, value in JSON.items() if key != "train_batch_size"}
    with pytest.raises(ArgumentError, match=r"--train-tokens 100: needs the batch size .*--global-batch-size"):
        parse("--train-tokens", "100", whole=without)
    assert parse("--train-tokens", "100", "--global-batch-size", "8", whole=without)[1]["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("flags", "kind", "params"),
    [
        (
            ["--lr-decay-style", "constant", "--lr-warmup-iters", "5"],
            "WarmupLR",
            {"warmup_num_steps": 5, "warmup_min_lr": 0, "warmup_max_lr": 1e-3},
        ),
        (
            ["--min-lr", "1e-5", "--lr-warmup-fraction", "0.2", "--lr-decay-iters", "50"],
            "WarmupDecayLR",
            {"warmup_num_steps": 10, "total_num_steps": 50, "warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3},
        ),
        (
            ["--lr-decay-style", "cosine", "--lr-warmup-samples", "24", "--min-lr", "1e-4"],
            "WarmupCosineLR",
            {"warmup_num_steps": 3, "total_num_steps": 10, "cos_min_ratio": pytest.approx(0.1)},
        ),
    ],
)
def test_schedules(flags: list[str], kind: str, params: dict[str, Any], parse: Any) -> None:
    _, whole = parse(*flags)
    assert whole["scheduler"] == {"type": kind, "params": {**params, "warmup_type": "linear"}}
    assert parse(*flags, whole=whole)[1]["scheduler"] == whole["scheduler"]  # in force
    changed = copy.deepcopy(whole)
    changed["scheduler"]["params"]["warmup_num_steps"] += 1
    with pytest.raises(ArgumentError, match=r"asks for scheduler\.params\.warmup_num_steps = \d+, but .*; remove one"):
        parse(*flags, whole=changed)


def test_the_image_program_takes_the_flags_of_the_json(parse: Any) -> None:
    _, whole = parse("--weight-decay", "0.05", image=True)
    assert whole["optimizer"]["params"]["weight_decay"] == 0.05


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([], "ByteTokenizer"),
        (["--vocab-file", "v", "--merge-file", "m"], "GPT2BPETokenizer"),
        (["--tokenizer-model", "m"], "HuggingFaceTokenizer"),
    ],
)
def test_the_files_name_the_tokenizer(files: list[str], kind: str, parse: Any) -> None:
    assert parse(*files)[0].tokenizer_type == kind


@pytest.mark.parametrize(
    ("build", "argv", "message"),
    [
        (build_parser, ["--num-layer", "2"], "--num-layer: unknown flag (did you mean --num-layers?)"),
        (
            build_parser,
            ["--hiden-size=2", "--xyz"],
            "--hiden-size: unknown flag (did you mean --hidden-size?); --xyz: unknown",
        ),
        (build_parser, ["--num-layers", "two"], "--num-layers two: must be a whole number"),
        (
            build_parser,
            ["--pipeline-model-parallel-size", "2"],
            "--pipeline-model-parallel-size 2: is refused: a shortcut may not cross a pipeline stage",
        ),
        (build_parser, ["--skip-train"], "--skip-train is not taken here: use scmoe evaluate"),
        (build_parser, ["--topk", "9" * 20], "--topk 99999999999999999999: is too large"),
        (build_parser, ["--scmoe-expert-slot", "1.5"], '--scmoe-expert-slot 1.5: must be a number or "auto"'),
        (build_parser, ["extra"], "extra: belongs to no flag; remove it"),
        (
            build_parser,
            ["--topk", "two", "--hiden-size", "3"],
            "(did you mean --hidden-size?); --topk two: must be a whole",
        ),
        (build_parser, ["--weight-decay", "-1e-3"], "begins with a dash is written --weight-decay=VALUE"),
        (build_parser, ["--topk", "two", "--mlp-type", "x", "--seed"], "--seed: needs a value"),
        (
            build_parser,
            ["--topk", "two", "--mlp-type", "residal", "--lr=a"],
            "--topk two: must be a whole number; --mlp-type residal: must be one of dgmoe, residual, scmoe, standard (did "
            'you mean "residual"?); --lr a: must be a number',
        ),
        (build_parser, ["--num-layers", "--hidden-size", "3"], "--num-layers: needs a value"),
        (build_parser, ["--num-experts="], "--num-experts '': must be a whole number"),
        (build_parser, ["--bf16", "true"], "true: belongs to no flag; --bf16 takes no value; remove it"),
        (build_parser, ["--bf16=1"], "--bf16=1: takes no value; write --bf16"),
        (
            build_parser,
            ["--num", "2"],
            "(did you mean --num-layers or --num-attention-heads or --num-key-value-heads?)",
        ),
        (build_parser, ["--num_layers", "2"], "--num_layers: unknown flag (did you mean --num-layers?)"),
        (build_parser, ["-num-layers", "2"], "-num-layers: unknown flag (did you mean --num-layers?)"),
        (build_parser, ["\u2014num-layers", "2"], "num-layers: unknown flag (did you mean --num-layers?)"),
        (build_parser, ["num-layers", "2"], "num-layers 2: belongs to no flag (did you mean --num-layers?)"),
        (build_parser, ["--top-k", "2"], "--top-k: unknown flag (did you mean --topk?)"),
        (build_parser, ["--micro-batchsize", "2"], "(did you mean --micro-batch-size?)"),
        (build_parser, ["--no-such"], "--no-such: unknown flag; --help-all shows all"),
        (build_parser, ["--skip-trian"], "(nearest: --skip-train, which is not taken here: use scmoe evaluate"),
        (build_parser, ["--prompt", "x"], "--prompt is a flag of scmoe generate"),
        (build_parser, ["--hf-model", "x"], "--hf-model is a flag of scmoe analyze"),
        (build_parser, ["--moe-router-topk", "2"], "--moe-router-topk is called --topk here"),
        (build_parser, ["--expert-model-parallel-size", "2"], "is called --moe-expert-parallel-size here"),
        (build_parser, ["--moe-shared-expert-overlap"], "is not taken here: overlap is on; "),
        (
            build_parser,
            ["--per_device_train_batch_size", "2", "--learning_rate", "1", "--output_dir", "x"],
            "--per_device_train_batch_size is called --micro-batch-size here; --learning_rate is called --lr here; "
            "--output_dir is called --save here",
        ),
        (build_parser, ["--gradient_accumulation_steps", "2"], '"gradient_accumulation_steps" in the DeepSpeed JSON'),
        (build_parser, ["--num-chunks", "2"], '"num_chunks" in the JSON\'s "scmoe" section'),
        (build_image_parser, ["--tensor-model-parallel-size", "2"], "is a flag of scmoe pretrain, scmoe "),
        (build_generate_parser, ["--load", "x", "--max_length", "2"], "--max_length is called --max-new-tokens here"),
        (build_generate_parser, [], "--load: missing; --help shows an example"),
        (build_evaluate_parser, ["--load", "x"], "one of --data-path --text-file --tasks is missing"),
        (build_analysis_parser, [], "missing: one of similarity, gating, gradients, feasibility"),
        (build_image_parser, ["--img-sise", "2"], "did you mean --img-size?"),
        (build_generate_parser, ["--laod", "x"], "--laod: unknown flag (did you mean --load?)"),
        (build_evaluate_parser, ["--load", "x", "--task", "a"], "did you mean --tasks?"),
        (build_analysis_parser, ["similarity", "--hf-modle", "x"], "did you mean --hf-model?"),
        (
            build_analysis_parser,
            ["similarty"],
            'analysis similarty: must be one of similarity, gating, gradients, feasibility (did you mean "similarity"?)',
        ),
    ],
)
def test_a_wrong_flag_is_one_line(
    build: Callable[[], argparse.ArgumentParser], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        build().parse_args(argv)
    text = capsys.readouterr().err
    assert error.value.code == 2
    assert text.count("\n") == 1 and "error: " in text
    assert message in text


def test_a_flag_that_is_given_twice(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The last holds, so that a script can take further flags; once, although a preset makes the parser look twice."""
    args, _ = parse("--train-iters", "7", "--preset", "gpt2-moe-small", "--seed", "3", "--seed=3")
    assert (args.train_iters, args.seed) == (7, 3)
    assert capsys.readouterr().err.splitlines() == [
        "pretrain_gpt_scmoe.py: --train-iters is given 2 times; the last holds: 7"
    ]


def test_all_flags_that_contradict_the_json_are_named(parse: Any) -> None:
    with pytest.raises(ArgumentError) as error:
        parse("--lr", "1e-4", "--micro-batch-size", "8", "--num-experts", "8", "--bf16", "--zero-stage", "1")
    path = str(error.value).split(" but ")[1].split(" has ")[0]
    assert str(error.value) == (
        f"--micro-batch-size asks for train_micro_batch_size_per_gpu = 8, but {path} has 4; --lr asks for "
        f"optimizer.params.lr = 0.0001, but {path} has 0.001; --num-experts asks for scmoe.num_experts = 8, but {path} "
        "has 4; remove one of each"
    )


def test_all_flags_that_are_missing_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"^--hidden-size, --seq-length are missing"):
        require_flags(
            argparse.Namespace(num_layers=2, hidden_size=None, seq_length=None),
            ["num_layers", "hidden_size", "seq_length"],
        )


def test_an_empty_directory_is_written_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its own permissions do not suffice."""
    out = tmp_path / "parent" / "out"
    check_output_directory("--output", out)
    out.mkdir(parents=True)
    check_output_directory("--output", out)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != out.parent)
    with pytest.raises(ArgumentError, match=f"{re.escape(str(out.parent))} is no directory or cannot be written"):
        check_output_directory("--output", out)


def test_rank_0_alone_needs_the_directory_of_expert_loads() -> None:
    """Which is not known before the ranks have met."""
    check_flags(build_generate_parser().parse_args("--load saved --save-expert-loads absent/loads.json".split()))


def test_answers_lead_somewhere() -> None:
    """To a flag that some program has; and every field of the section has an answer."""
    taken = set().union(*(parser_of(program)._option_string_actions for program in PROGRAMS))
    for name, answer in OTHER_NAMES.items():
        assert set(re.findall(r"--[\w-]+", answer)) <= taken, name
        assert f"--{name}" not in build_parser()._option_string_actions
    fields = {*ScMoEConfig.model_fields, *OverlapConfig.model_fields}
    own = {name.lstrip("-").replace("-", "_") for name in build_parser()._option_string_actions}
    assert fields - own <= {name.replace("-", "_") for name in OTHER_NAMES}
    of_section = [answer for answer in OTHER_NAMES.values() if answer.endswith('in the JSON\'s "scmoe" section')]
    assert {answer.split('"')[1] for answer in of_section} <= fields


ROUTER = ["--topk", "4", "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"]


@pytest.mark.parametrize(
    ("flags", "router", "others"),
    [
        (["--moe-z-loss-coeff", "0.01"], {"z_loss_coefficient": 0.01}, {}),
        (["--moe-router-pre-softmax"], {"score_func": "softmax", "route_norm": False}, {"drop_tokens": False}),
        (
            [*ROUTER, "--moe-router-score-function", "sigmoid", "--moe-router-topk-scaling-factor", "2.5"],
            {"score_func": "sigmoid", "route_scale": 2.5, "num_expert_groups": 4, "num_limited_groups": 2},
            {"top_k": 4},
        ),
        ([*ROUTER[:-1], "4"], {"score_func": "softmax", "group_score_func": "max"}, {}),
        (
            ["--moe-router-enable-expert-bias", "--moe-router-load-balancing-type", "none"],
            {"score_func": "softmax", "load_balance_coeff": 0.001},
            {"aux_loss_coefficient": 0},
        ),
        (
            ["--moe-ffn-hidden-size", "24", "--moe-shared-expert-intermediate-size", "40"],
            {"score_func": None},
            {"moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40},
        ),
    ],
)
def test_megatron_cores_router(flags: list[str], router: dict, others: dict, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    whole = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    path.write_text(json.dumps({**whole, "scmoe": {"num_experts": 16}}))
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --train-iters 1".split()
    _, loaded = parse_arguments([*shape, "--deepspeed_config", str(path), *flags])
    assert {name: getattr(loaded.section.router, name) for name in router} == router
    assert {name: getattr(loaded.section, name) for name in others} == others


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe-router-bias-update-rate", "0.1"], "needs --moe-router-enable-expert-bias"),
        (["--moe-router-pre-softmax", "--moe-router-score-function", "sigmoid"], "sigmoid scores have no softmax"),
        (
            ["--topk", "6", "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"],
            "its best one or two experts",
        ),
    ],
)
def test_router_flags_that_do_not_go_together(flags: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    whole = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    path.write_text(json.dumps({**whole, "scmoe": {"num_experts": 16}}))
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --train-iters 1".split()
    with pytest.raises(ArgumentError, match=words):
        parse_arguments([*shape, "--deepspeed_config", str(path), *flags])
