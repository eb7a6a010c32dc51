"""scmoe adapt report: its numbers against the records they are from, its verdicts, and what a user can get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.programs import adapt
from scmoe_ds.training.record import RecordWriter

FACTS = {"data": "corpus", "seq_length": 8, "units_per_step": 100, "ranks": 2, "nodes": 1, "card": "CPU"}


def run(
    directory: Path,
    losses: dict[int, float],
    seconds: float,
    hidden: float | None,
    teachers: float | None = None,
    **facts: Any,
) -> Path:
    """A run of 40 steps with a log line every 10; schedules are chosen at iteration 10, which is slower."""
    record = RecordWriter(directory)
    record.write("start", 0, **{**FACTS, **facts})
    for iteration in range(10, 50, 10):
        if iteration == 20:
            record.write("schedule", 10, layers=[0])
        own = seconds + (1.0 if iteration == 10 else 0.0)
        speed = {"seconds_per_iteration": own, "tokens_per_second": 100 / own}
        record.write("step", iteration, lm_loss=3.0, hidden=None if iteration == 10 else hidden, **speed)
    for iteration, loss in losses.items():
        of_teacher = {} if teachers is None else {"teacher_lm_loss": teachers}
        record.write("validation", iteration, lm_loss=loss, **of_teacher)
    return directory


def evaluated(path: Path, **results: Any) -> Path:
    record = {"results": results, "flags": {"text_file": "book.txt", "seq_length": 8, "stride": 8}, "checkpoint": "x"}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def report(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is printed, and the page's Markdown."""
    prefix = Path(str(words[0])).parent / "page"
    assert adapt.main(["report", *map(str, words), "--output-prefix", str(prefix)]) == 0
    web = prefix.with_suffix(".html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in web and "http" not in web
    return capsys.readouterr().out, prefix.with_suffix(".md").read_text(encoding="utf-8")


def test_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = run(tmp_path / "student", {0: 3.5, 20: 3.05, 40: 3.02}, seconds=2.0, hidden=0.9)
    teacher = run(tmp_path / "teacher", {40: 3.0}, seconds=3.0, hidden=None)
    tasks = {"results": {"piqa": {"alias": "piqa", "acc,none": 0.6, "acc_stderr,none": 0.01}}}
    of_teacher = evaluated(tmp_path / "t.json", loss=2.0, **tasks)
    tasks["results"]["piqa"]["acc,none"] = 0.55
    of_student = evaluated(tmp_path / "s.json", loss=2.01, **tasks)
    flags = ["--teacher-run", teacher, "--teacher", of_teacher, "--after", of_student]
    out, page = report([student, *flags], capsys)
    # Evaluations come before validations: 0.5 % of 2.0.
    assert out.splitlines()[0] == (
        "The student's loss is 0.50 % above its teacher's after 4k tokens (2.0100 against 2.0000 nats per token), "
        "within 1 %; its training is 1.50 × as fast as the teacher's; nothing of what was measured limits it."
    )
    assert "| book.txt, windows of 8, stride 8 | 2.0000, 7.39 |  | 2.0100, 7.46 | +0.50 % |" in page
    assert "| validation of corpus, sequences of 8 | 3.0000, 20.09 | 3.5000, 33.12 | 3.0200, 20.49 | +0.67 % |" in page
    assert "| piqa, acc | 0.6000 |  | 0.5500 |" in page
    assert re.search(r"\| student \| 2000.0 \| 50 \| 90 % \| 2 × CPU on 1 node \|", page)
    assert re.search(r"\| teacher \| 3000.0 \| 33 \|  \| 2 × CPU on 1 node \|", page)
    # 40 steps of 100 tokens; 10 of them took 3 seconds, 30 took 2.
    assert "4k tokens, 100.0 % of the teacher's, in 0.03 hours of training steps." in page


@pytest.mark.parametrize(
    ("losses", "hidden", "words"),
    [
        (
            {0: 4.0, 10: 3.6, 20: 3.4, 40: 3.3},
            0.9,
            "what limits is training: its loss still fell by 0.1000 in the last",
        ),
        ({0: 4.0, 10: 3.3, 20: 3.3, 40: 3.3}, 0.9, "what limits is the conversion: the loss has stopped falling"),
        ({0: 4.0, 40: 2.9}, 0.5, "what limits is the window: 50 % of the communication stays exposed"),
    ],
)
def test_what_limits(
    losses: dict[int, float], hidden: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher's loss is in the record of the distillation itself."""
    student = run(tmp_path / "student", losses, seconds=2.0, hidden=hidden, teachers=3.0)
    out, page = report([student], capsys)
    assert words in out
    assert "how much faster it trains was not measured" in out
    assert "No task was evaluated" in page and "--teacher-run" in page


def test_runs_that_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speed is of the run without a teacher in its steps; tokens and hours are of both."""
    distil = {"adapt": {"source": "t", "distill": {"alpha": 1.0, "teacher_logits": None}}}
    first = run(tmp_path / "first", {0: 3.5, 40: 3.2}, seconds=4.0, hidden=0.9, **distil)
    second = run(tmp_path / "second", {40: 3.0}, seconds=2.0, hidden=0.9)
    teacher = run(tmp_path / "teacher", {40: 3.0}, seconds=2.0, hidden=0.1)
    out, page = report([first, second, "--teacher-run", teacher], capsys)
    assert "The student is as good as its teacher after 8k tokens" in out
    assert "its training takes as long as the teacher's" in out
    assert "8k tokens, 200.0 % of the teacher's, in 0.07 hours" in page
    out, page = report([first, "--teacher-run", teacher], capsys)
    assert "takes 100 % longer than the teacher's, although each step has a pass of the teacher in it" in out
    other = run(tmp_path / "other", {40: 3.0}, seconds=2.0, hidden=0.1, ranks=4)
    out, page = report([second, "--teacher-run", other], capsys)
    assert "not measured" in out and "different machines" in page


def test_what_a_user_can_get_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = run(tmp_path / "student", {0: 3.5}, seconds=2.0, hidden=0.9)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1]", encoding="utf-8")
    for words, rule in (
        ([tmp_path / "nowhere"], "nowhere is not there: name the --save directory"),
        ([student, "--teacher-run", tmp_path], "has no log.jsonl"),
        ([student, "--teacher", wrong], f"--teacher {wrong} is no record that scmoe evaluate --output writes"),
        ([student, "--after", tmp_path / "no.json"], "cannot be read as JSON"),
        ([student, "--output-prefix", tmp_path / "no" / "page"], "cannot be written"),
    ):
        assert adapt.main(["report", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert rule in error and error.count("\n") == 1, error
