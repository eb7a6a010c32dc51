"""Calibrates on text what a trained MoE model can leave out, and writes it with sorted neurons (DualSparse-MoE).

scmoe sparsify --load checkpoints/gpt --text-file book.txt --rate 0.25 --output sparse
scmoe evaluate --load sparse --text-file wikitext.test.tokens --drop-rate 0.25
scmoe sparsify --load models/qwen3_moe --text-file book.txt --measure abs-gate-up --output sparse_qwen  # Hugging Face
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from scmoe_ds.analysis.tokens import TokenSequences
from scmoe_ds.checkpoint.adapted.family import is_adapted
from scmoe_ds.checkpoint.adapted.source import config_of, is_hugging_face
from scmoe_ds.checkpoint.adapted.text import trained_model
from scmoe_ds.checkpoint.autoep.loading import empty_model
from scmoe_ds.checkpoint.export import open_weights, write_export
from scmoe_ds.checkpoint.finished import finished
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import Tokenizer, build_tokenizer
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.inference.load import load_trained
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.sparsify import build_parser, check
from scmoe_ds.programs.flags.tokenizer import named_tokenizer
from scmoe_ds.programs.run import run_program
from scmoe_ds.sparse.calibration import CalibratedLayer, read_calibration_text, sparsity_of
from scmoe_ds.sparse.hugging_face_layers import fused_layers, write_directory
from scmoe_ds.sparse.importance import LayerSums, check_halves, check_measure, unseen
from scmoe_ds.sparse.own_layers import SortedWeights, own_layers
from scmoe_ds.sparse.sparsity_file import METHODS, Sparsity, left_out

_LONGEST = 2048
"""Tokens of a sequence, where nobody says how many: whole contexts of today's models fill a memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates; returns the exit code."""
    return run_program("scmoe sparsify", argv, sparsify, parse)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace]:
    """The flags. Raises an ArgumentError for a setting that its user can correct."""
    args = build_parser().parse_args(argv)
    check(args)
    return (args,)


def sparsify(args: argparse.Namespace) -> None:
    """One job in a process group of one."""
    if dist.get_world_size() > 1:
        raise ArgumentError("scmoe sparsify runs in one process: start it without a launcher")
    if is_hugging_face(args.load):
        _hugging_face(args)
        follows = (
            f'from Python, attach_dropping(model, Sparsity.read(Path("{args.output}")), {args.rate:g}, "2t") drops '
            "(docs/sparse.md)"
        )
    else:
        _own(args)
        follows = f"scmoe evaluate --load {args.output} --drop-rate {args.rate:g} … measures what it costs"
    print(f"wrote {args.output}: {follows}")


def _own(args: argparse.Namespace) -> None:
    source = f"--load {args.load}"
    loaded = load_trained(args.load, dtype=args.dtype, tokenizer=named_tokenizer(args))
    # Before the long part, and without the checksums, which were just compared.
    weights, description = finished(*open_weights(loaded.trained.path, contents=False))
    layers = own_layers(loaded.model)
    if not layers:
        raise CheckpointError(f"{source}: has no MoE layer with two or more experts, so there is nothing to drop")
    settings = loaded.trained.settings

    def run(tokens: torch.Tensor) -> object:
        return loaded.model.hidden_states(tokens)

    batches = _Text(args, loaded.tokenizer, settings.vocab_size, settings.max_position_embeddings)
    sums, sparsity = _calibrated(args, layers, batches, run)
    order = {layer.name: own.order_EF(args.measure) for layer, own in zip(layers, sums, strict=True)}
    dtype = DTYPES[args.dtype or loaded.trained.dtype]
    write_export(args.output, SortedWeights(weights, order, settings.swiglu), description, dtype)
    sparsity.write(args.output)


def _hugging_face(args: argparse.Namespace) -> None:
    source = f"--load {args.load}"
    if is_adapted(config_of(args.load)):
        raise CheckpointError(f"{source}: is an adapted model; sparsify the one that it was made of, then adapt that")
    fused_layers(empty_model(args.load), source)  # before the weights are read
    model = trained_model(args.load).to(device=device(), dtype=DTYPES[args.dtype] if args.dtype else None)
    layers = fused_layers(model, source)
    tokenizer = named_tokenizer(args) or build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(args.load))

    def run(tokens: torch.Tensor) -> object:
        return model.base_model(tokens, use_cache=False)

    context = getattr(model.config, "max_position_embeddings", None)
    batches = _Text(args, tokenizer, model.config.vocab_size, context)
    sums, sparsity = _calibrated(args, layers, batches, run)
    for layer, own in zip(layers, sums, strict=True):
        layer.sort(own.order_EF(args.measure))
    write_directory(model, args.load, args.output, sparsity)


class _Text:
    """The calibration text.

    Args:
        args: flags that say how it is read.
        tokenizer, vocab_size, context: of the model; a context of None: it does not say.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int, context: int | None) -> None:
        length = args.seq_length or min(context or _LONGEST, _LONGEST)
        if context is not None and length > context:
            raise ArgumentError(
                f"--seq-length {length} exceeds the model's context of {context} tokens; give at most that"
            )
        self.source = f"--text-file {args.text_file}"
        tokens = read_text(args.text_file, tokenizer, vocab_size).tokens
        self._sequences = TokenSequences(tokens, length, args.max_tokens, self.source)
        self._batch_size = args.batch_size

    def __iter__(self) -> Any:
        return (batch.to(device()) for batch in self._sequences.batches(self._batch_size))


def _calibrated(
    args: argparse.Namespace,
    layers: Sequence[CalibratedLayer],
    text: _Text,
    run: Callable[[torch.Tensor], object],
) -> tuple[list[LayerSums], Sparsity]:
    for layer in layers:
        check_halves(layer.neurons, f"--load {args.load}, {layer.name}")
        check_measure(args.measure, layer.has_w3)
    sums, tokens = read_calibration_text(layers, text, run, text.source)
    sparsity = sparsity_of(layers, sums, tokens, args.measure, args.spread, args.rate)
    print(table(sparsity, sums, args.rate))
    if missing := unseen(sums):
        print(
            f"{missing} experts got no token of {args.text_file}, and keep their neurons as they are: read more text",
            file=sys.stderr,
        )
    return sums, sparsity


def table(sparsity: Sparsity, sums: Sequence[LayerSums], rate: float) -> str:
    """What the calibration has found, layer by layer; rates are counted on its text."""
    thresholds = [sparsity.thresholds(rate, method) for method in METHODS]
    rows = [
        f"{sparsity.tokens} tokens, neurons sorted by {sparsity.measure}, thresholds for a drop rate of {rate:.0%}",
        f"{'layer':30} {'T, 1T-Drop':>10} {'rate':>6} {'T, 2T-Drop':>16} {'rate':>6} {'major half holds':>17}",
    ]
    for number, (layer, own) in enumerate(zip(sparsity.layers, sums, strict=True)):
        one, two = (found[number] for found in thresholds)
        between, held = f"{two[0]:.4f} … {two[1]:.4f}", layer.major_share or 0.0
        rates = [left_out(own.criterion_N, *each) for each in (one, two)]
        rows.append(f"{layer.name:30} {one[0]:10.4f} {rates[0]:6.1%} {between:>16} {rates[1]:6.1%} {held:17.1%}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
