"""Would this training run, and fit? One step of it without a GPU: scmoe_ds/check/ says how.

scmoe check --preset gpt2-moe-medium --deepspeed_config ds_configs/gpt2_moe_medium_16xA800.json --world-size 16
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from scmoe_ds.check.cards import card_of
from scmoe_ds.check.findings import as_json, lines, require_room
from scmoe_ds.check.step import Place, Subject, check_step
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.data.tokenizer import pad_vocab_size
from scmoe_ds.errors import ArgumentError, DataError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE, initialize_swin
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.check import parse_arguments
from scmoe_ds.programs.flags.gpt import gpt_settings
from scmoe_ds.programs.flags.swin import swin_settings
from scmoe_ds.programs.flags.tokenizer import tokenizer_of
from scmoe_ds.programs.pretrain_gpt import build_model
from scmoe_ds.programs.quiet import filter_prints_and_warnings
from scmoe_ds.training.adapted_start import own_checkpoint, with_base
from scmoe_ds.training.images import ImageTrainer
from scmoe_ds.training.loop import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Checks a training command; returns the exit code: 2 with one sentence if it would fail or does not fit."""
    return run_alone("scmoe check", lambda: check(argv), argv)


def check(argv: Sequence[str] | None = None) -> None:
    """Runs the step, prints what it found, and writes --json.

    Raises:
        UserError: it would fail on the device, or needs more memory than the card has.
    """
    filter_prints_and_warnings()
    args, loaded, images = parse_arguments(argv)
    if loaded.section.offload_experts is not None:
        raise ArgumentError(
            "scmoe.offload_experts: a check counts experts in the device's memory; remove it for the check"
        )
    if not images:
        loaded = with_base(loaded, _shape(args), None, own_checkpoint(args, loaded.section))
    place = Place(
        args.rank,
        args.world_size,
        args.gpus_per_node,
        getattr(args, "tensor_model_parallel_size", 1),
        card_of(args.card),
    )
    subject = _images(args, loaded) if images else _text(args, loaded)
    with _without_info():
        found = check_step(subject, loaded, place)
    print(*lines(found, place, args.deepspeed_config), sep="\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(found, place), indent=2) + "\n", "utf-8")
    require_room(found, place)


@contextmanager
def _without_info() -> Iterator[None]:
    """The log of a training that starts is no part of the findings."""
    logger = logging.getLogger("scmoe_ds")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _text(args: argparse.Namespace, loaded: LoadedConfig) -> Subject:
    shape = _shape(args)
    tokens = ((args.seq_length,), torch.int64)
    sample = {"tokens": tokens, "labels": tokens, "loss_mask": ((args.seq_length,), torch.float32)}
    return Subject(lambda: build_model(shape, loaded.section, args), Trainer, sample, args.seq_length)


def _shape(args: argparse.Namespace) -> GPTSettings:
    return gpt_settings(args, pad_vocab_size(_vocab_size(args), args.make_vocab_size_divisible_by))


def _vocab_size(args: argparse.Namespace) -> int:
    """Of the tokenizer, if its files are here; a check needs no more of it."""
    if args.vocab_size is not None:
        return int(args.vocab_size)
    try:
        return tokenizer_of(args).vocab_size
    except DataError as error:
        raise ArgumentError(f"{error}; --vocab-size N checks without the tokenizer's files") from None


def _images(args: argparse.Namespace, loaded: LoadedConfig) -> Subject:
    shape = swin_settings(args)

    def build() -> SwinMoE:
        model = SwinMoE(shape, loaded.section)
        initialize_swin(model, args.seed)
        return model

    pixels = (shape.num_channels, shape.image_size, shape.image_size)
    return Subject(build, ImageTrainer, {"images": (pixels, torch.float32), "labels": ((), torch.int64)}, 1)


if __name__ == "__main__":
    sys.exit(main())
