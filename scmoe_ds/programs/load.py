"""Loads the trained model that a program's flags name."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.inference.offload import Offloading
from scmoe_ds.parallel.agreement import run_together
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
