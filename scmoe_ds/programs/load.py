"""Loads the trained model that a program's flags name."""

from __future__ import annotations

import argparse
import sys

import torch.distributed as dist

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.copies import Copies, copy_experts, read_loads
from scmoe_ds.inference.dropping import Dropped, Dropping, drop_experts
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.inference.low_precision import Attached, use_low_precision
from scmoe_ds.inference.offload import Offloading
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.parallel.agreement import from_rank_zero, run_on_rank_zero, run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.checks import flag_of, require_same_flags
from scmoe_ds.programs.flags.tokenizer import named_tokenizer


def check_experts_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags of `add_experts` that do not go together or that this machine cannot serve."""
    for name in ("expert_cache", "expert_tier"):
        if args.experts == "resident" and getattr(args, name) is not None:
            raise ArgumentError(
                f"{flag_of(name)} goes with --experts offload or offload-async: resident experts are all on the device"
            )
    if args.expert_tier == "host" and device().type != "cuda":
        raise ArgumentError("--expert-tier host: is memory beside a GPU, and there is none here; leave the flag out")


def check_low_precision_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags of `add_low_precision` that do not go with others."""
    if args.low_precision == "off":
        return
    if getattr(args, "experts", "resident") != "resident":
        raise ArgumentError(
            f"--low-precision {args.low_precision} goes with --experts resident: offloaded experts are computed as "
            "they arrive"
        )
    if args.low_precision == "hot" and args.moe_expert_parallel_size == 1:
        raise ArgumentError(
            "--low-precision hot: a rank with all experts is never overloaded; give --moe-expert-parallel-size, or "
            "use all"
        )


def low_precision_of(args: argparse.Namespace, loaded: Loaded) -> Attached | None:
    """What the flags of `add_low_precision` say, done to the model; None: they leave it off. Collective.

    Raises:
        ArgumentError: the device has no such format, or the model no such experts.
    """
    if args.low_precision == "off":
        return None
    bounds = args.low_precision_score, args.low_precision_share
    settings = LowPrecision(args.low_precision, *bounds, min_tokens=args.low_precision_min_tokens)
    return run_together(lambda: use_low_precision(loaded.model, settings))


def check_dropping_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags of `add_dropping` that do not go together."""
    for name in ("drop_rate", "drop_method", "drop_load_aware"):
        if args.no_drop and getattr(args, name):
            raise ArgumentError(f"--no-drop computes all: remove it, or {flag_of(name)}")


def dropping_of(args: argparse.Namespace, loaded: Loaded) -> Dropped | None:
    """What the flags of `add_dropping` leave out of a loaded model; None: nothing. Collective.

    Raises:
        ArgumentError, CheckpointError: what a user can correct.
    """
    if args.no_drop:
        return None
    asked = Dropping(args.drop_rate, args.drop_method, args.drop_load_aware)
    found = drop_experts(loaded, None if asked == Dropping() else asked)
    if found is not None and dist.get_rank() == 0:
        print(f"{found} (--no-drop computes all)", file=sys.stderr)
    return found


def copies_of(args: argparse.Namespace, loaded: Loaded) -> Copies | None:
    """The copies of hot experts that the flags of `add_copies` ask for, behind all else that changes a layer; None:
    neither copies nor loads. Collective.

    Raises:
        ArgumentError: what a user can correct.
    """
    if args.expert_loads is not None and not args.expert_copies:
        raise ArgumentError("--expert-loads goes with --expert-copies: say how many copies a rank shall keep")
    if not args.expert_copies and args.save_expert_loads is None:
        return None
    loads = None if args.expert_loads is None else from_rank_zero(lambda: read_loads(args.expert_loads))
    return copy_experts(loaded.model, args.expert_copies, loads)


def load(args: argparse.Namespace) -> Loaded:
    """What the flags of `add_model`, and if there are any those of `add_experts`, name. Collective.

    Raises:
        ArgumentError, CheckpointError, DataError, ScMoEConfigError: what a user can correct.
    """
    require_same_flags(args)
    mode = getattr(args, "experts", "resident")
    return load_trained(
        args.load,
        dtype=args.dtype,
        tokenizer=run_together(lambda: named_tokenizer(args)),
        layout=Layout(
            dist.get_world_size(),
            args.tensor_model_parallel_size,
            args.moe_expert_parallel_size,
            args.enable_expert_tensor_parallelism,
        ),
        offloading=None if mode == "resident" else Offloading(mode, args.expert_cache, args.expert_tier),
    )


def tell_copies(args: argparse.Namespace, copies: Copies | None) -> None:
    """What copies of hot experts brought, on rank 0's standard error, and the loads in their file. Collective."""
    if copies is not None and args.expert_copies and dist.get_rank() == 0:
        print(copies.summary(), file=sys.stderr)
    if copies is not None and args.save_expert_loads is not None:
        run_on_rank_zero(lambda: copies.save(args.save_expert_loads))
