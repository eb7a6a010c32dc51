"""Evaluates a trained GPT: loss and perplexity of a text, or benchmarks of lm_eval.

scmoe evaluate --load checkpoints/gpt --data-path data/corpus_text_document --split 969,30,1
scmoe evaluate --load export --text-file wikitext.test.tokens --stride 256 --output wikitext.json
deepspeed --num_gpus 8 --module scmoe_ds.programs.evaluate --load export --moe-expert-parallel-size 8 \\
    --tasks hellaswag,piqa --include-path tasks
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ArgumentError, reason_of
from scmoe_ds.evaluation import tasks
from scmoe_ds.evaluation.documents import Documents, open_documents
from scmoe_ds.evaluation.dropping import compare
from scmoe_ds.evaluation.perplexity import evaluate_documents
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import SlidingWindow
from scmoe_ds.inference.dropping import Dropped
from scmoe_ds.inference.load import Loaded
from scmoe_ds.inference.model import calibrators
from scmoe_ds.parallel.agreement import run_on_rank_zero
from scmoe_ds.programs.flags.checks import check_output_file, flag_of
from scmoe_ds.programs.flags.evaluate import build_parser
from scmoe_ds.programs.load import check_flags, load
from scmoe_ds.programs.run import run_program

_LABELS = {"loss": "loss, nats per token"}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit code."""
    return run_program("scmoe evaluate", argv, evaluate, parse)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace]:
    """The flags.

    Raises:
        ArgumentError: a setting that its user can correct.
        SystemExit: argparse's own findings, and --help.
    """
    args = build_parser().parse_args(argv)
    check_flags(args)
    needs = {"split": "data_path", "include_path": "tasks", "num_fewshot": "tasks", "limit": "tasks"}
    for name, other in needs.items():
        if getattr(args, name) is not None and getattr(args, other) is None:
            raise ArgumentError(f"{flag_of(name)} goes with {flag_of(other)}: remove it")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ArgumentError(
            f"--include-path {args.include_path} is not a directory; name the directory of the task files"
        )
    if args.output is not None:
        check_output_file("--output", args.output)
    if args.tasks is not None:
        if not all(_names(args)):
            raise ArgumentError(f"--tasks {' '.join(args.tasks)!r}: give names of tasks, separated by spaces or commas")
        tasks.prepare()
    return (args,)


def evaluate(args: argparse.Namespace) -> None:
    """One job in a process group that exists."""
    started = time.monotonic()
    loaded, decisions = load(args)
    rule = _rule(args, loaded.trained.settings.max_position_embeddings)
    model, tokenizer = loaded.model, loaded.tokenizer
    documents = None
    if args.tasks is None:
        documents = open_documents(args.data_path, args.split, args.text_file, tokenizer)
    serving = calibrators(model, loaded.config, loaded.layout, args.batch_size, rule.seq_length)
    scorer = Scorer(model, args.batch_size, tokenizer.vocab_size, serving)
    if documents is not None:
        results, lines = _of_documents(scorer, documents, rule, tokenizer, decisions.drops)
        text = "\n".join(
            [f"{args.data_path or args.text_file}, windows of {rule.seq_length} tokens, stride {rule.stride}", *lines]
        )
    else:
        found = tasks.evaluate_tasks(
            scorer, tokenizer, rule, _names(args), args.include_path, args.num_fewshot, args.limit
        )
        text, results = (found.table, found.record) if found is not None else ("", {})
        if decisions.drops is not None:
            results = {**results, "drops": decisions.drops.shares().record()}
    told = decisions.told()
    if dist.get_rank() == 0:
        print(text, *told, sep="\n", flush=True)
        if results.get("truncated"):
            print(
                f"{results['truncated']} requests were longer than the model's context and lost their left end",
                file=sys.stderr,
            )
    decisions.save(args)
    run_on_rank_zero(lambda: _write(args, loaded, rule, results, time.monotonic() - started))


def _of_documents(
    scorer: Scorer, documents: Documents, rule: SlidingWindow, tokenizer: Tokenizer, drops: Dropped | None
) -> tuple[dict[str, Any], list[str]]:
    """Results and their text. Where rows are dropped, those without drops stand beside them."""
    if drops is None:
        results: dict[str, Any] = evaluate_documents(scorer, documents, rule, tokenizer).record()
        return results, [f"{_label(name):22} {_text(value)}" for name, value in results.items()]
    without, found, shares = compare(scorer, documents, rule, tokenizer, drops)
    results, before = found.record(), without.record()
    lines = [f"{_label(name):22} {_text(value):>14} {_text(before[name]):>14}" for name, value in results.items()]
    head = f"{'':22} {'with drops':>14} {'without':>14}"
    return {**results, "drops": shares.record(), "without_drops": before}, [head, *lines]


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _rule(args: argparse.Namespace, context: int) -> SlidingWindow:
    seq_length = args.seq_length or context
    if seq_length > context:
        raise ArgumentError(
            f"--seq-length {seq_length} exceeds the model's context of {context} tokens; give at most that"
        )
    stride = args.stride or (seq_length if args.tasks else max(seq_length // 2, 1))
    if stride > seq_length:
        raise ArgumentError(
            f"--stride {stride} exceeds --seq-length {seq_length}: tokens between the windows would "
            "not be scored; give at most that"
        )
    return SlidingWindow(seq_length, stride)


def _write(args: argparse.Namespace, loaded: Loaded, rule: SlidingWindow, results: Any, seconds: float) -> None:
    if args.output is None:
        return
    flags = {**vars(args), "seq_length": rule.seq_length, "stride": rule.stride}
    record = {
        "results": results,
        "flags": {name: value for name, value in flags.items() if name != "local_rank"},
        "checkpoint": str(loaded.trained.path.resolve()),
        "processes": dist.get_world_size(),
        "dtype": args.dtype or loaded.trained.dtype,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: _version(name) for name in ("scmoe_ds", "torch", "deepspeed", "lm_eval")},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }
    try:
        write_whole(Path(args.output), json.dumps(record, indent=1, default=str) + "\n")
    except OSError as error:
        told = f"--output {args.output} cannot be written ({reason_of(error)}); the results are above"
        raise ArgumentError(told) from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _names(args: argparse.Namespace) -> list[str]:
    return [name.strip() for text in args.tasks for name in text.split(",")]


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(main())
