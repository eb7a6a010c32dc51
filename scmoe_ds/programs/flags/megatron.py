"""Flags of Megatron-DeepSpeed's pretrain_gpt.py: the same here, keys of the JSON, without effect, or refused.

No flag of it is ignored without a word. `table` writes the list in docs/from_megatron_deepspeed.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from scmoe_ds.programs.flags.checks import flag_of


def exponent_of_two(text: str) -> int:
    """2**32, as Megatron writes a loss scale, to 32, as DeepSpeed does."""
    number = float(text)
    if not 0 < number < math.inf or not math.log2(number).is_integer():
        raise argparse.ArgumentTypeError("must be a power of two")
    return int(math.log2(number))


def whole_number(text: str) -> int:
    """Megatron writes some whole numbers as 1000.0."""
    if not float(text).is_integer():
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(float(text))


JSON_FLAGS: dict[str, tuple[str, Any]] = {
    "--micro-batch-size": ("train_micro_batch_size_per_gpu", int),
    "--global-batch-size": ("train_batch_size", int),
    "--optimizer": ("optimizer.type", {"adam": "AdamW", "sgd": "SGD"}),
    "--lr": ("optimizer.params.lr", float),
    "--weight-decay": ("optimizer.params.weight_decay", float),
    "--adam-beta1": ("optimizer.params.betas.0", float),
    "--adam-beta2": ("optimizer.params.betas.1", float),
    "--adam-eps": ("optimizer.params.eps", float),
    "--sgd-momentum": ("optimizer.params.momentum", float),
    "--torch_adam": ("optimizer.params.torch_adam", True),
    "--ds_fused_adam": ("optimizer.params.torch_adam", False),
    "--cpu-optimizer": ("zero_optimization.offload_optimizer.device", "cpu"),
    "--clip-grad": ("gradient_clipping", float),
    "--fp16": ("fp16.enabled", True),
    "--bf16": ("bf16.enabled", True),
    "--loss-scale": ("fp16.loss_scale", float),
    "--initial-loss-scale": ("fp16.initial_scale_power", exponent_of_two),
    "--min-loss-scale": ("fp16.min_loss_scale", whole_number),
    "--loss-scale-window": ("fp16.loss_scale_window", whole_number),
    "--hysteresis": ("fp16.hysteresis", int),
    "--accumulate-allreduce-grads-in-fp32": ("data_types.grad_accum_dtype", "fp32"),
    "--zero-stage": ("zero_optimization.stage", int),
    "--zero-reduce-scatter": ("zero_optimization.reduce_scatter", True),
    "--zero-contigious-gradients": ("zero_optimization.contiguous_gradients", True),
    "--zero-reduce-bucket-size": ("zero_optimization.reduce_bucket_size", int),
    "--zero-allgather-bucket-size": ("zero_optimization.allgather_bucket_size", int),
    "--tensorboard-dir": ("tensorboard.output_path", str),
    "--wandb-project": ("wandb.project", str),
    "--wandb-exp-name": ("wandb.group", str),
}
"""Flag to key of the JSON, and its type; a flag without a value: what it sets."""

MLP_TYPES = {"standard": "topk", "residual": "shared_expert", "scmoe": "scmoe", "dgmoe": "dgmoe"}
"""Megatron-DeepSpeed's --mlp-type, with ours added, to `scmoe.architecture`."""

SECTION_FLAGS: dict[str, str] = {
    "num_experts": "num_experts",
    "topk": "top_k",
    "mlp_type": "architecture",
    "expert_interval": "moe_every",
    "moe_expert_parallel_size": "expert_parallel_size",
    "moe_train_capacity_factor": "capacity_factor",
    "moe_eval_capacity_factor": "eval_capacity_factor",
    "moe_min_capacity": "min_capacity",
    "moe_loss_coeff": "aux_loss_coefficient",
    "moe_token_dropping": "drop_tokens",
    "moe_top2_2nd_expert_sampling": "top2_2nd_expert_sampling",
    "enable_expert_tensor_parallelism": "expert_tensor_parallelism",
    "scmoe_position": "position",
    "scmoe_merge": "merge",
    "scmoe_join": "join",
    "scmoe_expert_slot": "overlap.expert_slot",
}
"""Flag (as argparse stores it) to field of the "scmoe" section."""
_SWITCHED_OFF = ("moe_token_dropping", "moe_top2_2nd_expert_sampling")

SAME = """
    --num-layers --num-experts --mlp-type --topk --expert-interval --hidden-size --ffn-hidden-size
    --num-attention-heads --num-key-value-heads --max-position-embeddings --make-vocab-size-divisible-by
    --normalization --layernorm-epsilon --swiglu --untie-embeddings-and-output-weights --disable-bias-linear
    --attention-dropout --hidden-dropout --init-method-std --seed --recompute-granularity --train-iters
    --log-interval --exit-interval --exit-duration-in-mins --disable-moe-token-dropping
    --moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --moe-loss-coeff
    --moe-expert-parallel-size --disable-moe-top2-2nd-expert-sampling --enable-expert-tensor-parallelism --save
    --save-interval --load --tensor-model-parallel-size --distributed-timeout-minutes --eval-iters --eval-interval
    --data-path --train-data-path --valid-data-path --test-data-path --split
    --data-cache-path --vocab-file --merge-file --seq-length --num-workers --tokenizer-type
    --tokenizer-model --deepspeed --deepspeed_config --local_rank
""".split()
"""Flags with the same name and meaning here."""

SAME_AS: dict[str, tuple[str, Any]] = {
    "--checkpoint-activations": ("--recompute-granularity", "full"),
    "--recompute-activations": ("--recompute-granularity", "selective"),
    "--use-rotary-position-embeddings": ("--position-embedding-type", "rope"),
    "--rotary-position-embeddings-theta": ("--rotary-base", float),
}
"""Flags with another name here; without a value: what they set."""

IN_FORCE: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "--pipeline-model-parallel-size": (("1",), "a shortcut may not cross a pipeline stage"),
    "--ds-sequence-parallel-size": (("1",), "one rank holds whole sequences"),
    "--no-pipeline-parallel": (None, "there is none"),
    "--create-moe-param-group": (None, "experts always have groups of their own"),
    "--data-impl": (("mmap", "infer"), "data sets are mapped into memory"),
    "--dataloader-type": (("single",), "samples are drawn once, in shuffled order"),
    "--DDP-impl": (("local",), "DeepSpeed reduces gradients"),
    "--rotary-percent": (("1", "1.0"), "all of a head is rotated"),
    "--empty-unused-memory-level": (("0",), "the cache of the device is kept"),
    "--weight-decay-incr-style": (("constant",), "weight decay is constant"),
    "--override-opt_param-scheduler": (None, "a resumed run has the schedule of the JSON"),
    "--exit-signal-handler": (None, "SIGTERM always saves and stops"),
    "--no-query-key-layer-scaling": (None, "attention is scaled by the head's size alone"),
    "--log-validation-ppl-to-tensorboard": (None, "perplexities are written"),
    "--log-memory-to-tensorboard": (None, "the peak is written"),
    "--attention-softmax-in-fp32": (None, "torch's attention does so"),
    "--exit-on-missing-checkpoint": (None, "a --load that is not there is an error"),
}
"""Flags that ask for what is so here, with the values for which that holds and the reason."""

NO_EFFECT: dict[str, tuple[int, str]] = {
    "--deepspeed-activation-checkpointing": (0, "--recompute-granularity decides what is recomputed"),
    "--recompute-method": (1, "--recompute-granularity decides what is recomputed"),
    "--recompute-num-layers": (1, "--recompute-granularity decides what is recomputed"),
    "--checkpoint-num-layers": (1, "--recompute-granularity decides what is recomputed"),
    "--use-flash-attn": (0, "torch chooses the fastest attention"),
    "--use-flash-attn-v1": (0, "torch chooses the fastest attention"),
    "--use-flash-attn-v2": (0, "torch chooses the fastest attention"),
    "--use-flash-attn-triton": (0, "torch chooses the fastest attention"),
    "--use-flash-attn-builder": (0, "torch chooses the fastest attention"),
    "--no-masked-softmax-fusion": (0, "there is no such kernel"),
    "--no-bias-gelu-fusion": (0, "there is no such kernel"),
    "--no-bias-dropout-fusion": (0, "there is no such kernel"),
    "--no-gradient-accumulation-fusion": (0, "there is no such kernel"),
    "--no-persist-layer-norm": (0, "there is no such kernel"),
    "--disable-mem-efficient-ln": (0, "there is no such kernel"),
    "--no-async-tensor-model-parallel-allreduce": (0, "there is no such kernel"),
    "--no-contiguous-buffers-in-local-ddp": (0, "DeepSpeed reduces gradients"),
    "--use-tutel": (0, 'scmoe.dispatch "exact" does what Tutel is for'),
    "--use-cpu-initialization": (0, "weights never depend on the device"),
    "--mmap-warmup": (0, "data sets are read when they are needed"),
    "--distributed-backend": (1, "DeepSpeed's accelerator chooses it (DS_ACCELERATOR)"),
    "--log-batch-size-to-tensorboard": (0, "the batch size is constant"),
    "--log-timers-to-tensorboard": (0, '"wall_clock_breakdown" writes them'),
    "--log-world-size-to-tensorboard": (0, "it is in the log"),
    "--log-optimizer-states-to-tensorboard": (0, "scmoe analyze gradients looks at them"),
    "--no-log-loss-scale-to-tensorboard": (0, "DeepSpeed's monitors write what they write"),
    "--no-log-learnig-rate-to-tensorboard": (0, "DeepSpeed's monitors write what they write"),
    "--tensorboard-log-interval": (1, "--log-interval holds for the monitors too"),
    "--tensorboard-queue-size": (1, "DeepSpeed's monitors flush what they write"),
    "--timing-log-level": (1, '"wall_clock_breakdown" writes times'),
    "--timing-log-option": (1, '"wall_clock_breakdown" writes times'),
}
"""Flags that change nothing here, with how many values each takes and why; one line of the log names them."""

SCHEDULE_FLAGS: dict[str, Any] = {
    "--lr-decay-style": str,
    "--min-lr": float,
    "--lr-warmup-iters": int,
    "--lr-warmup-samples": int,
    "--lr-warmup-tokens": int,
    "--lr-warmup-fraction": float,
    "--lr-decay-iters": int,
    "--lr-decay-samples": int,
    "--lr-decay-tokens": int,
}
"""Together they make the "scheduler" section."""

LENGTH_FLAGS = {"--train-samples": int, "--train-tokens": int}


def add_json_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that set keys of DeepSpeed's JSON, and a run's length; not in --help, which says where they are listed."""
    for flag, (_, kind) in JSON_FLAGS.items():
        if isinstance(kind, (bool, str)):
            parser.add_argument(flag, action="store_const", const=kind, help=argparse.SUPPRESS)
        elif isinstance(kind, dict):
            parser.add_argument(flag, choices=sorted(kind), help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    for flag, kind in (SCHEDULE_FLAGS | LENGTH_FLAGS).items():
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of Megatron-DeepSpeed that the GPT's program takes beside those of the same name."""
    add_json_flags(parser)
    for flag, (other, kind) in SAME_AS.items():
        dest = dest_of(other)
        if callable(kind):
            parser.add_argument(flag, dest=dest, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            parser.add_argument(
                flag, dest=dest, action="store_const", const=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
    for flag, (values, reason) in IN_FORCE.items():
        _add_plain(parser, flag, 0 if values is None else 1, _one_of(values, reason))
    for flag, (count, _) in NO_EFFECT.items():
        _add_plain(parser, flag, count, str)


def _add_plain(parser: argparse.ArgumentParser, flag: str, count: int, kind: Callable[[str], str]) -> None:
    if count:
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    else:
        parser.add_argument(flag, action="store_const", const=True, help=argparse.SUPPRESS)


def _one_of(values: tuple[str, ...] | None, reason: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if values is not None and text not in values:
            raise argparse.ArgumentTypeError(f"is refused: {reason}")
        return text

    return check


def without_effect(args: argparse.Namespace) -> str | None:
    """A line for the log, about flags that were given and change nothing here."""
    given = [
        (flag, reason) for flag, (_, reason) in NO_EFFECT.items() if getattr(args, dest_of(flag), None) is not None
    ]
    return "no effect here: " + ", ".join(f"{flag} ({reason})" for flag, reason in given) if given else None


def section_flag(dest: str) -> str:
    """A flag of `SECTION_FLAGS` as it is written."""
    return flag_of(f"disable_{dest}" if dest in _SWITCHED_OFF else dest)


def dest_of(flag: str) -> str:
    """Flag as argparse stores it."""
    return flag.lstrip("-").replace("-", "_")
