"""Processes of the quality benchmarks: several at a time, each with its checkpoints, until all are in the record."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.measure import environment
from benchmarks.quality.record import Plan, QualityError, Record
from benchmarks.quality.run import Task, curves
from benchmarks.quality.text_corpus import Corpus
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
        self._programs: dict[Path, str] = {}  # by the path of their task
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
        directory = self.place(variant, seed)
        directory.mkdir(parents=True, exist_ok=True)
        task, result = self._task(variant, seed, directory), directory / "result.json"
        run: dict[str, Any] = {"variant": variant, "seed": seed}
        run |= self._carried_out(task, directory)
        if result.is_file():
            found = self._found(directory)
            run |= {"status": "finished", "loss": statistics.fmean(found["sequence_losses"]), **found}
        elif self.stopping.is_set():
            return None
        else:
            text = (directory / "log.txt").read_text(encoding="utf-8", errors="replace")
            run |= {"status": "failed", "error": f"exit code {run['exit_code']}: …{text[-_LAST_CHARACTERS:]}"}
        del run["exit_code"]
        with self._record_lock:
            self.record.add(run | {"environment": self.record.environment_number(self._environment)})
        if run["status"] == "finished":
            self._clear(variant, directory)
        return run

    def _carried_out(self, task: Any, directory: Path) -> dict[str, Any]:
        """Runs a task's process, unless its result is there and an earlier program only had no time to note it."""
        path, result, started = directory / "task.json", directory / "result.json", time.monotonic()
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        task.save(path)
        self._programs[path] = task.program
        code = 0
        if path.read_text(encoding="utf-8") != before or not result.is_file():
            result.unlink(missing_ok=True)
            with (directory / "log.txt").open("a", encoding="utf-8") as stream:
                code = self._wait(path, stream)
        return {"seconds": round(time.monotonic() - started, 1), "exit_code": code}

    def place(self, variant: str, seed: int) -> Path:
        """The directory of a run."""
        return self.directory / f"{re.sub(r'[^A-Za-z0-9]+', '_', variant)}_seed{seed}"

    def _found(self, directory: Path) -> dict[str, Any]:
        """What a run that has ended goes into the record with."""
        found = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        return {**found, **curves(read_record(directory / "checkpoints"), self.plan.tokens_per_iteration)}

    def _clear(self, variant: str, directory: Path) -> None:
        """Removes what is in the record now, and is of no further use."""
        shutil.rmtree(directory)

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
            [sys.executable, "-m", self._programs[task], str(task)],
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
