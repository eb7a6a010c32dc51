"""Validation loss of every architecture at equal data, seeds and token budget: the paper's table 3 on installed text.

    python -m benchmarks.quality.compare --output benchmarks/results/quality_cpu --parallel 2 --budget-minutes 60
    python -m benchmarks.quality.compare --from-json benchmarks/results/quality_cpu.json

Variants and all sizes are in benchmarks/quality/quality.json. A seed decides the weights and the order of the data, so
that the variants of one seed start from the same numbers and see the same batches; what is compared is the loss of the
same held-out sequences. Runs go seed by seed, and each that has ended is in the record: call the same command again,
with more seeds if you like, and it goes on where it stood.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality.crew import Crew, locked
from benchmarks.quality.record import Plan, QualityError, Record, load_plan
from benchmarks.quality.table import figure, markdown
from benchmarks.quality.text_corpus import CorpusSettings, describe, prepare_corpus
from scmoe_ds.errors import DataError
from scmoe_ds.figure_style import save


@dataclass(frozen=True)
class Benchmark:
    """A program of this kind.

    Attributes:
        name: of its module.
        text: of its --help.
        settings: default of --settings.
        markdown, figure: made of a record's content.
        load: the plan of --settings and --preset.
        crew: who runs it.
    """

    name: str
    text: str | None
    settings: Path
    markdown: Callable[[dict[str, Any]], str]
    figure: Callable[[dict[str, Any]], Figure]
    load: Callable[[Path, str], Plan] = load_plan
    crew: type[Crew] = Crew

    def save_tables(self, record: Record, output: Path) -> None:
        """`output` with .md and .png in place of its suffix."""
        text = self.markdown(record.content)
        print(text)
        output.with_suffix(".md").write_text(text, encoding="utf-8")
        save(self.figure(record.content), output.with_suffix(".png"))


def _tables_of(benchmark: Benchmark, path: Path) -> None:
    """
    Raises:
        QualityError: no record, or one in which something is missing or of another type.
    """
    record = Record.read(path, benchmark.name)
    try:
        benchmark.save_tables(record, path)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise QualityError(
            f"{path} is incomplete or damaged ({type(error).__name__}: {error}); take another record"
        ) from None


def parse(benchmark: Benchmark, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of such a program."""
    short_name = benchmark.settings.stem
    parser = argparse.ArgumentParser(
        prog=f"python -m {benchmark.name}",
        description=benchmark.text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", type=Path, default=benchmark.settings, help="variants and sizes")
    parser.add_argument("--preset", default="cpu", help="sizes in --settings")
    parser.add_argument(
        "--output", help=f"path of record, table and figure, without suffix (default: data/quality/PRESET/{short_name})"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("data/quality"), help="corpus, checkpoints, logs")
    parser.add_argument("--seeds", type=_seed, nargs="+", default=[1, 2, 3], help="in this order")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="only variants whose name has a PART")
    parser.add_argument("--parallel", type=_positive, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--budget-minutes", type=float, help="start no run later than that")
    parser.add_argument(
        "--retry-failed", action="store_true", help="run again what has failed; the failure stays in the record"
    )
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="make table and figure of a record; run nothing")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _seed(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return int(text)


def measure(benchmark: Benchmark, args: argparse.Namespace, command: str) -> int:
    """Runs what the record lacks; 0 if all that was asked for is finished, otherwise 1.

    Raises:
        QualityError, DataError: what a user can correct.
        KeyboardInterrupt: stopped; the same command goes on.
    """
    plan = benchmark.load(args.settings, args.preset)
    variants = plan.select(args.only)
    work = args.work_dir.resolve() / args.preset
    output = Path(args.output or work / benchmark.settings.stem)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(work) as inherited:
        corpus = prepare_corpus(work / "corpus", CorpusSettings(**plan.preset["corpus"]))
        print(describe(corpus.record), flush=True)
        record = Record.open(Path(f"{output}.json"), plan, corpus.record, benchmark.name)
        record.want(args.seeds, command)
        record.save()  # claims may have been added since the last run
        unfinished = [pair for pair in plan.order(variants, args.seeds) if record.lacks(*pair, args.retry_failed)]
        crew = benchmark.crew(
            plan, corpus, record, work / plan.fingerprint(corpus.record), args.parallel, args.budget_minutes, inherited
        )
        crew.work(unfinished)
    benchmark.save_tables(record, Path(f"{output}.json"))
    # A failure that was run again with success stays in the record, and is no reason to call it a failure.
    left = sum(record.lacks(variant, seed, retry_failed=True) for seed in args.seeds for variant in variants)
    print(f"{left} of {len(args.seeds) * len(variants)} runs are not finished")
    return 1 if left else 0


def run(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    args = parse(benchmark, argv)
    command = shlex.join(["python", "-m", benchmark.name, *(sys.argv[1:] if argv is None else argv)])
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the processes save
    try:
        if args.from_json:
            _tables_of(benchmark, args.from_json)
            return 0
        return measure(benchmark, args, command)
    except (QualityError, DataError) as error:
        print(f"{benchmark.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{benchmark.name}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    settings = Path(__file__).with_name("quality.json")
    return run(Benchmark("benchmarks.quality.compare", __doc__, settings, markdown, figure), argv)


if __name__ == "__main__":
    sys.exit(main())
