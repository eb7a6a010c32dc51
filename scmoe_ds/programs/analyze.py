"""Analyses a trained GPT: similarity of representations, choices of gates, gradients, feasibility. One process.

scmoe analyze similarity --load checkpoints/gpt --data-path data/corpus_text_document \\
    --max-tokens 100000 --output similarity.json
scmoe analyze similarity --hf-model models/gpt2 --text-file book.txt --output gpt2.json
scmoe analyze gating --load checkpoints/gpt --all-checkpoints --text-file book.txt --output gating.json
scmoe analyze gradients --load checkpoints/scmoe --load checkpoints/top2 --text-file book.txt \\
    --output gradients.json
scmoe analyze similarity --load checkpoints/swin --images digits --output swin.json
scmoe analyze feasibility --similarity similarity.json --calibration times.json --output-prefix report
scmoe analyze similarity --from-json similarity.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from scmoe_ds.analysis import feasibility, gating, gradients, records, similarity, swin
from scmoe_ds.analysis.subjects import (
    Subject,
    gpt_subject,
    hugging_face_subject,
    open_hugging_face,
    swin_subject,
)
from scmoe_ds.analysis.tokens import TokenSequences, read_data_set
from scmoe_ds.checkpoint.files import iteration_of, newest_first
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ArgumentError, imports_of
from scmoe_ds.inference.load import Loaded, load_trained
from scmoe_ds.models.identity import identity
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.analysis import build_parser, check
from scmoe_ds.programs.flags.checks import flag_of
from scmoe_ds.programs.flags.tokenizer import named_tokenizer, tokenizer_of
from scmoe_ds.programs.run import run_program
from scmoe_ds.training.step_text import number


def main(argv: Sequence[str] | None = None) -> int:
    """Analyses; returns the exit code."""
    args = build_parser().parse_args(argv)
    # What reads records alone needs no process group, and DeepSpeed has nothing to compile for it.
    alone = _feasibility if args.analysis == "feasibility" else _redraw if args.from_json is not None else None
    if alone is not None:
        return run_alone("scmoe analyze", lambda: alone(args), argv)

    def parse(_: Sequence[str] | None) -> tuple[argparse.Namespace]:
        check(args)
        return (args,)

    return run_program("scmoe analyze", argv, analyze, parse)


def _redraw(args: argparse.Namespace) -> None:
    check(args)
    print(f"wrote {records.redraw(args.from_json, args.analysis)}", flush=True)


def _feasibility(args: argparse.Namespace) -> None:
    if missing := [name for name, value in vars(args).items() if value is None]:
        raise ArgumentError(f"{flag_of(missing[0])} is missing")
    record = feasibility.read_similarity(args.similarity)
    times = feasibility.read_times(args.calibration)
    feasibility.check_one_model(args.similarity, record["identity"], args.calibration, times.identity)
    kinds = [feasibility.study(*each) for each in times.kinds]
    with imports_of("plots", "the page's figure"):
        from scmoe_ds.analysis import feasibility_page  # matplotlib takes a second to import

    paths = feasibility_page.write(record, kinds, args.output_prefix)
    print(f"ScMoE {feasibility.conclude(kinds)[0]}", *(f"wrote {path}" for path in paths), sep="\n", flush=True)


def analyze(args: argparse.Namespace) -> None:
    """One job in a process group of one."""
    if dist.get_world_size() > 1:
        raise ArgumentError("an analysis runs in one process: start it as scmoe analyze, without a launcher")
    found, lines = _ANALYSES[args.analysis](args)
    for line in lines:
        print(line, flush=True)
    for path in records.save({**records.heading(args.analysis), **found}, args.output):
        print(f"wrote {path}", flush=True)


def _open(args: argparse.Namespace, path: str) -> Loaded:
    return load_trained(path, dtype=args.dtype, tokenizer=named_tokenizer(args))


def _similarity(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if args.images is not None:
        return _similarity_of_images(args)
    if args.hf_model is not None:
        model = open_hugging_face(args.hf_model, args.dtype, device())
        subject, name, tokenizer = hugging_face_subject(model, args.moe_every), args.hf_model, None
    else:
        loaded = _open(args, args.load)
        model, name, tokenizer = loaded.model, str(loaded.trained.path), loaded.tokenizer
        subject = gpt_subject(model, args.moe_every)
    sequences = _sequences(args, subject, tokenizer)
    found = similarity.measure(subject, sequences.batches(args.batch_size))
    verdict = similarity.verdict(found, subject.moe_blocks, subject.distance, subject.trained)
    record = {"model": name, "identity": _identity(model, subject), "seq_length": sequences.seq_length}
    return {**record, **found.record(), "verdict": verdict}, verdict["text"]


def _identity(model: Any, subject: Subject) -> dict[str, Any]:
    """Of the model with an MoE where the analysis supposes one."""
    blocks = [block for _, block in subject.moe_blocks]
    found = identity(model)
    if found.get("moe_blocks", blocks) != blocks:  # --moe-every: it says nothing of the experts there
        found.pop("num_experts", None)
    return {**found, "moe_blocks": blocks}


def _similarity_of_images(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if args.hf_model is not None:
        model, name = swin.open_hugging_face_swin(args.hf_model, device()), args.hf_model
    else:
        model, name = swin.open_swin(args.load, device()), args.load
    subject = swin_subject(model)
    found = similarity.measure(subject, swin.image_batches(args.images, model, args.batch_size, args.max_images))
    verdict = similarity.verdict(found, subject.moe_blocks)
    return {"model": name, "identity": identity(model), **found.record(), "verdict": verdict}, verdict["text"]


def _gating(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    checkpoints = [_gating_of(args, path) for path in _checkpoints(args, args.load)]
    lines = [_gating_line(Path(each["model"]).name, layer) for each in checkpoints for layer in each["layers"]]
    return {"model": args.load, "batch_size": args.batch_size, "checkpoints": checkpoints}, lines


def _checkpoints(args: argparse.Namespace, load: str) -> list[str]:
    """What a --load stands for: with --all-checkpoints, the oldest one first."""
    if not args.all_checkpoints:
        return [load]
    tags = newest_first(Path(load))
    if not tags:
        raise ArgumentError(f"--all-checkpoints: there is no global_step* in --load {load}")
    return [str(Path(load) / tag) for tag in reversed(tags)]


def _gating_of(args: argparse.Namespace, path: str) -> dict[str, Any]:
    loaded = _open(args, path)
    trained, subject = loaded.trained, gpt_subject(loaded.model)
    sequences = _sequences(args, subject, loaded.tokenizer)
    layers = gating.measure(loaded.model, trained.config, subject.run, sequences.batches(args.batch_size))
    return {
        "model": str(trained.path),
        "iteration": iteration_of(trained.path.name),
        **_architecture(trained.config),
        "capacity_factor": trained.config.capacity_factor if trained.config.drop_tokens else None,
        "seq_length": sequences.seq_length,
        "tokens": len(sequences) * sequences.seq_length,
        "layers": layers,
    }


def _gating_line(name: str, layer: dict[str, Any]) -> str:
    return (
        f"{name}, MoE of block {layer['block']} ({layer['preceding']} / {layer['current']}): same expert "
        f"{100 * layer['same_expert_share']:.1f} %, L2 distance {layer['l2']:.3f}, cosine {layer['cosine']:.3f}, "
        f"scores {layer['preceding_score']:.3f} / {layer['current_score']:.3f}, busiest expert "
        f"{layer['load_max_over_mean']:.2f} × the mean, dropped {100 * layer['drop_rate']:.1f} %"
    )


def _architecture(config: ScMoEConfig) -> dict[str, Any]:
    return {"architecture": config.architecture, "position": config.position if config.has_shortcut else None}


def _gradients(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    checkpoints = [_gradients_of(args, load, path) for load in args.load for path in _checkpoints(args, load)]
    lines = [
        f"{each['label']}{_at(each['iteration'])}: {name}: gradient norm {number(branch['norm'])}, "
        "signal-to-noise ratio " + ("none" if branch["snr"] is None else f"{branch['snr']:.3g}")
        for each in checkpoints
        for name, branch in each["branches"].items()
    ]
    lines.append(f"noise alone would have a ratio of about {checkpoints[0]['noise_floor']:.3g}")
    return {"batch_size": args.batch_size, "checkpoints": checkpoints}, lines


def _at(iteration: int | None) -> str:
    return "" if iteration is None else f" at iteration {iteration}"


def _gradients_of(args: argparse.Namespace, load: str, path: str) -> dict[str, Any]:
    loaded = _open(args, path)
    architecture = _architecture(loaded.trained.config)
    sequences = _sequences(args, gpt_subject(loaded.model), loaded.tokenizer)
    found = gradients.measure(loaded.model, sequences.labelled_batches(args.batch_size, args.micro_batches))
    late = "late join" if loaded.trained.config.join == "late" else None
    label = f"{load} ({' '.join(filter(None, [*architecture.values(), late]))})"
    return {
        "model": str(loaded.trained.path),
        "iteration": iteration_of(loaded.trained.path.name),
        "label": label,
        **architecture,
        "seq_length": sequences.seq_length,
        **found,
    }


def _sequences(args: argparse.Namespace, subject: Subject, tokenizer: Tokenizer | None) -> TokenSequences:
    context, vocab_size = subject.context, subject.vocab_size
    length = args.seq_length or context
    if length is None:
        raise ArgumentError("--seq-length is missing: the model does not say how long its context is")
    if context is not None and length > context:
        raise ArgumentError(f"--seq-length {length} exceeds the model's context of {context} tokens; give at most that")
    tokens: np.ndarray
    if args.data_path is not None:
        tokens, source = read_data_set(args.data_path, args.split, vocab_size), f"--data-path {args.data_path}"
        if args.split is not None:
            source = f"the validation part of --split {args.split} of {source}"
    else:
        tokenizer = tokenizer or tokenizer_of(args)
        tokens, source = read_text(args.text_file, tokenizer, vocab_size).tokens, f"--text-file {args.text_file}"
    return TokenSequences(tokens, length, getattr(args, "max_tokens", None), source)


_ANALYSES = {"similarity": _similarity, "gating": _gating, "gradients": _gradients}


if __name__ == "__main__":
    sys.exit(main())
