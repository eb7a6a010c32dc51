"""The record of a run, as its readers find it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scmoe_ds.training.record import FILE_NAME, RecordWriter, read_record


def write_steps(directory: Path, start: int, end: int, loss: float) -> None:
    writer = RecordWriter(directory)
    writer.write("start", start, loss_name="lm_loss")
    for iteration in range(start + 1, end + 1):
        writer.write("step", iteration, lm_loss=loss + iteration)


def test_a_run_that_goes_on_earlier_replaces_what_came_after(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 6, 100.0)
    RecordWriter(tmp_path).write("validation", 6, lm_loss=1.0)
    RecordWriter(tmp_path).write("schedule", 2, text="first")
    RecordWriter(tmp_path).write("schedule", 5, text="second")
    write_steps(tmp_path, 4, 5, 200.0)
    run = read_record(tmp_path)
    assert run.curve("lm_loss") == ([1, 2, 3, 4, 5], [101.0, 102.0, 103.0, 104.0, 205.0])
    assert run.validations == {} and [each["text"] for each in run.schedules] == ["first"]
    assert [each["iteration"] for each in run.starts] == [0, 4] and run.start["iteration"] == 4


def test_the_last_entry_of_an_iteration_counts(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    for loss in (3.0, 2.0):
        writer.write("step", 7, lm_loss=loss)
        writer.write("validation", 7, lm_loss=loss)
    run = read_record(tmp_path / FILE_NAME)
    assert run.curve("lm_loss") == run.curve("lm_loss", "validations") == ([7], [2.0])


def test_half_a_line_costs_that_line_alone(tmp_path: Path) -> None:
    """A job that was killed while it wrote, read as it is and after the next job has appended."""
    write_steps(tmp_path, 0, 3, 0.0)
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    for cut in range(1, 12):
        file.write_bytes(whole[:-cut])
        assert list(read_record(tmp_path).steps) == ([1, 2, 3] if cut == 1 else [1, 2])
        write_steps(tmp_path, 2, 4, 10.0)
        assert read_record(tmp_path).curve("lm_loss") == ([1, 2, 3, 4], [1.0, 2.0, 13.0, 14.0])


def test_every_line_is_json_with_all_digits(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "made").write("step", 1, lm_loss=1 / 3, grad_norm=math.nan, load=[[0.5, math.inf]])
    (line,) = (tmp_path / "made" / FILE_NAME).read_text().splitlines()

    def refuse(word: str) -> None:
        raise ValueError(word)

    entry = json.loads(line, parse_constant=refuse)
    assert entry["lm_loss"] == 1 / 3 and entry["grad_norm"] is None and entry["load"] == [[0.5, None]]
    assert read_record(tmp_path / "made").curve("grad_norm") == ([], [])


def test_no_directory_no_record(tmp_path: Path) -> None:
    RecordWriter(None).write("step", 1)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


def test_a_record_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    writer = RecordWriter(tmp_path / "file")
    writer.write("step", 1)
    writer.write("step", 2)
    assert caplog.text.count("cannot be written") == 1
