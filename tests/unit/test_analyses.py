"""benchmarks.analyses: the commands that it runs are ones that the programs understand, and go together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import analyses
from scmoe_ds.analysis.arguments import build_parser, check
from scmoe_ds.arguments import parse_arguments
from tools.text_corpus import Corpus


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        called.append(command[1:])
        if len(called) == failing[0]:
            raise subprocess.CalledProcessError(3, command)

    record = {"documents": {"train": 8, "validation": 2}}
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(analyses, "prepare_corpus", lambda directory, settings: Corpus(directory, record))
    monkeypatch.setattr(analyses, "describe", lambda record: "a corpus")
    monkeypatch.chdir(tmp_path)
    return called


failing = {0: 0}


def test_commands(commands: list[list[str]], tmp_path: Path) -> None:
    flags = ["--output-dir", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    assert analyses.main(flags) == 0
    trained, found = {}, []
    for program, *arguments in commands:
        if program == "pretrain_gpt_scmoe.py":
            args, _, config = parse_arguments(arguments)
            trained[args.save] = config
            assert args.train_iters == 300 and args.save_interval == 50 and args.auto_resume
        elif program == "analyze_gpt_scmoe.py":
            args = build_parser().parse_args(arguments)
            if args.analysis != "feasibility":
                check(args)
                loads = [args.load] if isinstance(args.load, str) else args.load
                assert set(loads) <= trained.keys()
            found.append(args)
    assert [config.architecture for config in trained.values()] == [
        "pipelined_topk", "overlapped_shared_expert", "dgmoe", "scmoe"]  # fmt: skip
    assert [args.analysis for args in found] == ["similarity", "similarity", "gating", "gating", "gradients",
                                                 "feasibility"]  # fmt: skip
    # The page reads what the commands before it write.
    *_, launch, _ = commands
    assert found[-1].similarity == found[0].output
    _, _, config = parse_arguments(launch[launch.index("scmoe_ds.overlap.report") + 1 :])
    assert (config.overlap.calibration_file, config.expert_parallel_size) == (found[-1].calibration, 2)


def test_a_command_that_fails_ends_it(commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(failing, 0, 2)
    assert analyses.main(["--output-dir", str(tmp_path), "--work-dir", str(tmp_path / "work")]) == 1
    assert len(commands) == 2
    assert "benchmarks.analyses: pretrain_gpt_scmoe.py ended with exit code 3" in capsys.readouterr().err


def test_one_gpu_has_no_feasibility_page(commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = ["--preset", "gpu", "--output-dir", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    assert analyses.main(flags) == 0
    assert "nothing travels between ranks" in capsys.readouterr().out and len(commands) == 9
