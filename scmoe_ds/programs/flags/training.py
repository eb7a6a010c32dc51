"""The settings of a training loop, from the flags and the DeepSpeed JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.training.settings import TrainingSettings


def training_settings(
    args: argparse.Namespace, whole: Mapping[str, Any], replicas: int, seq_length: int
) -> TrainingSettings:
    """The settings of a run on so many data-parallel ranks; an image is a sequence of length 1."""
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
    )
