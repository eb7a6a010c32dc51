"""Flags of the programs that load a trained model, and the way from them to this rank's part of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scmoe_ds.argument_checks import ArgumentError, check_lowest
from scmoe_ds.arguments import comparable
from scmoe_ds.config import ScMoEConfig
from scmoe_ds.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from scmoe_ds.engine import device, fingerprint
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import require_agreement, run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.timeouts import set_timeouts


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags that name a trained model, its tokenizer and its layout."""
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument("--load", required=True, help="a checkpoint of pretrain_gpt_scmoe.py, a directory of them (its "
                       "latest), or an export of tools/convert_checkpoint.py")  # fmt: skip
    group.add_argument("--dtype", choices=sorted(DTYPES), help="default: as it was trained or exported")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="ByteTokenizer")
    group.add_argument("--tokenizer-model", help="local directory of a Hugging Face tokenizer")
    group.add_argument("--vocab-file", help="vocab.json of GPT-2's BPE")
    group.add_argument("--merge-file", help="merges.txt of GPT-2's BPE")
    group = parser.add_argument_group("ranks", "started with the deepspeed launcher; alone, a process is all ranks")
    group.add_argument("--moe-expert-parallel-size", type=int, default=1, help="ranks that share one set of experts")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer")
    group.add_argument("--enable-expert-tensor-parallelism", action="store_true")
    group.add_argument("--distributed-timeout-minutes", type=float, default=10.0,
                       help="end the job when a collective takes longer")  # fmt: skip
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")


def check_model_flags(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a flag of `add_model` that is out of range."""
    check_lowest(args, 1, ("moe_expert_parallel_size", "tensor_model_parallel_size"))
    if args.distributed_timeout_minutes <= 0:
        raise ArgumentError(f"--distributed-timeout-minutes {args.distributed_timeout_minutes}: must be above 0")


@dataclass(frozen=True)
class Loaded:
    """This rank's part of a trained model, and what goes with it.

    Attributes:
        trained: the checkpoint.
        model: in evaluation mode.
        config: under which it runs.
        layout: of the ranks.
        tokenizer: whose vocabulary fits.
    """

    trained: TrainedModel
    model: GPT
    config: ScMoEConfig
    layout: Layout
    tokenizer: Tokenizer


def load(args: argparse.Namespace, **options: Any) -> Loaded:
    """What the flags of `add_model` name. Collective.

    Args:
        options: handed to `load_model`.

    Raises:
        ArgumentError, CheckpointError, DataError, ScMoEConfigError: what a user can mend.
    """
    ranks, holders = dist.get_world_size(), args.tensor_model_parallel_size
    require_agreement("the command line", fingerprint(comparable(args)))
    if ranks % holders:
        raise ArgumentError(f"--tensor-model-parallel-size {holders}: must divide the number of processes, {ranks}")
    trained = run_together(lambda: TrainedModel.open(args.load))
    assert trained is not None
    config = serving_config(trained.config, args.moe_expert_parallel_size, args.enable_expert_tensor_parallelism)
    config.check_world(ranks, holders)
    tokenizer = build_tokenizer(args.tokenizer_type, tokenizer_model=args.tokenizer_model,
                                vocab_file=args.vocab_file, merge_file=args.merge_file)  # fmt: skip
    size = trained.settings.vocab_size
    if tokenizer.vocab_size > size:
        raise ArgumentError(f"--tokenizer-type {args.tokenizer_type} has {tokenizer.vocab_size} tokens, the model of "
                            f"--load {args.load} {size}: name the tokenizer that it was trained with")  # fmt: skip
    tensor.start(holders)
    try:
        model = load_model(trained, config, DTYPES[args.dtype or trained.dtype], device(), **options)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    set_timeouts(timedelta(minutes=args.distributed_timeout_minutes))
    layout = Layout(ranks, holders, config.expert_parallel_size, config.expert_tensor_parallelism)
    return Loaded(trained, model, config, layout, tokenizer)
