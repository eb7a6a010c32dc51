"""Everything that a GPU has to settle, in one command of at most 8 minutes; needs no network.

    python -m benchmarks.gpu.acceptance                    one GPU
    python -m benchmarks.gpu.acceptance --gpus 2           two GPUs with NCCL
    python -m benchmarks.gpu.acceptance --rehearse         on the CPU, tiny: tests the steps, measures nothing

Every step has a process and a time limit of its own. A crash, a CUDA error or a hang is written down, and the next step
runs. The JSON record and the Markdown page are rewritten after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import card, page, process, targets
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS, Step

SHORTEST_S = 5.0
"""A step that would have less time does not start."""

Run = Callable[[str, Mapping[str, Any], float, Path, Mapping[str, str]], process.Outcome]


class Acceptance:
    """One run: its steps, its record, and the two files that follow it.

    Args:
        steps: what is run, in order.
        gpus: how many GPUs the steps use.
        setting: of every step.
        minutes: of the whole run; steps that do not fit into them are not started.
        run: runs one step; by default in a process of its own.
    """

    def __init__(
        self, steps: Sequence[Step], gpus: int, setting: Setting, minutes: float, run: Run = process.run
    ) -> None:
        self.steps, self.gpus, self.setting, self._run = steps, gpus, setting, run
        self._ends = time.monotonic() + 60 * minutes
        self.record: dict[str, Any] = {
            "benchmark": "benchmarks.gpu.acceptance",
            "command": f"python -m benchmarks.gpu.acceptance {shlex.join(sys.argv[1:])}".rstrip(),
            "environment": card.environment(setting.rehearsal),
            "gpus": gpus,
            "rehearsal": setting.rehearsal,
            "targets": [],
            "steps": [_entry(step, process.Outcome("not started", 0.0, Notes())) for step in steps],
        }

    def run(self) -> dict[str, Any]:
        """Runs all steps; returns the record."""
        self._write()
        with tempfile.TemporaryDirectory() as scratch:
            for number, step in enumerate(self.steps):
                left = self._ends - time.monotonic()
                if left < SHORTEST_S:
                    outcome = process.Outcome("not started: the time of the run is up", 0.0, Notes())
                else:
                    limit_s = min(step.limit_s, left)
                    variables = {} if self.setting.rehearsal else step.environment
                    outcome = self._run(step.function, asdict(self.setting), limit_s, Path(scratch), variables)
                self.record["steps"][number] = _entry(step, outcome)
                self._write()
                print(f"{step.name:12} {outcome.result} ({outcome.seconds:.0f} s)", flush=True)
        return self.record

    def _write(self) -> None:
        numbers: dict[str, float] = {}
        for step in self.record["steps"]:
            numbers |= step["numbers"]
        self.record["targets"] = targets.judge(numbers, self.gpus)
        texts = {".json": json.dumps(self.record, indent=1) + "\n", ".md": page.markdown(self.record)}
        for ending, text in texts.items():
            path = self.setting.file(ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(f"{ending}.new")
            whole.write_text(text, "utf-8")
            whole.replace(path)


def _entry(step: Step, outcome: process.Outcome) -> dict[str, Any]:
    return {
        "name": step.name,
        "question": step.question,
        "result": outcome.result,
        "seconds": round(outcome.seconds, 1) or None,
        "last_lines": list(outcome.last_lines),
        **outcome.notes.content(),
    }


def file_name(gpus: int, where: Mapping[str, str]) -> str:
    """Of a record, without its ending: the card and the day."""
    card = re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")
    return f"gpu{gpus}_{card}_{where['date']}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=STEPS, default=1)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny sizes; numbers mean nothing")
    names = sorted({step.name for steps in STEPS.values() for step in steps})
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run; default: 8")
    parser.add_argument("--output", help="directory; default: benchmarks/results, for a rehearsal build/gpu_rehearsal")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    found = card.count()
    if not args.rehearse and found < args.gpus:
        parser.error(f"--gpus {args.gpus}: this machine has {found}; --rehearse runs the steps on the CPU")
    steps = [step for step in STEPS[args.gpus] if not args.only or step.name in args.only]
    if args.rehearse:
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    output = args.output or ("build/gpu_rehearsal" if args.rehearse else "benchmarks/results")
    name = file_name(args.gpus, card.environment(args.rehearse))
    acceptance = Acceptance(steps, args.gpus, Setting(args.rehearse, str(Path(output).resolve()), name), args.minutes)
    record = acceptance.run()
    for row in record["targets"]:
        print(f"{row['number']:55} {row['target']:>18} {row['measured']:>12}  {row['met']}")
    print(f"The whole record: {acceptance.setting.file('.md')}")
    return 0 if all(step["result"] == "done" for step in record["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
