"""Pretrains a GPT with ScMoE layers: arguments → data → model → engine → loop.

deepspeed pretrain_gpt_scmoe.py --deepspeed_config ds_configs/gpt_small_cpu.json --num-layers 4 …
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.utils.data import Subset

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.analysis.gating_monitor import GatingMonitor
from scmoe_ds.checkpoint.tokenizer_files import carried_files, describe, record
from scmoe_ds.config.deepspeed_settings import check_accelerator
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.dataset import (
    Datasets,
    DataSettings,
    build_datasets,
    identify_paths,
    training_sizes,
    validation_entropy,
)
from scmoe_ds.data.default_corpus import prepare_default_corpus
from scmoe_ds.data.splits import split_shares
from scmoe_ds.data.tokenizer import Tokenizer, pad_vocab_size
from scmoe_ds.errors import ArgumentError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import fingerprint, require_agreement, run_on_rank_zero, run_together
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.flags.data import SPLIT_FLAGS
from scmoe_ds.programs.flags.gpt import gpt_settings, parse_arguments
from scmoe_ds.programs.flags.parser import started_as
from scmoe_ds.programs.flags.tokenizer import tokenizer_of
from scmoe_ds.programs.flags.training import training_settings
from scmoe_ds.programs.run import run_program
from scmoe_ds.training.adapted_start import (
    convert_as_saved,
    first_batches,
    own_checkpoint,
    put_source,
    validate_first,
    with_base,
)
from scmoe_ds.training.distillation import distil, needs_source, teacher_of
from scmoe_ds.training.loop import Trainer
from scmoe_ds.training.settings import Summary, TrainingSettings
from scmoe_ds.training.start_text import TrainingData, announce
from scmoe_ds.training.step_text import number, rounded


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training job; returns the exit code."""
    return run_program(started_as("pretrain_gpt_scmoe.py"), argv, pretrain, parse_arguments, stdout_is_log=True)


def pretrain(args: argparse.Namespace, loaded: LoadedConfig) -> Summary:
    """One training job in a process group that exists."""
    whole, ranks = loaded.whole, dist.get_world_size()
    require_same_flags(args, whole)
    check_accelerator(whole)
    given = loaded.in_world(ranks, args.tensor_model_parallel_size)
    tensor.start_tensor_parallel(args.tensor_model_parallel_size)
    replicas = tensor.data_parallel_size()
    settings = training_settings(args, whole, replicas, args.seq_length)
    tokenizer = tokenizer_of(args)
    shape = gpt_settings(args, pad_vocab_size(tokenizer.vocab_size, args.make_vocab_size_divisible_by))
    own = own_checkpoint(args, given.section)
    loaded = run_together(lambda: with_base(given, shape, describe(tokenizer), own))
    config = loaded.section
    require_agreement("scmoe.adapt", str(config.adapt))
    data = data_settings(args, tokenizer)
    carried = run_on_rank_zero(lambda: carried_files(tokenizer)) if args.save else None
    train_data, valid_data = identify_paths(data)
    run = checkpoint.run_settings(
        whole,
        settings.micro_batch_size,
        settings.accumulation_steps,
        replicas,
        train_data,
        seed=args.seed,
        split=split_shares(args.split) if args.split else None,
        seq_length=args.seq_length,
        train_iters=args.train_iters,
        valid_data_path=valid_data,
    )
    description = checkpoint.describe(shape, config, ranks, whole, run | (teacher := teacher_of(config, own)))
    description["tokenizer"] = record(describe(tokenizer), carried or {})
    if args.save:
        checkpoint.claim(args.save)
    source = checkpoint.choose(args.load, args.save, args.auto_resume, description)
    datasets = load_data(args, settings, data, replicas, source)

    model = build_model(shape, config, args)
    engine, *_ = scmoe_ds.initialize(model=model, config=loaded)

    if is_adapted := config.adapt is not None and config.adapt.source is not None:
        made_of = taught(args, tokenizer, train_data["content"]) | teacher
        start_adapted(args, engine, config, source, datasets.train, settings, made_of)
    iteration, consumed_samples = checkpoint.load(engine, source)
    convert_as_saved(model, iteration)
    if args.log_gating_interval:
        GatingMonitor(engine, args.log_gating_interval)
    trainer = Trainer(
        engine, datasets.train, datasets.valid, settings, description, iteration, consumed_samples, carried
    )
    announce(trainer, loaded, TrainingData(train_data["shown"], training_sizes(datasets.train)))
    if is_adapted and source is None:
        validate_first(trainer)
    summary = trainer.run()
    test_loss = None
    if datasets.test is not None and summary.iteration >= args.train_iters:
        test_loss = trainer.evaluate(datasets.test)
    if dist.get_rank() == 0:
        report(summary, datasets, test_loss)
    return summary


def start_adapted(
    args: argparse.Namespace,
    engine: Any,
    config: ScMoEConfig,
    source: checkpoint.Source | None,
    train: Any,
    settings: TrainingSettings,
    made_of: Mapping[str, Any],
) -> None:
    """The weights of `adapt.source`, and the teacher that it is, before the run's own checkpoint is loaded.

    Collective.
    """
    size, per_iteration = settings.micro_batch_size, settings.rank_batch_size * tensor.data_parallel_size()
    samples = checkpoint.samples_of_run(source, args.train_iters, per_iteration)  # a data set has whole epochs
    if source is None or needs_source(config, samples, size, made_of):
        put_source(engine, config, partial(first_batches, train, size))
    distil(engine, config, Subset(train, range(samples)), size, made_of)


def taught(args: argparse.Namespace, tokenizer: Tokenizer, corpus: Sequence[str]) -> dict[str, Any]:
    """What the teacher reads: a run that reads its logits from disk must read the same."""
    return {
        "the corpus": corpus,
        "the tokenizer": fingerprint(describe(tokenizer)["identity"]),
        "--seq-length": args.seq_length,
        "--seed": args.seed,
        "--split": split_shares(args.split) if args.split else None,
    }


def build_model(shape: GPTSettings, config: ScMoEConfig, args: argparse.Namespace) -> GPT:
    """This rank's part of the model, with weights that depend on the seed alone.

    Raises:
        ArgumentError: sizes that the tensor-parallel ranks do not divide.
    """
    try:
        model = GPT(shape, config, args.seq_length, tensor.tensor_parallel_group(), args.recompute_granularity)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    initialize_parameters(model, args.seed, shape.init_method_std, shape.num_layers)
    return model


def data_settings(args: argparse.Namespace, tokenizer: Tokenizer) -> DataSettings:
    """What the flags say of the data; without any of them, the default corpus, which is made if need be."""
    common = (args.seq_length, args.seed, tokenizer, args.data_cache_path)
    if args.train_data_path:
        paths = tuple(tuple(getattr(args, name) or ()) for name in SPLIT_FLAGS)
        return DataSettings((), None, *common, data_paths=paths)
    prefixes = args.data_path or [run_together(lambda: prepare_default_corpus(args.corpus_dir))]
    return DataSettings(tuple(prefixes), args.split, *common)


def load_data(
    args: argparse.Namespace,
    settings: TrainingSettings,
    data: DataSettings,
    replicas: int,
    source: checkpoint.Source | None,
) -> Datasets:
    """Training samples for the whole run, validation samples for one validation, and as many of --test-data-path; the
    same on every rank."""
    per_iteration = settings.rank_batch_size * replicas
    per_evaluation = args.eval_iters * settings.micro_batch_size * replicas
    validation = per_evaluation if data.has_split(1) else 0
    test = per_evaluation if args.test_data_path else 0
    if not validation and dist.get_rank() == 0:
        reason = f"--split {args.split} leaves no share for it" if args.split else "--valid-data-path is not given"
        print(f"no validation: {reason if args.eval_iters else '--eval-iters 0'}", flush=True)
    training = checkpoint.samples_of_run(source, args.train_iters, per_iteration)
    datasets = build_datasets(data, training, validation, test)
    sizes = [len(part) if part is not None else 0 for part in (datasets.train, datasets.valid, datasets.test)]
    require_agreement("the number of samples in the data", sizes)
    return datasets


def report(summary: Summary, datasets: Datasets, test_loss: float | None) -> None:
    """The last lines of a run."""
    loss = summary.validation_loss
    speed = f": {rounded(summary.tokens_per_second)} tokens per second" if summary.tokens_per_second else ""
    print(f"finished at iteration {summary.iteration}{speed}")
    if loss is not None:
        entropy = validation_entropy(datasets.valid)
        alone = (
            "" if entropy is None else f"; unigram entropy {number(entropy)} nats (from how often each token occurs)"
        )
        print(f"  validation loss {number(loss)} nats per token, perplexity {number(math.exp(min(loss, 700)))}{alone}")
    if test_loss is not None:
        print(f"  test loss {number(test_loss)} nats per token")
    if summary.checkpoint is None:
        print("  no checkpoint: --save was not given, or nothing was left to train")


if __name__ == "__main__":
    sys.exit(main())
