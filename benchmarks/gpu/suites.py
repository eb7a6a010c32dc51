"""The tests that need a GPU, as one step of the acceptance run."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.setting import Setting

WORKERS = 4


def gpu_tests(notes: Notes, setting: Setting) -> None:
    """The step: tests/gpu. Without a GPU they skip themselves."""
    run_tests(notes, ["tests/gpu"], setting.file("_tests.xml"), 1 if setting.rehearsal else WORKERS)


def run_tests(notes: Notes, paths: list[str], report: Path, workers: int) -> None:
    """Runs pytest in a process of its own and notes every test that did not pass."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *paths]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "load"]
    subprocess.run(command, cwd=ROOT, check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    report.unlink()
    reasons: Counter[str] = Counter()
    results: dict[str, int] = {"passed": 0, "failure": 0, "error": 0, "skipped": 0}
    for case in cases:
        found = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        results[found] += 1
        if found != "passed":
            lines = (case.find(found).get("message") or "").splitlines()  # type: ignore[union-attr]
            message = lines[0] if lines else ""
            if found == "skipped":
                reasons[message] += 1
            else:
                name = f"{case.get('classname')}.{case.get('name')}"
                notes.row("Tests that failed", test=name, result=found, message=message)
    for reason, count in reasons.items():
        notes.row("Tests that skipped themselves", reason=reason, tests=count)
    notes.row("tests/gpu", **results)
    notes.number("tests/gpu: passed", results["passed"])
    notes.number("tests/gpu: failed", results["failure"] + results["error"])
