"""What dropping costs trained models (DualSparse-MoE): rate → loss on held-out text, with 1T-Drop and 2T-Drop.

    python -m benchmarks.quality.sparse_models --output data/sparse
    python -m benchmarks.quality.sparse --models data/sparse --output benchmarks/results

Each model is sparsified on training text by `scmoe sparsify`. Then the run-time path computes the loss of the same
held-out sequences: this package's GPTs as `scmoe evaluate --drop-rate` does, the Qwen3-MoE through the layers of
`scmoe_ds.initialize`. Differences are paired by sequence. As a control the major halves are neurons by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.measure import environment
from benchmarks.quality.run import held_out_rows
from benchmarks.quality.sparse_models import checkpoint_of, corpus_of, settings
from benchmarks.quality.sparse_subjects import Subject, opened, shuffle, thresholds_of
from benchmarks.quality.sparse_table import figure, markdown
from benchmarks.quality.text_corpus import Corpus, describe
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.sequences import Sequences
from scmoe_ds.data.tokenizer import GPT2BPETokenizer
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.figure_style import save
from scmoe_ds.programs import sparsify
from scmoe_ds.programs.run import run_program
from scmoe_ds.sparse.importance import MEASURES, WITHOUT_W3, Measure
from scmoe_ds.sparse.sparsity_file import METHODS, Method

NAME, FILE = "benchmarks.quality.sparse", "sparse_quality"
RATES, RATE = (0.1, 0.25, 0.4, 0.6), 0.25
"""Of the curves; and the one at which measures are compared."""
SPREADS, SPREAD_RATES = (0.01, 0.025, 0.05, 0.1, 0.2), (RATE, 0.4)
"""What spreads are compared, and at which rates: of one choice, halves pay the more the more is left out."""
DEFAULT: Measure = "abs-gate"
CHANCE = "chance"
_CALIBRATION_TOKENS = 65536
_SEED = 1


def configurations(measure: str) -> Iterator[tuple[float, Method, float | None]]:
    """(rate, method, spread) of what is evaluated with neurons sorted by a measure; a spread of None is the file's."""
    if measure in (DEFAULT, CHANCE):
        yield from ((rate, method, None) for method in METHODS for rate in RATES if (method, measure) != ("1t", CHANCE))
    else:
        yield RATE, "2t", None
    if measure == DEFAULT:
        yield from ((rate, "2t", spread) for rate in SPREAD_RATES for spread in SPREADS)


def calibration_text(corpus: Corpus, path: Path) -> Path:
    """The last training documents as a text, a little more than what is read of it."""
    data = Sequences(corpus.prefix)
    tokenizer = GPT2BPETokenizer(*(str(corpus.directory / name) for name in ("vocab.json", "merges.txt")))
    texts: list[str] = []
    tokens = 0
    for document in reversed(range(corpus.record["documents"]["train"])):
        if tokens > 1.1 * _CALIBRATION_TOKENS:
            break
        ids = data.get(document)
        tokens += len(ids)
        texts.append(tokenizer.detokenize([int(each) for each in ids[:-1]]))
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def measured(name: str, models: Path, text: Path, rows: Sequence[Row], work: Path) -> dict[str, Any]:
    """The record of one model."""
    is_hugging_face = "shape" in settings()["models"][name]
    rows_of_record: list[dict[str, Any]] = []
    found: dict[str, Any] = {"title": settings()["models"][name]["title"], "rows": rows_of_record}
    of_default: dict[tuple[float, Method], np.ndarray] = {}
    for measure in (DEFAULT, *[each for each in MEASURES if each != DEFAULT], CHANCE):
        if measure not in WITHOUT_W3 and measure != CHANCE and not is_hugging_face:
            continue
        directory = work / name / measure
        if measure == CHANCE:
            shuffle(work / name / DEFAULT, directory, is_hugging_face, _SEED)
        else:
            flags = ["--load", checkpoint_of(models, name), "--text-file", text, "--output", directory]
            flags += ["--measure", measure, "--max-tokens", _CALIBRATION_TOKENS, "--rate", RATE]
            sparsify.sparsify(*sparsify.parse(list(map(str, flags))))
        subject = opened(directory, is_hugging_face)
        with subject.dropped.paused():
            base = np.array(subject.losses(rows))
        if measure == DEFAULT:
            found |= {"loss": float(base.mean()), "top_k": subject.sparsity.top_k, "spread": subject.sparsity.spread}
            found |= {"major_share": [layer.major_share for layer in subject.sparsity.layers]}
            whole = base
        rows_of_record.append({"measure": measure, "method": None, "rate": 0.0, **_compared(base, whole, whole)})
        for rate, method, spread in configurations(measure):
            if spread == subject.sparsity.spread:
                continue  # measured already, as the file's
            losses, shares = _with_drops(subject, rows, rate, method, spread)
            row: dict[str, Any] = {"measure": measure, "method": method, "rate": rate, "spread": spread, **shares}
            row |= _compared(losses, whole, whole)
            if measure == DEFAULT and spread is None:
                of_default[rate, method] = losses
            if method == "2t":
                row["over_1t"] = _compared(losses, of_default[rate, "1t"], whole)
            rows_of_record.append(row)
            print(f"{name} {row}", flush=True)
    return found


def _with_drops(
    subject: Subject, rows: Sequence[Row], rate: float, method: Method, spread: float | None
) -> tuple[np.ndarray, dict[str, float]]:
    subject.drop(thresholds_of(subject.sparsity, rate, method, spread))
    losses = np.array(subject.losses(rows))
    return losses, subject.dropped.shares().record()


def _compared(losses: np.ndarray, others: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Mean loss, and its difference in percent of the whole model's, with the 95 % interval over the sequences."""
    percent = 100 * (losses - others) / whole.mean()
    half = 1.96 * float(percent.std(ddof=1)) / len(percent) ** 0.5
    mean = float(percent.mean())
    low, high = np.percentile(percent, [10, 90])
    found = {"loss": float(losses.mean()), "percent": mean, "low": mean - half, "high": mean + half}
    return found | {"p10": float(low), "p90": float(high)}


def run(args: argparse.Namespace) -> None:
    """All models, into record, table and figure."""
    corpus = corpus_of(args.models)
    sizes = settings()
    rows = held_out_rows(corpus.prefix, corpus.split, sizes["seq_length"], args.sequences)
    path = args.output / f"{FILE}.json"
    record: dict[str, Any] = {
        "benchmark": NAME,
        "command": f"python -m {NAME} --sequences {args.sequences}",
        "environment": environment(),
        "corpus": describe(corpus.record),
        "tokens": sum(len(row.labels) for row in rows),
        "sequences": len(rows),
        "calibration_tokens": _CALIBRATION_TOKENS,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as work:
        text = calibration_text(corpus, Path(work, "calibration.txt"))
        for name in args.only:
            record["models"][name] = measured(name, args.models, text, rows, Path(work))
            write_whole(path, json.dumps(record, indent=1) + "\n")
    write_tables(path)


def write_tables(path: Path) -> None:
    """Table and figure beside a record."""
    record = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(record)
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    save(figure(record), path.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    names = list(settings()["models"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="what benchmarks.quality.sparse_models has written")
    parser.add_argument("--output", type=Path, required=True, help="directory of record, table and figure")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these models")
    parser.add_argument("--sequences", type=int, default=256, help="held-out sequences")
    parser.add_argument("--tables", action="store_true", help="make table and figure of the record; run nothing")
    args = parser.parse_args(argv)
    if args.tables:
        write_tables(args.output / f"{FILE}.json")
        return 0
    return run_program(NAME, [], run, lambda _: (args,))


if __name__ == "__main__":
    sys.exit(main())
