"""Makes a trained MoE model a ScMoE: the same weights, and routed experts that read a preceding layer.

scmoe adapt checkpoints/top2 --output scmoe --position pos2 --join late
scmoe adapt checkpoints/top2 --output partly --layers 0 --shared-expert busiest --text-file book.txt
scmoe adapt models/qwen3_moe --output models/qwen3_scmoe --text-file book.txt  # of Hugging Face
scmoe adapt checkpoints/top2 --measure book.txt --calibration times.json
scmoe adapt report checkpoints/scmoe --teacher-run checkpoints/top2 --output-prefix report
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.analysis.tokens import TokenSequences
from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint.adapted.source import is_hugging_face
from scmoe_ds.checkpoint.export import write_export
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.load import load_trained, trained_tokenizer
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.process import device
from scmoe_ds.programs import adapt_hugging_face
from scmoe_ds.programs.adapt_measure import measured
from scmoe_ds.programs.adapt_report import write_report
from scmoe_ds.programs.adapt_sources import asked_ways, gpt_source, possible
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.adapt import build_parser, check
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.run import run_program
from scmoe_ds.training.expert_counts import busiest_experts
from scmoe_ds.training.expert_fit import fit_shared_experts

FIELDS = ("position", "first_layer_position", "merge", "join", "top_k", "shortcut_norm")
"""Flags that are fields of the "scmoe" section, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Adapts; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.command == "report":
        return run_alone("scmoe adapt report", lambda: write_report(args), argv)

    def parse(_: Sequence[str] | None) -> tuple[argparse.Namespace]:
        check(args)
        return (args,)

    return run_program("scmoe adapt", argv, adapt, parse)


def adapt(args: argparse.Namespace) -> None:
    """One job in a process group of one, or of several that measure."""
    require_same_flags(args)
    if dist.get_world_size() > 1 and (args.measure is None or args.output is not None or is_hugging_face(args.source)):
        raise ArgumentError(
            "scmoe adapt runs in one process: start it without a launcher; several ranks are for --measure of a GPT of "
            "this package, without --output, whose pairs they time"
        )
    if is_hugging_face(args.source):
        adapt_hugging_face.adapt(args, _changes(args))
        return
    _check_of_gpt(args)
    source = SourceModel.open(args.source)
    busiest = None
    if args.shared_expert is not None and source.has_shared_expert:
        raise ArgumentError(f"--shared-expert {args.shared_expert}: {args.source} has shared experts, which are kept")
    _check_student(args, source)
    if args.shared_expert == "busiest":
        busiest = _busiest(args)
        print(f"busiest experts of MoE layer 0, 1, …: {', '.join(map(str, busiest))}")
    if args.measure is not None and not measured(args, gpt_source(args, source, _changes(args), busiest)):
        return
    config = source.student(_changes(args), args.layers)
    description = {**source.description, **fields.describe_model(source.settings, config)}
    fitted = _fitted(args, source, config) if args.shared_expert == "fit" else None
    weights, dtype = source.surgery(config, busiest, fitted), DTYPES[args.dtype or "fp32"]
    shards = write_export(args.output, weights, description, dtype, int(args.shard_gb * 10**9), args.format == "hf")
    print(f"wrote {args.output} of {source.weights.path} ({shards} file(s) of weights): {_text(source, config)}")
    print(f"train it: scmoe pretrain --load {args.output} …")


def _check_of_gpt(args: argparse.Namespace) -> None:
    if args.experts is not None:
        raise ArgumentError(f"--experts {args.experts}: is for dense models of Hugging Face; remove it")
    if args.shared_expert == "none":
        raise ArgumentError(
            "--shared-expert none: a ScMoE of this package has a shared expert; use mean, busiest or fit"
        )
    if args.text_file is not None and args.shared_expert not in ("busiest", "fit"):
        raise ArgumentError(f"--text-file {args.text_file}: is for --shared-expert busiest or fit; give both, or none")


def _check_student(args: argparse.Namespace, source: SourceModel) -> None:
    """Before text and model are read. Raises a ScMoEConfigError or CheckpointError if no student can be made."""
    if args.measure is None:
        source.student(_changes(args), args.layers)
    else:
        possible(asked_ways(args), lambda way: source.student({**_changes(args), **dataclasses.asdict(way)}))


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in FIELDS if (value := getattr(args, name)) is not None}


def _busiest(args: argparse.Namespace) -> list[int]:
    loaded = load_trained(args.source)
    return busiest_experts(loaded.model, _batches(args, loaded.trained.settings, loaded.tokenizer))


def _fitted(args: argparse.Namespace, source: SourceModel, config: ScMoEConfig) -> dict[str, Tensor]:
    config, trained = source.with_base(config), TrainedModel.open(args.source, contents=False)
    student = dataclasses.replace(trained, weights=source.surgery(config, fitted={}), config=config)
    model = load_model(student, serving_config(config), torch.float32, device())
    batches = _batches(args, source.settings, trained_tokenizer(args.source, trained, None))
    return fit_shared_experts(model, list(batches))


def _batches(args: argparse.Namespace, settings: GPTSettings, tokenizer: Tokenizer) -> Iterator[Tensor]:
    length = args.seq_length or settings.max_position_embeddings
    text = read_text(args.text_file, tokenizer, settings.vocab_size)
    sequences = TokenSequences(text.tokens, length, args.max_tokens, f"--text-file {args.text_file}")
    return (batch.to(device()) for batch in sequences.batches(args.batch_size))


def _text(source: SourceModel, config: ScMoEConfig) -> str:
    layers = config.moe_layers(source.settings.num_layers)
    number = sum(config.of_layer(layer).has_shortcut for layer in range(layers))
    return (
        f"{number} of {layers} MoE layers are ScMoE, {config.position}, top-{config.top_k}, merge {config.merge}, "
        f"join {config.join}"
    )


if __name__ == "__main__":
    sys.exit(main())
