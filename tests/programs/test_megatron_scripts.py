"""Megatron-DeepSpeed's example scripts for MoE run after the edit that docs/from_megatron_deepspeed.md names.

The scripts are written anew here from their flags, one a line, as `sed` meets them; sizes are those of a small model.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs import pretrain_gpt
from scmoe_ds.programs.flags.gpt import parse_arguments

PAGE = Path(__file__).parents[2] / "docs" / "from_megatron_deepspeed.md"
OPTIONS = """
    --override-opt_param-scheduler | --adam-beta1 0.9 | --adam-beta2 0.95 | --tensor-model-parallel-size ${MP_SIZE}
    | --moe-expert-parallel-size ${EP_PARALLEL_SIZE} | --num-experts ${EP_SIZE} | --moe-loss-coeff ${MLC}
    | --moe-train-capacity-factor ${MOE_TRAIN_CAP_FACTOR} | --moe-eval-capacity-factor ${MOE_EVAL_CAP_FACTOR}
    | --moe-min-capacity ${MOE_MIN_CAP} | --init-method-std ${INIT_STD} | --lr-decay-tokens ${LR_DECAY_TOKENS}
    | --lr-warmup-tokens ${WARMUP_TOKENS} | --micro-batch-size ${BATCH_SIZE}
    | --exit-duration-in-mins ${EXIT_DURATION} | --global-batch-size ${GLOBAL_BATCH_SIZE} | --num-layers ${NUM_LAYERS}
    | --hidden-size ${HIDDEN_SIZE} | --num-attention-heads ${NUM_ATTN_HEADS} | --seq-length ${SEQ_LEN}
    | --max-position-embeddings ${SEQ_LEN} | --train-tokens ${TRAIN_TOKENS} | --train-iters ${TRAIN_ITERS} | --lr ${LR}
    | --min-lr ${MIN_LR} | --lr-decay-style cosine | --split 98,2,0 | --log-interval ${LOG_INTERVAL}
    | --eval-interval ${EVAL_INTERVAL} | --eval-iters ${EVAL_ITERS} | --save-interval ${SAVE_INTERVAL}
    | --weight-decay 0.1 | --clip-grad 1.0 | --hysteresis 2 | --num-workers 0 | --fp16 | --load ${CHECKPOINT_PATH}
    | --save ${CHECKPOINT_PATH} | --tensorboard-queue-size 1 | --log-timers-to-tensorboard
    | --log-batch-size-to-tensorboard | --log-validation-ppl-to-tensorboard | --tensorboard-dir ${TENSORBOARD_DIR}
    | --checkpoint-activations | --create-moe-param-group | --vocab-file ${VOCAB_PATH} | --merge-file ${MERGE_PATH}
    | --data-path ${DATA_BLEND} | --data-impl mmap | --deepspeed | --deepspeed_config ${config_json}
    | --pipeline-model-parallel-size ${PP_SIZE} | --no-pipeline-parallel | --deepspeed-activation-checkpointing
    """
TEACHER = """
    --mos | --kd-beta-ce 1 | --num-layers-teacher 24 | --num-experts-teacher 64 128 | --hidden-size-teacher 2048
    | --num-attention-heads-teacher 16 | --load-teacher teacher"""
TEMPLATE = """{
  "train_batch_size" : CONFIG_BATCH_SIZE,
  "train_micro_batch_size_per_gpu": CONFIG_MBSIZE,
  "steps_per_print": LOG_INTERVAL,

  "zero_optimization": {
    "stage": ZERO_STAGE,
    "elastic_checkpoint": true
  },

  "gradient_clipping": 1.0,
  "prescale_gradients": PRESCALE_GRAD,

  "fp16": {
    "enabled": CONFIG_FP16_ENABLED,
    "loss_scale": 0,
    "loss_scale_window": 500,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "initial_scale_power": 11
  },

  "bf16": {
    "enabled": CONFIG_BF16_ENABLED
  },
  "curriculum_learning": {
    "enabled": CONFIG_CL_ENABLED,
    "curriculum_type": "seqlen",
    "min_difficulty": CONFIG_CL_MIN,
    "max_difficulty": CONFIG_CL_MAX,
    "schedule_type": "fixed_linear",
    "schedule_config": {
      "total_curriculum_step": CONFIG_CL_DURATION,
      "difficulty_step": 8
    }
  },

  "wall_clock_breakdown" : false
}
"""
# 512 sequences of 2048 tokens a step, as in the script of the 1.3B model.
LARGE = """
    MP_SIZE=1 EP_PARALLEL_SIZE=8 EP_SIZE=16 MLC=0.01 MOE_TRAIN_CAP_FACTOR=1.0 MOE_EVAL_CAP_FACTOR=1.0 MOE_MIN_CAP=4
    INIT_STD=0.014 LR_DECAY_TOKENS=300000000000 WARMUP_TOKENS=375000000 BATCH_SIZE=16 EXIT_DURATION=30000000
    GLOBAL_BATCH_SIZE=512 NUM_LAYERS=24 HIDDEN_SIZE=2048 NUM_ATTN_HEADS=16 SEQ_LEN=2048 TRAIN_TOKENS=300000000000
    TRAIN_ITERS=858306 LR=1.2e-4 MIN_LR=1.0e-6 LOG_INTERVAL=10 EVAL_INTERVAL=100 EVAL_ITERS=10 SAVE_INTERVAL=10000
    PP_SIZE=1 ZERO_STAGE=1 PRESCALE_GRAD=false CONFIG_FP16_ENABLED=false CONFIG_BF16_ENABLED=true
    """
SMALL = """
    EP_PARALLEL_SIZE=1 EP_SIZE=4 LR_DECAY_TOKENS=128 WARMUP_TOKENS=64 BATCH_SIZE=2 GLOBAL_BATCH_SIZE=4 NUM_LAYERS=2
    HIDDEN_SIZE=16 NUM_ATTN_HEADS=2 SEQ_LEN=16 TRAIN_TOKENS=128 TRAIN_ITERS=6 EVAL_ITERS=1 LOG_INTERVAL=1
    """
HALF = "ZERO_STAGE=0 PRESCALE_GRAD=true CONFIG_FP16_ENABLED=true CONFIG_BF16_ENABLED=false"
SCRIPTS: dict[str, tuple[str, tuple[str, str], dict[str, str]]] = {
    "1.3B_MoE128": ("", ("", ""), {}),
    "350M_MoE128": ("EP_SIZE=128 BATCH_SIZE=4 GLOBAL_BATCH_SIZE=256 HIDDEN_SIZE=1024 LR=2.0e-4", ("", ""), {}),
    "125M_MoE64": (
        f"EP_SIZE=64 {HALF}",
        (" --data-path ${DATA_BLEND} ", " --train-data-path a | --valid-data-path b | --test-data-path c "),
        {"split": ""},
    ),
    "350M_PR-MoE32or64": (
        HALF,
        ("--num-experts ${EP_SIZE}", f"--num-experts {'32 ' * 10} 64 64 | --mlp-type residual"),
        {},
    ),
}
"""Script: what differs from LARGE, what differs from OPTIONS (text, other text)."""


def edit(text: str, name: str, directory: Path) -> str:
    """The text after the page's `sed` command whose file has this name."""
    block = re.search(r"```\n(sed .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    commands = [shlex.split(command) for command in block[1].replace("\\\n", " ").splitlines()]
    [words] = [words for words in commands if Path(name).match(words[-1])]
    (directory / name).write_text(text)
    subprocess.run([*words[:-1], str(directory / name)], check=True)
    return (directory / name).read_text()


def command_line(options: str, sizes: str, directory: Path, **paths: str) -> list[str]:
    """Writes the JSON of an edited script, and returns the words behind `deepspeed`."""
    values = dict(each.split("=", 1) for each in f"{LARGE} {sizes}".split())
    values |= {"config_json": str(directory / "ds.json"), "CHECKPOINT_PATH": str(directory / "checkpoint")}
    values |= {"TENSORBOARD_DIR": str(directory / "board"), "DATA_BLEND": "data", "VOCAB_PATH": "v", "MERGE_PATH": "m"}
    values |= {"DIR": "examples_deepspeed/MoE", "CONFIG_BATCH_SIZE": values["GLOBAL_BATCH_SIZE"], **paths}
    values["CONFIG_MBSIZE"] = values["BATCH_SIZE"]
    of_json = [name for name in re.findall(r"[A-Z][A-Z0-9_]+", TEMPLATE) if name in values]
    lines = [f'    | sed "s/{name}/{values[name]}/" \\' for name in of_json]
    lines += ["deepspeed ${DIR}/../../pretrain_gpt.py \\"]
    lines += [f"        {' '.join(each.split())} \\" for each in options.split("|")]
    script = edit("\n".join(lines), "ds_pretrain_gpt_MoE.sh", directory)
    whole = edit(TEMPLATE, "ds_config_gpt_TEMPLATE.json", directory)
    for name, value in re.findall(r'"s/(\w+)/(\w+)/"', script):
        whole = whole.replace(name, value)
    (directory / "ds.json").write_text(whole)
    command = re.sub(r"[$]{(\w+)}", lambda found: values[found[1]], script.partition("deepspeed ")[2])
    program, *flags = command.replace("\\\n", "").rstrip("\\").split()
    assert Path(program).name == "pretrain_gpt_scmoe.py"
    return flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_of_the_scripts_are_taken(name: str, tmp_path: Path) -> None:
    sizes, (text, other), _ = SCRIPTS[name]
    options = OPTIONS.replace(text, other) if text else OPTIONS
    if "--train-data-path" in options:
        options = options.replace("| --split 98,2,0 ", "")
    args, config = parse_arguments(command_line(options, sizes, tmp_path))
    whole: dict[str, Any] = dict(config.whole)
    values = dict(each.split("=", 1) for each in f"{LARGE} {sizes}".split())
    step = int(values["GLOBAL_BATCH_SIZE"]) * 2048
    params = {"lr": float(values["LR"]), "weight_decay": 0.1, "betas": [0.9, 0.95], "torch_adam": True}
    assert whole["optimizer"] == {"type": "AdamW", "params": params}
    assert whole["scheduler"] == {
        "type": "WarmupCosineLR",
        "params": {
            "warmup_num_steps": -(-375_000_000 // step),
            "warmup_type": "linear",
            "total_num_steps": -(-300_000_000_000 // step),
            "cos_min_ratio": pytest.approx(1e-6 / float(values["LR"])),
        },
    }
    assert args.train_iters == min(-(-300_000_000_000 // step), 858306)
    assert (whole["fp16"]["enabled"], whole["bf16"]["enabled"]) == (HALF in sizes, HALF not in sizes)
    pyramid = "residual" in options
    assert whole["scmoe"] == {
        "num_experts": [32] * 10 + [64] * 2 if pyramid else int(values["EP_SIZE"]),
        "expert_parallel_size": 8,
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "min_capacity": 4,
        "aux_loss_coefficient": 0.01,
        **({"architecture": "shared_expert"} if pyramid else {}),
    }
    assert (args.tokenizer_type, args.recompute_granularity, args.auto_resume) == ("GPT2BPETokenizer", "full", True)


def test_a_script_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connect()
    pieces = [*sorted(ByteLevel.alphabet()), "re", "<|endoftext|>"]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}), encoding="utf-8")
    merges.write_text("#version: 0.2\nr e\n", encoding="utf-8")
    data = write_indexed_dataset(str(tmp_path / "data"), [[k] * 300 for k in range(50)], len(pieces)).prefix
    flags = command_line(OPTIONS, SMALL, tmp_path, DATA_BLEND=data, VOCAB_PATH=str(vocab), MERGE_PATH=str(merges))
    assert pretrain_gpt.main(flags) == 0
    assert "finished at iteration 2" in capsys.readouterr().out
    assert (tmp_path / "checkpoint" / "latest").read_text() == "global_step2"
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert pretrain_gpt.main(flags) == 0  # started again, the script has nothing left to do


def test_scripts_with_a_teacher_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(command_line(f"{OPTIONS} | {TEACHER}", "", tmp_path))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for flag in re.findall(r"--\S+", TEACHER):
        assert f"{flag} is not taken here: the model that was is the only teacher" in message


def test_dense_scripts_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--num-experts 1: this is Megatron-DeepSpeed's word for a dense MLP"):
        parse_arguments(command_line(OPTIONS, "EP_SIZE=1 EP_PARALLEL_SIZE=1", tmp_path))


def test_without_the_edit_each_point_is_named(tmp_path: Path) -> None:
    flags = command_line(OPTIONS, "", tmp_path)
    with pytest.raises(
        ArgumentError, match=r"--fp16 asks for fp16\.enabled = true, but .* has false; remove one of them"
    ):
        parse_arguments([*flags, "--fp16"])
