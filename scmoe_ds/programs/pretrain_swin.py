"""Trains a SwinV2-MoE with ScMoE layers: arguments → images → model → engine → loop.

deepspeed --module scmoe_ds.programs.pretrain_swin --preset swin-digits \\
    --deepspeed_config ds_configs/swin_digits_cpu.json --train-iters 300
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.config.deepspeed_settings import check_accelerator
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.data.images import Epochs, ImageSets, Padded, load_images
from scmoe_ds.data.splits import split_shares
from scmoe_ds.models.swin import IGNORED, SwinMoE, initialize_swin
from scmoe_ds.parallel.agreement import require_agreement
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.flags.swin import parse_image_arguments, swin_settings
from scmoe_ds.programs.flags.training import training_settings
from scmoe_ds.programs.run import run_program
from scmoe_ds.training.images import ImageTrainer
from scmoe_ds.training.settings import Summary
from scmoe_ds.training.start_text import TrainingData, announce
from scmoe_ds.training.step_text import number, rounded


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training job; returns the exit code."""
    return run_program("scmoe pretrain-swin", argv, train, parse_image_arguments, stdout_is_log=True)


def train(args: argparse.Namespace, loaded: LoadedConfig) -> Summary:
    """One training job in a process group that exists."""
    whole, config = loaded.whole, loaded.section
    ranks = dist.get_world_size()
    require_same_flags(args, whole)
    check_accelerator(whole)
    config.check_world(ranks)
    shape = swin_settings(args)
    settings = training_settings(args, whole, ranks, seq_length=1)
    sets = load_images(
        args.data_path, args.dataset, shape.image_size, shape.num_channels, shape.num_classes, args.split, args.seed
    )
    check_agreement(sets)
    validation = None
    if sets.valid is not None and args.eval_iters:
        validation = Padded(sets.valid, settings.micro_batch_size * ranks, IGNORED)
    elif dist.get_rank() == 0:
        print(f"no validation: {sets.no_validation or '--eval-iters 0'}", flush=True)
    # --train-iters is not among them: the images' order does not depend on it.
    run = checkpoint.run_settings(
        whole,
        settings.micro_batch_size,
        settings.accumulation_steps,
        ranks,
        {"content": [sets.fingerprint], "shown": args.data_path or args.dataset},
        seed=args.seed,
        split=split_shares(args.split),
    )
    description = checkpoint.describe(shape, config, ranks, whole, run)
    if args.save:
        checkpoint.claim(args.save)
    source = checkpoint.choose(args.load, args.save, args.auto_resume, description)
    samples = checkpoint.samples_of_run(source, max(args.train_iters, 1), settings.rank_batch_size * ranks)
    training = Epochs(sets.train, samples, args.seed)

    model = SwinMoE(shape, config)
    initialize_swin(model, args.seed)
    engine, *_ = scmoe_ds.initialize(model=model, config=loaded)

    iteration, consumed_samples = checkpoint.load(engine, source)
    trainer = ImageTrainer(engine, training, validation, settings, description, iteration, consumed_samples)
    announce(trainer, loaded, TrainingData(args.data_path or args.dataset, [(1.0, len(sets.train))]))
    summary = trainer.run()
    if dist.get_rank() == 0:
        report(summary, trainer)
    return summary


def check_agreement(sets: ImageSets) -> None:
    """Ranks that saw other files would train on other labels, or wait for each other in the last step."""
    sizes = [len(part) if part is not None else 0 for part in (sets.train, sets.valid)]
    require_agreement("the images", [*sizes, list(sets.classes), sets.fingerprint])


def report(summary: Summary, trainer: ImageTrainer) -> None:
    """The last lines of a run."""
    speed = f": {rounded(summary.tokens_per_second)} images per second" if summary.tokens_per_second else ""
    print(f"finished at iteration {summary.iteration}{speed}")
    if summary.validation_loss is not None and trainer.log.accuracy is not None:
        print(
            f"  accuracy {100 * trainer.log.accuracy:.2f} % of the validation images, loss "
            f"{number(summary.validation_loss)} nats"
        )
    if summary.checkpoint is None:
        print("  no checkpoint: --save was not given, or nothing was left to train")


if __name__ == "__main__":
    sys.exit(main())
