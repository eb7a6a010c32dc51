"""scmoe evaluate and generate with experts offloaded or in low precision, in one process and on two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lab.distributed import run_distributed
from scmoe_ds.engine import connect
from scmoe_ds.programs import evaluate as evaluate_program
from scmoe_ds.programs import generate as generate_program
from tests.evaluation.test_evaluate import TEXT, write_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    connect()
    return write_export(tmp_path_factory.mktemp("low"))


def evaluate(export: str, directory: Path, *flags: str) -> float:
    (directory / "text").write_text(TEXT, encoding="utf-8")
    out = directory / "found.json"
    common = ["--load", export, "--text-file", str(directory / "text"), "--output", str(out)]
    assert evaluate_program.main([*common, *flags]) == 0
    return float(json.loads(out.read_text())["results"]["loss"])


def test_loss_of_experts_offloaded_and_in_low_precision(
    export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = evaluate(export, tmp_path)
    offloaded = evaluate(export, tmp_path, "--experts", "offload-async", "--expert-cache", "2")
    assert offloaded == usual and re.search(r"^experts: 8 computed, [5-8] migrated", capsys.readouterr().out, re.M)
    few = evaluate(export, tmp_path, "--low-precision", "all")
    assert "low precision (int8): hot ranks, of 2 layer passes: none" in capsys.readouterr().out
    low = evaluate(export, tmp_path, "--low-precision", "all", "--low-precision-min-tokens", "0")
    assert "low precision (int8): hot ranks, of 2 layer passes: rank 0 in 2\n" in capsys.readouterr().out
    assert few == usual  # the text has fewer than 2048 tokens
    assert 0 < abs(low - usual) < 0.01 * usual


def evaluate_hot(export: str, directory: Path) -> list[float]:
    """The losses as usual and with hot ranks; every row tolerates low precision."""
    flags = ["--moe-expert-parallel-size", "2"]
    hot = ["--low-precision", "hot", "--low-precision-score", "1", "--low-precision-share", "0"]
    return [evaluate(export, directory, *flags, *each) for each in ([], [*hot, "--low-precision-min-tokens", "0"])]


def test_hot_ranks(export: str, tmp_path: Path) -> None:
    usual, low = run_distributed(evaluate_hot, 2, export, tmp_path)[0]
    assert 0 < abs(low - usual) < 0.01 * usual


def test_text_in_low_precision(export: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", export, "--prompt", "one two", "--max-new-tokens", "3", "--temperature", "0"]
    low = ["--low-precision", "all", "--low-precision-min-tokens", "0"]
    assert generate_program.main([*flags, *low]) == 0
    assert "low precision (int8): hot ranks, of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--low-precision", "hot"], "--low-precision hot: a rank with all experts is never overloaded; give"),
        (
            ["--low-precision", "all", "--experts", "offload"],
            "--low-precision all: does not go with offloaded experts, as both",
        ),
        (["--low-precision", "all", "--low-precision-score", "0"], "--low-precision-score 0.0: must be above 0"),
        (["--low-precision-share", "1.5"], "--low-precision-share 1.5: must be in 0"),
        (["--low-precision-min-tokens", "-1"], "--low-precision-min-tokens -1: must be at least 0"),
    ],
)
def test_flags_that_do_not_go(export: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_program.main(["--load", export, "--prompt", "one", *flags]) == 2
    assert message in capsys.readouterr().err
