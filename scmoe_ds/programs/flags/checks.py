"""Rules for flags that several programs have, and the errors that explain them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ArgumentError

_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        """num_layers hidden_size num_attention_heads seq_length make_vocab_size_divisible_by img_size patch_dim
        window_size embed_dim num_classes num_channels depths num_heads tensor_model_parallel_size
        moe_expert_parallel_size log_interval log_gating_interval eval_interval save_interval exit_interval scmoe_trace
        keep_last train_samples train_tokens lr_decay_iters lr_decay_samples lr_decay_tokens batch_size max_new_tokens
        stride limit max_tokens max_images moe_every""",
        lambda value: value >= 1,
        "must be at least 1",
    ),
    (
        """ffn_hidden_size num_key_value_heads train_iters eval_iters num_workers num_fewshot lr_warmup_iters
        lr_warmup_samples lr_warmup_tokens low_precision_min_tokens expert_copies""",
        lambda value: value >= 0,
        "must be at least 0",
    ),
    # More samples than the index of a run can hold.
    ("train_iters eval_iters", lambda value: value <= 10**9, "must be at most 1000000000"),
    # Each data loader process takes memory, and too many stop a machine.
    ("num_workers", lambda value: value <= 1024, "must be at most 1024"),
    ("micro_batches", lambda value: value >= 2, "noise is between at least 2"),
    (
        "layernorm_epsilon rotary_base init_method_std exit_duration_in_mins shard_gb",
        lambda value: 0 < value < math.inf,
        "must be a finite number above 0",
    ),
    # Clocks and timeouts of torch overflow long after two years.
    ("distributed_timeout_minutes", lambda value: 0 < value <= 10**6, "must be above 0 and at most 1000000"),
    ("attention_dropout hidden_dropout drop_path_rate", lambda value: 0 <= value < 1, "must be in [0, 1)"),
    ("drop_rate", lambda value: 0 < value < 1, "must be above 0 and below 1; 0.25 leaves a quarter out"),
    ("noise", lambda value: 0 <= value < math.inf, "must be a finite number of at least 0"),
    ("lr_warmup_fraction low_precision_share", lambda value: 0 <= value <= 1, "must be in 0 … 1"),
    ("low_precision_score", lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
]
"""Flags of all programs, whether a value is in their range, and the rule."""


def flag_of(name: str) -> str:
    """A flag as it is written, from its name in argparse."""
    return "--" + name.replace("_", "-")


def check_ranges(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a number that is out of its flag's range; flags that are not set are left out."""
    for names, holds, rule in _RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            if isinstance(value, list) and not all(map(holds, value)):
                raise ArgumentError(f"{flag_of(name)} {value}: each {rule}")
            if value is not None and not isinstance(value, list) and not holds(value):
                raise ArgumentError(f"{flag_of(name)} {value}: {rule}")


def check_output_file(flag: str, path: str) -> None:
    """Raises an ArgumentError for a file that cannot be written, before the work whose result it shall get."""
    file = Path(path)
    if file.is_dir() or not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise ArgumentError(f"{flag} {path} cannot be written: name a file in a directory that is there")


def check_output_directory(flag: str, path: Path) -> None:
    """Raises an ArgumentError for a directory that has content or cannot be made, before the work whose result it shall
    get."""
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    beside = [path.absolute().parent] if path.is_dir() else []  # there it is written until all of it is on the disk
    for each in (above, *beside):
        if not each.is_dir() or not os.access(each, os.W_OK):
            raise ArgumentError(
                f"{flag} {path}: cannot be made, {each} is no directory or cannot be written; name another"
            )
    if path.is_dir() and any(path.iterdir()):
        raise ArgumentError(f"{flag} {path}: is not empty; name another directory")


def require_flags(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises an ArgumentError for flags that neither the command line nor a preset sets."""
    if missing := [flag_of(name) for name in names if getattr(args, name) is None]:
        hint = " (--preset sets the sizes of a known model)" if missing[0] != "--train-iters" else ""
        raise ArgumentError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{hint}")


def check_training(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a flag of a training program that is out of range, or that needs --save."""
    check_ranges(args)
    if args.seed < 0:
        raise ArgumentError(f"--seed {args.seed}: must be at least 0")
    for name in ("save_interval", "keep_last", "auto_resume"):
        if getattr(args, name) and not args.save:
            raise ArgumentError(f"{flag_of(name)} needs --save, the directory of the checkpoints")


def require_same_flags(args: argparse.Namespace, whole: Mapping[str, Any] | None = None) -> None:
    """Compares the command line, and the DeepSpeed JSON that goes with it, between ranks. Collective.

    Raises:
        RankDisagreementError: on every rank.
    """
    from scmoe_ds.parallel.agreement import fingerprint, require_agreement  # imports torch

    flags = {name: value for name, value in vars(args).items() if name != "local_rank"}
    what = "the command line" if whole is None else "the command line or the DeepSpeed JSON"
    require_agreement(what, fingerprint([whole, flags]))


def check_text(flag: str, text: str) -> None:
    """Raises an ArgumentError for bytes of a command line or a terminal that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", errors="backslashreplace").decode()[:60]
        raise ArgumentError(f"{flag} {shown!r}: is not UTF-8 text at character {error.start + 1}; convert it") from None
