"""Flags of the programs that load a trained model."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.inference.offload import MODES, Offloading
from scmoe_ds.parallel.agreement import run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.checks import flag_of, require_same_flags
from scmoe_ds.programs.flags.tokenizer import add_tokenizer, named_tokenizer


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags that name a trained model, its tokenizer and its layout."""
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument(
        "--load",
        required=True,
        help="a checkpoint of pretrain_gpt_scmoe.py, a directory of them (its latest), or an export of scmoe convert",
    )
    group.add_argument("--dtype", choices=sorted(DTYPES), help="default: as it was trained or exported")
    add_tokenizer(group, "the one that the checkpoint records; ByteTokenizer where it records none")
    group = parser.add_argument_group("ranks", "started with the deepspeed launcher; alone, a process is all ranks")
    group.add_argument("--moe-expert-parallel-size", type=int, default=1, help="ranks that share one set of experts")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")
    group.add_argument(
        "--enable-expert-tensor-parallelism", action="store_true", help="divide each expert over these ranks"
    )
    group.add_argument(
        "--distributed-timeout-minutes", type=float, default=10.0, help="end the job when a collective takes longer"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Flags that keep routed experts out of the device's memory."""
    group = parser.add_argument_group("experts", "where the routed experts live")
    group.add_argument(
        "--experts",
        choices=MODES,
        default="resident",
        help="resident: on the device; offload: fetched "
        "when they are computed; offload-async: fetched as soon as the gate has chosen, while the "
        "backbone computes. They come from pinned host memory to a GPU, from the files of an export "
        "otherwise",
    )
    group.add_argument(
        "--expert-cache",
        help="experts that are kept on the device: a number, or a size such as 2GB, "
        "of all layers together; at most those that the model has on a rank. Default: twice the experts "
        "of a token",
    )
    group.add_argument(
        "--expert-tier",
        choices=["host", "disk"],
        help="where offloaded experts are kept; default: host beside a GPU, else disk",
    )


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
