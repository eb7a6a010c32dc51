"""Flags of the programs that load a trained model, and the way from them to this rank's part of it."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from dataclasses import dataclass

import torch.distributed as dist

from scmoe_ds.checkpoint import tokenizer_files
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import MODES, expert_bytes, num_experts, offload_experts
from scmoe_ds.inference.store import ExpertStore
from scmoe_ds.models.gpt import GPT
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import fingerprint, require_agreement, run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.checks import check_lowest, check_minutes
from scmoe_ds.programs.flags.gpt import comparable

logger = logging.getLogger("scmoe_ds")


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
    group.add_argument("--enable-expert-tensor-parallelism", action="store_true")
    group.add_argument(
        "--distributed-timeout-minutes", type=float, default=10.0, help="end the job when a collective takes longer"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def add_tokenizer(group: argparse._ArgumentGroup, default: str) -> None:
    """Flags that name a tokenizer."""
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help=f"default: {default}")
    group.add_argument("--tokenizer-model", help="local directory of a Hugging Face tokenizer")
    group.add_argument("--vocab-file", help="vocab.json of GPT-2's BPE")
    group.add_argument("--merge-file", help="merges.txt of GPT-2's BPE")


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
    group.add_argument("--expert-tier", choices=["host", "disk"], help="where they come from; default: host for a GPU")


def check_model_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a flag of `add_model` that is out of range."""
    check_lowest(args, 1, ("moe_expert_parallel_size", "tensor_model_parallel_size"))
    check_minutes(args, ("distributed_timeout_minutes",))


def check_experts_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags of `add_experts` that do not go together or that this machine cannot serve."""
    for name in ("expert_cache", "expert_tier"):
        if args.experts == "resident" and getattr(args, name) is not None:
            raise ArgumentError(
                f"--{name.replace('_', '-')} goes with --experts offload or offload-async: resident "
                "experts are all on the device"
            )
    if args.expert_tier == "host" and device().type != "cuda":
        raise ArgumentError("--expert-tier host: is memory beside a GPU, and there is none here; leave the flag out")


@dataclass(frozen=True)
class Loaded:
    """This rank's part of a trained model, and what goes with it.

    Attributes:
        trained: the checkpoint.
        model: in evaluation mode.
        config: under which it runs.
        layout: of the ranks.
        tokenizer: whose vocabulary fits.
        store: of offloaded experts.
    """

    trained: TrainedModel
    model: GPT
    config: ScMoEConfig
    layout: Layout
    tokenizer: Tokenizer
    store: ExpertStore | None


def load(args: argparse.Namespace) -> Loaded:
    """What the flags of `add_model`, and if there are any those of `add_experts`, name. Collective.

    Raises:
        ArgumentError, CheckpointError, DataError, ScMoEConfigError: what a user can mend.
    """
    ranks, holders = dist.get_world_size(), args.tensor_model_parallel_size
    require_agreement("the command line", fingerprint(comparable(args)))
    if ranks % holders:
        raise ArgumentError(f"--tensor-model-parallel-size {holders}: must divide the number of processes, {ranks}")
    # Experts that stay in their files are not read before they are needed.
    resident = getattr(args, "experts", "resident") == "resident"
    trained = run_together(lambda: TrainedModel.open(args.load, contents=resident))
    assert trained is not None
    if dist.get_rank() == 0:
        print(f"loading {trained.path}", file=sys.stderr)
    config = serving_config(trained.config, args.moe_expert_parallel_size, args.enable_expert_tensor_parallelism)
    config.check_world(ranks, holders)
    tokenizer = run_together(lambda: _tokenizer(args, trained))
    assert tokenizer is not None
    tensor.start_tensor_parallel(holders)
    try:
        model, store = _load_model(args, trained, config)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    layout = Layout(ranks, holders, config.expert_parallel_size, config.expert_tensor_parallelism)
    return Loaded(trained, model, config, layout, tokenizer, store)


def _tokenizer(args: argparse.Namespace, trained: TrainedModel) -> Tokenizer:
    """The tokenizer that the checkpoint records; one that the flags name must be the same."""
    if args.tokenizer_type is None and trained.tokenizer is not None:
        for name in ("tokenizer_model", "vocab_file", "merge_file"):
            if getattr(args, name) is not None:
                raise ArgumentError(
                    f"--{name.replace('_', '-')} goes with a --tokenizer-type: name it, or leave both "
                    "out for the tokenizer that the checkpoint records"
                )
        tokenizer = tokenizer_files.recorded_tokenizer(trained.path, trained.tokenizer, "--load")
    else:
        tokenizer = _named_tokenizer(args, trained)
    size = trained.settings.vocab_size
    if tokenizer.vocab_size > size:
        raise ArgumentError(
            f"--tokenizer-type {tokenizer.name} has {tokenizer.vocab_size} tokens, the model of "
            f"--load {args.load} {size}: name the tokenizer that it was trained with"
        )
    return tokenizer


def _named_tokenizer(args: argparse.Namespace, trained: TrainedModel) -> Tokenizer:
    if args.tokenizer_type is None and dist.get_rank() == 0:
        print(
            f"--load {args.load} does not record its tokenizer: ByteTokenizer is used; name another with "
            "--tokenizer-type and its files",
            file=sys.stderr,
        )
    tokenizer = build_tokenizer(
        args.tokenizer_type or "ByteTokenizer",
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
    )
    if trained.tokenizer is not None:
        described = tokenizer_files.describe(tokenizer)
        tokenizer_files.check_same(trained.path, trained.tokenizer, described, "--load", "the tokenizer of the flags")
    return tokenizer


def _load_model(args: argparse.Namespace, trained: TrainedModel, config: ScMoEConfig) -> tuple[GPT, ExpertStore | None]:
    dtype, mode = DTYPES[args.dtype or trained.dtype], getattr(args, "experts", "resident")
    if mode == "resident":
        return load_model(trained, config, dtype, device()), None
    stores: list[ExpertStore] = []

    def offload(model: GPT) -> None:
        places, experts = 2 * int(config.top_k), num_experts(model)
        if args.expert_cache is not None:
            places = expert_places(args.expert_cache, expert_bytes(model, dtype))
        if places > experts and args.expert_cache is not None and dist.get_rank() == 0:
            logger.info(
                f"--expert-cache {args.expert_cache}: has room for {places} experts, this rank has {experts}: "
                "all of them stay on the device"
            )
        places = min(places, experts)
        stores.append(offload_experts(model, trained, mode, places, dtype, device(), args.expert_tier))

    model = load_model(trained, config, dtype, device(), offload)
    return model, stores[0]


def expert_places(text: str, each_bytes: int) -> int:
    """How many experts --expert-cache has room for.

    Raises:
        ArgumentError: neither a number nor a size, or no room for one.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(i?)B", text, re.ASCII | re.IGNORECASE)
    if match:
        unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
        places = int(float(match[1]) * unit / each_bytes)
    elif re.fullmatch(r"\d{1,20}", text, re.ASCII):
        places = int(text)
    else:
        raise ArgumentError(f"--expert-cache {text[:40]}: must be a number of experts, or a size such as 500MB or 2GB")
    if places < 1:
        raise ArgumentError(f"--expert-cache {text}: has no room for one expert, which takes {each_bytes} bytes")
    return places
