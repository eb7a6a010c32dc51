"""What converting each MoE layer of a trained model costs and saves, and which layers to convert for a budget.

scmoe adapt checkpoints/top2 --measure book.txt --max-loss-increase 50% --output student
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scmoe_ds.analysis import records, similarity
from scmoe_ds.analysis.adaptation import Adaptation, Student, measure, most_similar, record, similarity_of_ends
from scmoe_ds.analysis.adaptation_choice import Budget
from scmoe_ds.analysis.adaptation_text import (
    aligned,
    choice_sentences,
    command,
    costs_table,
    front_table,
    not_reached,
    parts,
    sentences,
)
from scmoe_ds.analysis.adaptation_times import LayerTime, Way, layer_time
from scmoe_ds.analysis.feasibility import Times, read_times, times_of
from scmoe_ds.analysis.tokens import TokenSequences
from scmoe_ds.config.messages import counted
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.text_file import read_text
from scmoe_ds.errors import AnalysisError, ArgumentError, imports_of, reason_of
from scmoe_ds.evaluation.held_out import HeldOut
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.models.identity import Identity, differences
from scmoe_ds.parallel.agreement import is_rank_zero, run_on_rank_zero
from scmoe_ds.programs.adapt_sources import AdaptSource, Opened
from scmoe_ds.programs.flags.checks import flag_of

_NO_TIMES = "No times are known, so the columns of time are left out"
_SAME = ("merge", "top_k", "shortcut_norm", "shared_expert", "text_file", "dtype")
"""Flags that the command for the choice repeats."""
_HOW = "Times are of one micro-batch, forward and backward, from tap to join, by the planner's simulation"


def measured(args: argparse.Namespace, source: AdaptSource) -> bool:
    """Measures, prints and writes. Sets --position, --join and --layers as they were chosen, and returns whether
    --output is to be written. Collective.

    Raises:
        AnalysisError, ArgumentError, DataError, EvaluationError: what a user can correct.
    """
    timed = source.time() if source.time is not None and args.calibration is None else None
    first = source.open(source.ways[0])
    text = _text(args, source, first)
    times, origin = _times(args, source, first.identity, timed)
    cosines = _similarity(args, first, text)
    opened = {source.ways[0]: first}
    del first
    if args.most_similar is not None:
        return _take(args, *_most_similar(args, source.default, cosines))

    def open_student(way: Way) -> Student:
        student = opened.pop(way, None) or source.open(way)
        scorer = Scorer(student.model, args.batch_size, source.tokenizer.vocab_size)
        return Student(student.conversion, lambda: text.loss(scorer))

    def time_of(way: Way, layer: int) -> LayerTime | None:
        found = None if times is None else layer_time(times, source.shape, way, layer)
        return found if isinstance(found, LayerTime) else None

    budget = Budget(args.max_loss_increase, args.min_hidden)
    found = measure(open_student, source.ways, len(text.tokens), cosines, time_of, budget, origin, _progress)
    _show(args, found)
    choice = found.choice
    if choice is not None and not choice.fits:
        raise ArgumentError(not_reached(found, choice))
    if choice is not None:
        return _take(args, choice.way, choice.layers)
    return args.output is not None


def _take(args: argparse.Namespace, way: Way, layers: Sequence[int]) -> bool:
    args.position, args.join, args.layers = way.position, way.join, sorted(layers)
    return args.output is not None


def _text(args: argparse.Namespace, source: AdaptSource, first: Opened) -> HeldOut:
    context, vocab_size = first.subject.context, first.subject.vocab_size
    length = args.seq_length or context
    if length is None:
        raise ArgumentError("--seq-length is missing: the model does not say how long its context is")
    if context is not None and length > context:
        raise ArgumentError(f"--seq-length {length} exceeds the model's context of {context} tokens; give at most that")
    tokens = read_text(args.measure, source.tokenizer, vocab_size, "--measure").tokens[: args.max_tokens]
    return HeldOut(tokens, length, source.tokenizer.eod, f"--measure {args.measure}")


def _similarity(args: argparse.Namespace, first: Opened, text: HeldOut) -> dict[str, dict[int, float]]:
    """Of the source: no layer of the student is converted."""
    sequences = TokenSequences(text.tokens, text.seq_length, None, text.source)
    found = similarity.measure(first.subject, sequences.batches(args.batch_size))
    verdict = similarity.verdict(found, first.subject.moe_blocks, first.subject.distance)
    return similarity_of_ends(verdict, first.subject.moe_blocks)


def _times(
    args: argparse.Namespace, source: AdaptSource, own: Identity, timed: Times | None
) -> tuple[Times | None, str]:
    """Measured times and where they are from; None and why there are none."""
    if timed is not None:
        times, name = timed, "random tokens on these ranks"
    elif args.calibration is not None:
        times, name = read_times(args.calibration), f"--calibration {args.calibration}"
        if found := differences(own, times.identity):
            raise AnalysisError(
                f"{name} is of another model ({'; '.join(found)[:300]}): measure it again with scmoe report"
            )
    elif source.stored_times:
        name = f"what the checkpoint {args.source} has kept of its calibration"
        try:
            times = times_of(source.stored_times, name)
        except AnalysisError as error:
            return _without_times(args, source, f"{error}. ")
    else:
        return _without_times(args, source)
    missing = [text for way in source.ways if isinstance(text := layer_time(times, source.shape, way, 0), str)]
    if len(missing) == len(source.ways):
        return _without_times(args, source, f"{name}: {missing[0]}; a calibration of a ScMoE has these times. ")
    facts = times.kinds[0][0]
    batch = (
        f"{facts.get('micro_batch_size', '?')} × {facts.get('seq_length', '?')} tokens on {facts.get('processes', '?')}"
    )
    return times, f"{_HOW} from {name} (measured at {batch} processes)."


def _without_times(args: argparse.Namespace, source: AdaptSource, why: str = "") -> tuple[None, str]:
    if args.min_hidden is not None:
        raise ArgumentError(
            f"--min-hidden {args.min_hidden:g}: needs measured times. {why or 'None are known. '}Without them "
            f"nothing says what is hidden: {source.remedy}"
        )
    return None, f"{why}{_NO_TIMES}: {source.remedy}"


def _most_similar(
    args: argparse.Namespace, way: Way, cosines: dict[str, dict[int, float]]
) -> tuple[Way, Sequence[int]]:
    of_way = {layer: cosines[way.at(layer)][layer] for layer in cosines[way.position] | cosines[way.at(0)]}
    if not 1 <= args.most_similar <= len(of_way):
        raise ArgumentError(
            f"--most-similar {args.most_similar}: the model has {counted(len(of_way), 'MoE layer')}; give "
            + ("1" if len(of_way) == 1 else f"1 … {len(of_way)}")
        )
    order = most_similar(of_way, len(of_way))
    for layer in order:
        _say(f"MoE layer {layer}: cosine similarity of the ends of {way.text} {of_way[layer]:.4f}")
    return way, order[: args.most_similar]


def _show(args: argparse.Namespace, found: Adaptation) -> None:
    choice, source = found.choice, str(args.source)
    given = [(flag_of(name), str(getattr(args, name))) for name in _SAME if getattr(args, name) is not None]
    more = list(itertools.chain.from_iterable(given))
    doing = None if choice is None else command(source, choice, args.output and str(args.output), more)
    lines = [*sentences(found, source, args.measure), "", *aligned(costs_table(found)), ""]
    lines += ["sets of layers that no other beats, by sums of single increases:", *aligned(front_table(found))]
    _say(*lines)
    if choice is not None and choice.fits:
        _say("", *choice_sentences(found, choice), *([] if args.output else [doing]))
    if args.output_prefix is not None:
        run_on_rank_zero(lambda: _write(args, found, doing))


def _write(args: argparse.Namespace, found: Adaptation, doing: str | None) -> None:
    with imports_of("plots", "the page's figure"):
        from scmoe_ds.analysis import figures, page  # matplotlib takes a second to import
    from scmoe_ds.figure_style import png

    whole = {**records.heading("adaptation"), "model": str(args.source), "text": args.measure, **record(found)}
    data = Path(f"{args.output_prefix}.json")
    try:
        write_whole(data, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise AnalysisError(f"--output-prefix {args.output_prefix} cannot be written ({reason_of(error)})") from None
    fits = found.choice is not None and found.choice.fits
    shown = parts(found, str(args.source), args.measure, doing if fits else None)
    for path in (data, *page.write(shown, png(figures.adaptation(whole)), args.output_prefix, "Adaptation")):
        print(f"wrote {path}", flush=True)


def _say(*lines: str | None) -> None:
    if is_rank_zero():
        print(*lines, sep="\n", flush=True)


def _progress(line: str) -> None:
    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)
