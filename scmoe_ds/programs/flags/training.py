"""Flags that both training programs have: the loop, the MoE, DeepSpeed's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.megatron import MLP_TYPES
from scmoe_ds.programs.flags.router import add_router
from scmoe_ds.programs.flags.trace import add_trace
from scmoe_ds.training.settings import TrainingSettings


def add_training(parser: argparse.ArgumentParser) -> None:
    """Flags of the training loop."""
    group = parser.add_argument_group("training, validation and checkpoints")
    group.add_argument("--train-iters", type=int, help="optimizer steps of the whole run, over all resumes")
    group.add_argument("--exit-duration-in-mins", type=float, help="save and stop after this many minutes")
    group.add_argument(
        "--exit-interval", type=int, help="save and stop at the next iteration that is a multiple of this"
    )
    group.add_argument("--log-interval", type=int, default=100, help="iterations per log line")
    group.add_argument(
        "--log-precise", action="store_true", help="log lines with all digits, to compare two runs number by number"
    )
    group.add_argument("--eval-interval", type=int, default=1000, help="iterations per validation")
    group.add_argument("--eval-iters", type=int, default=100, help="batches per validation; 0: no validation")
    group.add_argument("--save", help="directory of checkpoints; default: none are written")
    group.add_argument("--save-interval", type=int, help="iterations per checkpoint; one is always saved at the end")
    group.add_argument("--keep-last", type=int, help="checkpoints that --save keeps; default: all")
    group.add_argument(
        "--load",
        help="a checkpoint, a directory of them, or exported weights",
    )
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on from the newest checkpoint in --save, else from --load",
    )


def add_moe(parser: argparse.ArgumentParser) -> None:
    """Flags that set fields of the "scmoe" section."""
    group = parser.add_argument_group("mixture of experts", 'set fields of the JSON\'s "scmoe" section')
    group.add_argument("--num-experts", type=int, nargs="+", help="one number, or one per MoE layer")
    group.add_argument("--topk", type=int, help="routed experts per token")
    group.add_argument("--mlp-type", choices=sorted(MLP_TYPES), help="standard: topk; residual: shared_expert")
    group.add_argument("--expert-interval", type=int, help="an MoE in every n-th block")
    group.add_argument("--moe-expert-parallel-size", type=int, help="ranks that share one set of experts")
    group.add_argument("--moe-train-capacity-factor", type=float, help="capacity in training")
    group.add_argument("--moe-eval-capacity-factor", type=float, help="capacity in evaluation")
    group.add_argument("--moe-min-capacity", type=int, help="least capacity of an expert")
    group.add_argument("--moe-loss-coeff", type=float, help="weight of the load-balancing loss")
    group.add_argument(
        "--disable-moe-token-dropping",
        dest="moe_token_dropping",
        action="store_const",
        const=False,
        help="every token reaches its experts",
    )
    group.add_argument(
        "--disable-moe-top2-2nd-expert-sampling",
        dest="moe_top2_2nd_expert_sampling",
        action="store_const",
        const=False,
        help="no random choice of the second expert",
    )
    group.add_argument(
        "--enable-expert-tensor-parallelism",
        action="store_const",
        const=True,
        help="divide each expert over tensor-parallel ranks",
    )
    add_router(group)
    group.add_argument("--scmoe-position", choices=["pos1", "pos2", "pos3"], help="where the shortcut is taken")
    group.add_argument("--scmoe-merge", choices=["add", "cg1", "cg2"], help="how shared and routed output meet")
    group.add_argument("--scmoe-join", choices=["end", "late"], help="late: after the next block's attention")
    add_trace(group, "iteration N")
    group.add_argument("--scmoe-expert-slot", type=_slot, help='"auto" or the operator before which experts run')


def add_deepspeed(parser: argparse.ArgumentParser) -> None:
    """DeepSpeed's own flags."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=10.0,
        help="end the job when a collective of any process group takes longer",
    )
    group.add_argument("--deepspeed", action="store_true", help="accepted without effect; DeepSpeed is always on")
    group.add_argument("--deepspeed_config", "--deepspeed-config", help="the DeepSpeed JSON")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def _slot(text: str) -> int | str:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError('must be a number or "auto"')
    return text if text == "auto" else int(text)


def parse_flags(
    parser: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The flags, over the values of the preset that they name.

    Raises:
        ArgumentError: no --deepspeed_config.
        SystemExit: argparse's own findings.
    """
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**presets[args.preset])
        args = parser.parse_args(argv)
    if args.deepspeed_config is None:
        raise ArgumentError("--deepspeed_config is missing: name a JSON, e.g. ds_configs/gpt_small_cpu.json")
    return args


def training_settings(
    args: argparse.Namespace, whole: Mapping[str, Any], replicas: int, seq_length: int
) -> TrainingSettings:
    """What the loop needs.

    Args:
        whole: the DeepSpeed JSON, which has the batch sizes.
        replicas: data-parallel ranks.
        seq_length: tokens of a sample; 1 for images.
    """
    micro_batch_size, accumulation_steps = batch_sizes(whole, replicas)
    return TrainingSettings(
        train_iters=args.train_iters,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        seq_length=seq_length,
        seed=args.seed,
        log_interval=args.log_interval,
        eval_interval=args.eval_interval,
        eval_iters=args.eval_iters,
        num_workers=args.num_workers,
        save=args.save,
        save_interval=args.save_interval,
        exit_interval=args.exit_interval,
        trace=args.scmoe_trace,
        trace_dir=args.scmoe_trace_dir,
        exit_duration_min=args.exit_duration_in_mins,
        keep_last=args.keep_last,
        log_precise=args.log_precise,
    )
