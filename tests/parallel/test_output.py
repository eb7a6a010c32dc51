"""A full disk under the log or a monitor: the job goes on. The log shows by itself, and obeys logging that is set up."""

from __future__ import annotations

import errno
import io
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.monitor import csv_monitor

from scmoe_ds.parallel import output
from scmoe_ds.parallel.output import log

PROGRAM = """
import sys
from scmoe_ds.parallel.output import steady_output
with steady_output():
    for number in range(3000):
        print("a line", number)
        print("a line", number, flush=True)
    print("to stderr", file=sys.stderr)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_under_a_stream(stream: str) -> None:
    """/dev/full refuses every byte, as a full disk does; the interpreter's own end must not fail for it either."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open("/dev/full", "w") as full:
        pipes[stream] = full  # type: ignore[assignment]
        done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, check=False, **pipes)
    assert done.returncode == 0, done
    if stream == "stdout":
        assert done.stderr.count("stdout cannot be written: No space left on device. The job goes on") == 1
    else:
        assert "a line 2999\n" in done.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_never_open(closed: str) -> None:
    """Python has None in the place of a stream whose descriptor is closed when it starts."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, PROGRAM]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_reader_that_has_gone() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("to stderr\n", 0)


def test_lines_come_again_when_there_is_room() -> None:
    class Disk(io.StringIO):
        full = False

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(5, "Input/output error")
            return super().write(text)

    disk, other = Disk(), io.StringIO()
    steady = output.SteadyStream(disk, "stdout", other)
    for disk.full in (False, True, False):
        print("line", file=steady)  # type: ignore[call-overload]
        logging.StreamHandler(steady).emit(logging.makeLogRecord({"msg": "record"}))  # type: ignore[type-var]
    assert disk.getvalue() == 2 * "line\nrecord\n" and "Input/output error" in other.getvalue()


def test_a_monitor_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(csv_monitor.dist, "get_rank", lambda: 0)
    expected = SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="job")
    monitor = csv_monitor.csvMonitor(expected)
    output.steady_monitors(SimpleNamespace(csv_monitor=monitor, tb_monitor=None, enabled=True))
    (tmp_path / "job" / "Train_loss.csv").symlink_to("/dev/full")
    caplog.set_level(logging.WARNING, "scmoe_ds")
    for step in range(3):
        monitor.write_events([("Train/loss", 1.0, step)])
    assert caplog.text.count("csvMonitor cannot write: [Errno 28] No space left on device. The job goes on") == 1
    (tmp_path / "job" / "Train_loss.csv").unlink()
    monitor.write_events([("Train/loss", 0.5, 3)])
    assert (tmp_path / "job" / "Train_loss.csv").read_text().splitlines()[-1] == "3,0.5"


def test_a_monitor_whose_disk_is_full_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    whole = {"tensorboard": section, "csv_monitor": {**section, "enabled": False}, "train_batch_size": 2}
    assert output.without_full_disks(whole) == whole

    def refuse(dir: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    caplog.set_level(logging.WARNING, "scmoe_ds")
    assert output.without_full_disks(whole) == {**whole, "tensorboard": {**section, "enabled": False}}
    assert f"tensorboard: {tmp_path}/job cannot be written: No space left on device" in caplog.text


def as_python_sets_it_up(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger without what pytest and other tests have set."""
    logger = logging.getLogger("scmoe_ds")
    for each, level in ((logging.root, logging.WARNING), (logger, logging.NOTSET)):
        monkeypatch.setattr(each, "handlers", [])
        monkeypatch.setattr(each, "level", level)
        monkeypatch.setattr(each, "_cache", {})
    return logger


def test_the_log_shows_without_any_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_python_sets_it_up(monkeypatch)
    log("replaced 2 layers")
    log("they run without overlap", level=logging.WARNING)
    assert capsys.readouterr() == ("[scmoe_ds] replaced 2 layers\n[scmoe_ds] warning: they run without overlap\n", "")


def test_a_level_of_the_users_silences_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_python_sets_it_up(monkeypatch).setLevel(logging.WARNING)
    log("silent")
    log("heard", level=logging.WARNING)
    assert capsys.readouterr().out == "[scmoe_ds] warning: heard\n"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level, shown", [(logging.INFO, "INFO scmoe_ds: said\n"), (logging.ERROR, "")])
def test_logging_that_the_user_sets_up_is_the_only_one(
    when: str, level: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_python_sets_it_up(monkeypatch)
    if when == "after":
        log("first")
        capsys.readouterr()
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.root.addHandler(handler)
    logging.root.setLevel(level)
    log("said")
    assert capsys.readouterr() == (shown, "")
