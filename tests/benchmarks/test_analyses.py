"""benchmarks.quality.analyses: the commands that it runs are ones that the programs understand, and go together."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import analyses
from benchmarks.quality.text_corpus import Corpus
from scmoe_ds.programs.flags import report
from scmoe_ds.programs.flags.analysis import build_parser, check
from scmoe_ds.programs.flags.gpt import parse_arguments


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        called.append(command[1:])
        if "scmoe_ds.programs.report" in command:
            config = json.loads(Path(command[command.index("--deepspeed_config") + 1]).read_text(encoding="utf-8"))
            Path(config["scmoe"]["overlap"]["calibration_file"]).write_text("[]", encoding="utf-8")

    record = {"documents": {"train": 8, "validation": 2}, "sha256": "a", "settings": {}, "tokens": {}}
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(analyses, "ROOT", tmp_path)  # the settings are read from there as well
    (tmp_path / "benchmarks" / "quality").mkdir(parents=True)
    shutil.copy(Path(analyses.__file__).with_name("quality.json"), tmp_path / "benchmarks" / "quality")
    monkeypatch.setattr(analyses, "prepare_corpus", lambda directory, settings: Corpus(directory, record))
    monkeypatch.setattr(analyses, "describe", lambda record: "a corpus")
    monkeypatch.chdir(tmp_path)
    return called


def test_commands(commands: list[list[str]], tmp_path: Path) -> None:
    assert analyses.main(["--output-dir", "out/of", "--work-dir", str(tmp_path / "work")]) == 0
    assert not [word for command in commands for word in command if word.startswith(str(tmp_path))]
    trained, found = {}, []
    for command in commands:
        program, *arguments = command[1:] if command[0] == "-m" else command
        if program == "pretrain_gpt_scmoe.py":
            args, config = parse_arguments(arguments)
            trained[args.save] = config.section
            assert args.train_iters == 300 and args.save_interval == 50 and args.auto_resume
        elif program == "scmoe_ds.programs.analyze":
            args = build_parser().parse_args(arguments)
            if args.analysis != "feasibility":
                check(args)
                loads = [args.load] if isinstance(args.load, str) else args.load
                assert set(loads) <= trained.keys()
            found.append(args)
    assert [config.architecture for config in trained.values()] == [
        "pipelined_topk",
        "overlapped_shared_expert",
        "dgmoe",
        "scmoe",
    ]
    assert [args.analysis for args in found] == [
        "similarity",
        "similarity",
        "gating",
        "gating",
        "gradients",
        "feasibility",
    ]
    # The page reads what the commands before it write.
    *_, launch, _ = commands
    assert found[-1].similarity == found[0].output
    _, config = report.parse_arguments(launch[launch.index("scmoe_ds.programs.report") + 1 :])
    assert config.section.expert_parallel_size == 2 and Path(found[-1].calibration) == Path(
        "out/of/analysis_times.json"
    )
    assert Path(found[-1].calibration).read_text(encoding="utf-8") == "[]"


def test_a_command_that_fails_ends_it(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> None:
        commands.append(command[1:])
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert analyses.main(["--output-dir", "out"]) == 1 and len(commands) == 1
    assert "benchmarks.quality.analyses: pretrain_gpt_scmoe.py ended with exit code 3" in capsys.readouterr().err
    assert analyses.main(["--output-dir", "out", "--preset", "tpu"]) == 2
    assert "benchmarks.quality.analyses: error: --preset tpu" in capsys.readouterr().err


def test_one_gpu_has_no_feasibility_page(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert analyses.main(["--preset", "gpu", "--output-dir", "out"]) == 0
    assert "nothing travels between ranks" in capsys.readouterr().out and len(commands) == 9
