"""Rules for flags that several programs have, and the error that explains them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from scmoe_ds.errors import ArgumentError

MOST_WORKERS = 1024
"""Most data loader processes of a rank: each takes memory, and too many stop a machine."""

MOST_ITERATIONS = 10**9
"""More samples than the index of a run can hold."""

MOST_MINUTES = 10**6
"""About two years; clocks and timeouts of torch overflow long after it."""


def require_flags(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises an ArgumentError for a flag that neither the command line nor a preset sets."""
    for name in names:
        if getattr(args, name) is None:
            hint = "" if name == "train_iters" else " (--preset sets the sizes of a known model)"
            raise ArgumentError(f"--{name.replace('_', '-')} is missing{hint}")


def check_lowest(args: argparse.Namespace, lowest: int, names: Sequence[str]) -> None:
    """Raises an ArgumentError for a number below `lowest`; flags that are not set are left out."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


def check_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises an ArgumentError for what is no finite number above 0."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a finite number above 0")


def check_minutes(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises an ArgumentError for what is no span of time; flags that are not set are left out."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value <= MOST_MINUTES:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: must be above 0 and at most {MOST_MINUTES}")


def check_text(flag: str, text: str) -> None:
    """Raises an ArgumentError for bytes of a command line or a terminal that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", errors="backslashreplace").decode()[:60]
        raise ArgumentError(f"{flag} {shown!r}: is not UTF-8 text at character {error.start + 1}; convert it") from None


def check_rates(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises an ArgumentError for what is no probability of leaving something out."""
    for name in names:
        if not 0 <= getattr(args, name) < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be in [0, 1)")


def check_training(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a flag of the training loop that is out of range."""
    check_lowest(
        args,
        1,
        (
            "log_interval",
            "log_gating_interval",
            "eval_interval",
            "tensor_model_parallel_size",
            "save_interval",
            "exit_interval",
            "scmoe_trace",
            "keep_last",
        ),
    )
    check_lowest(args, 0, ("train_iters", "eval_iters", "num_workers", "seed"))
    for name, most in (
        ("num_workers", MOST_WORKERS),
        ("train_iters", MOST_ITERATIONS),
        ("eval_iters", MOST_ITERATIONS),
    ):
        if getattr(args, name) > most:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at most {most}")
    check_minutes(args, ("distributed_timeout_minutes",))
    if args.exit_duration_in_mins is not None:
        check_positive(args, ("exit_duration_in_mins",))
    for name in ("save_interval", "keep_last", "auto_resume"):
        if getattr(args, name) and not args.save:
            raise ArgumentError(f"--{name.replace('_', '-')} needs --save, the directory of the checkpoints")
