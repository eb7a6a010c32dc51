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
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure

from benchmarks.harness.measure import environment
from benchmarks.quality.record import Plan, QualityError, Record, load_plan
from benchmarks.quality.run import Task, curves
from benchmarks.quality.table import figure, markdown
from benchmarks.quality.text_corpus import Corpus, CorpusSettings, describe, prepare_corpus
from scmoe_ds.errors import DataError
from scmoe_ds.figure_style import save
from scmoe_ds.training.record import read_record

ROOT = Path(__file__).resolve().parents[2]
_OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LAST_CHARACTERS = 1500  # of a failed run's output, for the record


class Crew:
    """Runs training processes, several at a time, until there are none left, the time is over or it is stopped.

    Args:
        plan, corpus, record: what to run, on what, and where it is noted.
        directory: of the runs of this configuration: checkpoints and logs.
        parallel: processes at the same time.
        minutes: no run starts later than that from now; None: no limit.
        inherited: a file descriptor that holds the lock as long as any of the processes lives.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        record: Record,
        directory: Path,
        parallel: int,
        minutes: float | None,
        inherited: int,
    ) -> None:
        self.plan, self.corpus, self.record, self.directory = plan, corpus, record, directory
        self.parallel, self.inherited = parallel, inherited
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.stopping, self._record_lock = threading.Event(), threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self.threads = max(1, (os.cpu_count() or 1) // parallel)
        self._environment = {**environment(), "threads": str(self.threads), "runs at a time": str(parallel)}

    def work(self, unfinished: Sequence[tuple[str, int]]) -> None:
        """Runs (variant, seed) pairs in this order.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM; the processes have saved a checkpoint by then.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._run, variant, seed) for variant, seed in unfinished]
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    run = future.result()
                    if run is not None:
                        print(
                            f"{number} of {len(unfinished)}: {run['variant']}, seed {run['seed']}: {_outcome(run)}",
                            flush=True,
                        )
            finally:
                self.stop()

    def stop(self) -> None:
        """Lets the processes save and end; starts no other."""
        self.stopping.set()
        for child in list(self._children):
            child.terminate()

    def _run(self, variant: str, seed: int) -> dict[str, Any] | None:
        """One process; None if it was not started, or stopped before its end."""
        if self.stopping.is_set() or (self.deadline is not None and time.monotonic() > self.deadline):
            return None
        directory = self.directory / f"{re.sub(r'[^A-Za-z0-9]+', '_', variant)}_seed{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        task, result = self._task(variant, seed, directory), directory / "result.json"
        task.save(directory / "task.json")
        result.unlink(missing_ok=True)
        started, log = time.monotonic(), directory / "log.txt"
        with log.open("a", encoding="utf-8") as stream:
            code = self._wait(directory / "task.json", stream)
        run: dict[str, Any] = {"variant": variant, "seed": seed}
        run |= {"seconds": round(time.monotonic() - started, 1)}
        text = log.read_text(encoding="utf-8", errors="replace")
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            run |= {
                "status": "finished",
                "loss": statistics.fmean(found["sequence_losses"]),
                **found,
                **curves(read_record(directory / "checkpoints"), self.plan.tokens_per_iteration),
            }
        elif self.stopping.is_set():
            return None
        else:
            run |= {"status": "failed", "error": f"exit code {code}: …{text[-_LAST_CHARACTERS:]}"}
        with self._record_lock:
            self.record.add(run | {"environment": self.record.environment_number(self._environment)})
        if run["status"] == "finished":
            shutil.rmtree(directory)
        return run

    def _task(self, variant: str, seed: int, directory: Path) -> Task:
        config = directory / "deepspeed.json"
        config.write_text(json.dumps(self.plan.deepspeed(variant), indent=1) + "\n", encoding="utf-8")
        flags = [
            *self.plan.model_flags(variant),
            "--deepspeed_config",
            str(config),
            "--seed",
            str(seed),
            "--data-path",
            self.corpus.prefix,
            "--split",
            self.corpus.split,
            *self.corpus.tokenizer_flags,
            # A cache of its own: runs at the same time would write one file.
            "--data-cache-path",
            str(directory / "cache"),
            "--save",
            str(directory / "checkpoints"),
            "--keep-last",
            "1",
            "--auto-resume",
        ]
        sizes = self.plan.preset["evaluation"]
        return Task(
            flags,
            sizes["sequences"],
            sizes["batch_size"],
            sizes.get("similarity_sequences", 0),
            str(directory / "result.json"),
        )

    def _wait(self, task: Path, stream: IO[str]) -> int:
        alone = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        environ = {
            **alone,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": str(ROOT),
            **self.plan.preset["environment"],
        }
        # A session of its own: Ctrl-C at a terminal reaches this process alone, which lets the others save.
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality.run", str(task)],
            cwd=task.parent,
            env=environ,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=(self.inherited,),
        )
        self._children.add(child)
        if self.stopping.is_set():  # it was set while the process was started
            child.terminate()
        try:
            return child.wait()
        finally:
            self._children.discard(child)


def _outcome(run: dict[str, Any]) -> str:
    if run["status"] == "finished":
        return f"{run['loss']:.4f} nats per token, {run['seconds']:.0f} s"
    return f"FAILED after {run['seconds']:.0f} s, {run['error'].splitlines()[0]}"


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Keeps a second benchmark, and what a killed one has left running, out of the same runs.

    Raises:
        QualityError: another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QualityError(
                f"another process works in {directory} (its training processes may outlive it for a "
                "while): wait for it, or give --work-dir"
            ) from None
        yield stream.fileno()


@dataclass(frozen=True)
class Benchmark:
    """A program of this kind.

    Attributes:
        name: of its module.
        text: of its --help.
        settings: default of --settings.
        markdown, figure: made of a record's content.
    """

    name: str
    text: str | None
    settings: Path
    markdown: Callable[[dict[str, Any]], str]
    figure: Callable[[dict[str, Any]], Figure]

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
    plan = load_plan(args.settings, args.preset)
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
        unfinished = [
            pair
            for pair in ((variant, seed) for seed in args.seeds for variant in variants)
            if record.lacks(*pair, args.retry_failed)
        ]
        crew = Crew(
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
