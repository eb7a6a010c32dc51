"""What `make pretrain` shows at its end, from the record of a run that trained nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.training.record import RecordWriter, RunRecord, read_record

ROOT = Path(__file__).parents[1]
TEXT = b"ab" * 5000


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program in a directory of its own, whose commands are not run."""
    spec = importlib.util.spec_from_file_location("quick_start", ROOT / "examples/quick_start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "output_of", lambda line: " ".join(["run:", *line[1:]]))
    (tmp_path / "data").mkdir()
    (tmp_path / module.RUN).mkdir(parents=True)
    write_indexed_dataset(str(tmp_path / module.CORPUS), ([*TEXT[:500], 256] for _ in range(20)), 257)
    return module


@pytest.fixture
def record(quick_start: ModuleType, tmp_path: Path) -> RunRecord:
    writer = RecordWriter(tmp_path / quick_start.SAVE)
    writer.write("start", 0)
    for iteration, loss in ((1, 5.5), (2, 4.0), (3, 3.0)):
        writer.write("step", iteration, lm_loss=loss)
    writer.write("validation", 3, lm_loss=3.5 * math.log(2))
    return read_record(tmp_path / quick_start.SAVE)


@pytest.mark.parametrize(
    ("bits", "fewer", "more"),
    [
        (0.5, ["8", "1"], ["gzip"]),
        (3.25, ["8"], ["1", "gzip"]),
        (8.5, [], ["8", "1", "gzip"]),
        (1e-9, ["8", "1", "gzip"], []),
    ],
)
def test_what_a_loss_means(quick_start: ModuleType, bits: float, fewer: list[str], more: list[str]) -> None:
    """Two bytes that occur equally often need one bit each without their order; gzip sees the order."""
    said = quick_start.meaning(bits * math.log(2), TEXT)
    assert f"are {bits:.4g} bits per byte of unseen text" in said
    halves = {word: re.search(rf"{word} than (.*?)(?:, but|$)", said) for word in ("fewer", "more")}
    for word, names in (("fewer", fewer), ("more", more)):
        found = halves[word]
        assert (found is not None) == bool(names)
        for name in names:
            assert found is not None and (f"({name})" if name == "gzip" else f"{name} (knowing") in found[1]


def test_the_curve(quick_start: ModuleType, record: RunRecord) -> None:
    (axes,) = quick_start.loss_figure(record, TEXT).axes
    training, validation, occurrence, gzip = axes.lines
    assert training.get_xydata().tolist() == [[1, 5.5], [2, 4.0], [3, 3.0]]
    assert validation.get_xydata().tolist() == [[3, pytest.approx(3.5 * math.log(2))]]
    assert occurrence.get_ydata()[0] == pytest.approx(math.log(2)) and 0 < gzip.get_ydata()[0] < 0.1


@pytest.mark.parametrize("missing", [None, "matplotlib", "tensorboard"])
def test_the_end(
    quick_start: ModuleType,
    record: RunRecord,
    missing: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(quick_start, "has", lambda package: package != missing)
    quick_start.show_result()
    said = capsys.readouterr().out
    assert "2.426 nats are 3.5 bits per byte of unseen text: fewer than 8" in said
    assert "run: generate --load checkpoints/quick_start --prompt def main(" in said
    board, curve = said.split("TensorBoard")[1].splitlines()[0], quick_start.ROOT / "runs/quick_start/loss.png"
    assert board.split()[:2] == (["pip", "install"] if missing == "tensorboard" else ["tensorboard", "--logdir"])
    if missing == "matplotlib":
        assert 'the loss curve needs matplotlib: pip install "scmoe_ds[plots]"' in said
    else:
        assert curve.read_bytes().startswith(b"\x89PNG")
    assert "trace" not in said, "this run has drawn none"


@pytest.mark.parametrize("last", [3, 300])
def test_a_run_that_was_stopped_shows_how_to_go_on(
    quick_start: ModuleType, last: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (quick_start.ROOT / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.setattr(quick_start.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(quick_start, "show_result", lambda: print("the result"))

    def run(line: list[str]) -> int:
        writer = RecordWriter(quick_start.ROOT / quick_start.SAVE)
        writer.write("start", 0)
        writer.write("step", last, lm_loss=4.0)
        return 0

    monkeypatch.setattr(quick_start, "run", run)
    assert quick_start.main() == 0
    said = capsys.readouterr().out
    assert ("the result" in said) == (last == 300)
    assert ("stopped at iteration 3 of 300. To go on:" in said and "--auto-resume" in said) == (last == 3)


def test_what_it_leaves_is_removed_by_make_clean(quick_start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = (ROOT / "Makefile").read_text().split("\nclean:")[1]
    assert {quick_start.SAVE, quick_start.RUN, quick_start.CORPUS} <= set(clean.split())
    (quick_start.ROOT / "ds_configs").symlink_to(ROOT / "ds_configs")
    for gpus, monitored in ((0, True), (8, False)):
        monkeypatch.setattr(quick_start, "has", lambda package, there=monitored: there)
        line, _ = quick_start.command(gpus)
        board = json.loads((quick_start.ROOT / line[line.index("--deepspeed_config") + 1]).read_text())["tensorboard"]
        assert board["enabled"] is monitored and f"{board['output_path']}/{board['job_name']}" == quick_start.RUN
        assert line[line.index("--save") + 1] == quick_start.SAVE
        assert line[line.index("--scmoe-trace-dir") + 1] == quick_start.RUN


def test_a_port_that_is_free(quick_start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(quick_start, "DEFAULT_PORT", taken)
        flag, found = quick_start.port()
        assert flag == "--master_port" and int(found) not in (0, taken)
    assert quick_start.port() == []
