"""Tables and verdicts of a record of benchmarks.quality.adapt; they need the record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.measure import environment_text
from benchmarks.harness.tables import table
from benchmarks.quality.adapt_plan import TRAINED_ON, teacher_name
from benchmarks.quality.table import (
    Difference,
    difference_cell,
    failures,
    finished,
    mean_and_deviation,
    paired,
    verdict,
)
from scmoe_ds.analysis.markdown import code

DISTILLED, FINE_TUNED = "distilled", "fine-tuned"
CLAIMED = ("Pos-1", "late join")
"""Conversions of all layers for which the verdict compares with the teacher and with fine-tuning."""
_RULE = (
    "Rule: differences are paired by seed. A run is *confirmed* to be within the limit where the whole 95 % interval "
    "(Student's t over the seeds) of its loss over the teacher's, trained on for as many steps, lies below the limit, "
    "*contradicted* where it lies above, *within noise* otherwise. Distillation beats fine-tuning where the interval "
    "of the difference lies below 0 and each seed's difference does. With one seed nothing is decided."
)


def markdown(record: Mapping[str, Any]) -> str:
    """The record in words."""
    lines = ["# A trained MoE model becomes a ScMoE: loss after surgery, distillation, fine-tuning", ""]
    lines += _setting(record)
    lines += ["", "## Verdict", "", _RULE, "", *_verdicts(record)]
    lines += ["", "## Teachers", "", *_teachers(record)]
    for teacher in record["identity"]["teachers"]:
        lines += ["", f"## Students of the {teacher}", "", *_students(record, teacher)]
    lines += ["", "## What helped", "", *_helped(record), *failures(dict(record))]
    return "\n".join(lines) + "\n"


def _setting(record: Mapping[str, Any]) -> list[str]:
    identity, corpus = record["identity"], record["corpus"]
    environments = "; ".join(map(environment_text, record["environments"]))
    sizes = identity["evaluation"]
    tokens = identity["batch_size"] * identity["seq_length"]
    return [
        *(code(command) for command in record["commands"]),
        "",
        f"{environments}. Sequences of {identity['seq_length']} tokens, {identity['batch_size']} a step ({tokens} "
        f"tokens). Seeds {', '.join(map(str, record['seeds']))}. AdamW, linear warm-up, cosine to a tenth.",
        "",
        f"Text: library and installed packages of Python {corpus['python']} ({corpus['tokens']['train'] / 1e6:.2f} M "
        f"training and {corpus['tokens']['validation'] / 1e6:.2f} M validation tokens, split by document; sha256 "
        f"{corpus['sha256'][:12]}), BPE of {corpus['vocab_size']} tokens. Teachers' losses are of {sizes['sequences']} "
        f"held-out sequences, all others of the first {sizes['sequences_of_students']} of them, those on the way of "
        f"{sizes['sequences_on_the_way']}; differences are of the same sequences. Students of one seed see the same "
        "batches, in an order of the documents that is not their teacher's. What is shown on the way has the learning "
        "rate of that moment, not of an end.",
    ]


def _teachers(record: Mapping[str, Any]) -> list[str]:
    entropy, rows = record["entropies"], []
    for name, settings in record["identity"]["teachers"].items():
        runs = finished(dict(record), teacher_name(name))
        losses = [run["loss"] for run in runs.values()]
        tokens = settings["steps"] * record["identity"]["batch_size"] * record["identity"]["seq_length"]
        rows.append([name, f"{tokens / 1e6:.2f}", f"{settings['lr']:g}", mean_and_deviation(losses), _minutes(runs)])
    text = (
        f"Entropies of the validation text, nats per token: unigram {entropy['unigram']:.3f}; bigram "
        f"{entropy['bigram']:.3f} (under the training text's smoothed frequencies) or "
        f"{entropy['bigram of their own']:.3f} (under its own frequencies, a lower bound)."
    )
    head = ["teacher", "training tokens, M", "learning rate", "loss, nats per token", "processor minutes"]
    return [*table(head, rows), "", text]


def _students(record: Mapping[str, Any], teacher: str) -> list[str]:
    runs_of = [name for name, each in record["variants"].items() if each["teacher"] == teacher]
    rows = []
    for name in runs_of:
        runs = finished(dict(record), name)
        if not runs or name == teacher_name(teacher):
            continue
        steps = record["variants"][name]["section"]["steps"]
        on_the_way = sorted({int(step) for run in runs.values() for step in run.get("on_the_way", {})})
        way = [
            f"{100 * step / _steps(record, teacher):.0f} %: {_way(record, teacher, runs, step)}" for step in on_the_way
        ]
        rows.append(
            [
                name.removeprefix(f"{teacher}: "),
                _mean([_change(record, teacher, seed, run["before"]) for seed, run in runs.items() if "before" in run]),
                "; ".join(way) or "–",
                f"{100 * steps / _steps(record, teacher):.0f} %",
                mean_and_deviation([run["loss"] for run in runs.values()]),
                _percent(over_teacher(record, name)),
                str(len(runs)),
                _minutes(runs),
            ]
        )
    head = [
        "run",
        "loss − teacher's right after surgery",
        "on the way",
        "of the teacher's tokens",
        "loss, nats per token",
        "over the teacher trained on as long",
        "seeds",
        "processor minutes",
    ]
    return table(head, rows)


def over_teacher(record: Mapping[str, Any], name: str) -> Difference | None:
    """A run's loss over that of its teacher, trained on for as many steps, minus 1; None: there is no such pair."""
    variant = record["variants"][name]
    steps = variant["section"]["steps"]
    reference = next(
        (
            each
            for each, other in record["variants"].items()
            if other["teacher"] == variant["teacher"]
            and each.startswith(f"{variant['teacher']}: {TRAINED_ON}")
            and other["section"]["steps"] == steps
        ),
        None,
    )
    if reference is None:
        return None
    ours, theirs = finished(dict(record), name), finished(dict(record), reference)
    seeds = tuple(seed for seed in ours if seed in theirs)
    by_seed = tuple(ours[seed]["loss"] / theirs[seed]["loss"] - 1 for seed in seeds)
    return _of_seeds(seeds, by_seed) if seeds else None


def _of_seeds(seeds: tuple[int, ...], values: tuple[float, ...]) -> Difference:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(seeds, values, statistics.fmean(values), error, 0.0)


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    within, rows = record["within"], []
    for teacher in record["identity"]["teachers"]:
        for conversion in CLAIMED:
            name = f"{teacher}: {conversion}, {DISTILLED}"
            if name not in record["variants"]:
                continue
            over = over_teacher(record, name)
            claim = f"{name}: within {100 * within:g} % of the teacher trained on as long"
            rows.append([claim, below(over, within), _percent(over), _interval(over, 100, " %"), _seeds(over)])
            pair = paired(dict(record), name, f"{teacher}: {conversion}, {FINE_TUNED}")
            cells = ["–" if pair is None else difference_cell(pair), _interval(pair, 1, ""), _seeds(pair)]
            rows.append([f"{name}, ends lower than {FINE_TUNED}, nats per token", verdict(pair, "<", 0.0), *cells])
    return table(["claim", "verdict", "found", "95 % interval", "seeds"], rows)


def below(found: Difference | None, limit: float) -> str:
    """The verdict on a number that shall be below a limit."""
    if found is None or found.error is None:
        return "not decided (fewer than two seeds)"
    low, high = found.interval
    return "confirmed" if high < limit else "contradicted" if low > limit else "within noise"


def _helped(record: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, each in record["variants"].items():
        title, _, recipe = name.partition(f", {DISTILLED}, ")
        base = f"{title}, {DISTILLED}"
        pair = paired(dict(record), name, base) if recipe else None
        if pair is None or each["section"]["steps"] != record["variants"][base]["section"]["steps"]:
            continue
        rows.append([title, recipe, difference_cell(pair), _interval(pair, 1, ""), _seeds(pair)])
    text = f"Loss minus that of the run “{DISTILLED}” of the same conversion, from which each differs in one thing."
    return [text, "", *table(["conversion", "instead", "nats per token", "95 % interval", "seeds"], rows)]


def _steps(record: Mapping[str, Any], teacher: str) -> int:
    return int(record["identity"]["teachers"][teacher]["steps"])


def _change(record: Mapping[str, Any], teacher: str, seed: int, losses: Sequence[float]) -> float:
    """Mean loss minus the teacher's on the same sequences."""
    of_teacher = finished(dict(record), teacher_name(teacher))[seed]["sequence_losses"][: len(losses)]
    return statistics.fmean(losses) - statistics.fmean(of_teacher)


def _way(record: Mapping[str, Any], teacher: str, runs: Mapping[int, Mapping[str, Any]], step: int) -> str:
    found = [
        (seed, run["on_the_way"][str(step)]) for seed, run in runs.items() if str(step) in run.get("on_the_way", {})
    ]
    return _mean([_change(record, teacher, seed, losses) for seed, losses in found])


def _mean(values: Sequence[float]) -> str:
    """ "mean ± standard error", signed."""
    if not values:
        return "–"
    found = _of_seeds(tuple(range(len(values))), tuple(values))
    return f"{found.mean:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def _percent(found: Difference | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.mean:+.2f}" + ("" if found.error is None else f" ± {100 * found.error:.2f}") + " %"


def _interval(found: Difference | None, scale: float, unit: str) -> str:
    if found is None or found.error is None:
        return "–"
    low, high = (scale * each for each in found.interval)
    digits = 2 if unit else 4
    return f"{low:+.{digits}f} … {high:+.{digits}f}{unit}"


def _seeds(found: Difference | None) -> str:
    return "0" if found is None else str(len(found.seeds))


def _minutes(runs: Mapping[int, Mapping[str, Any]]) -> str:
    seconds = [run["processor_seconds"] for run in runs.values() if "processor_seconds" in run]
    return f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "–"
