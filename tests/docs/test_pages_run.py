"""Every command and every block of Python of the pages runs, in order, in a directory that has what the reader has.

They are made small (smaller.py) and run in this process on one rank. What cannot run here is listed with the reason. A
command of a cluster is also read as it stands, by the launcher and by the program.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from lab import programs
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.programs.flags.gpt import parse_arguments
from scmoe_ds.programs.flags.swin import parse_image_arguments, swin_settings
from tests.docs.pages import ROOT, Step, pages
from tests.docs.readers_names import NAMES
from tests.docs.readers_own import make_readers_own
from tests.docs.smaller import PYTHON, smaller
from tests.helpers.shell import run, split, started

ON_TWO_RANKS = r"deepspeed --num_gpus 2 (examples/\w+\.py 2)"
NOT_RUN = {
    r"make \w+": "they install, run these tests, or train for minutes; CI runs them",
    r"python examples/\w+\.py( --save \S+)?": "tests/test_examples.py runs every example",
    ON_TWO_RANKS: "below",
    r"(make gpu-acceptance(-2)?|python -m benchmarks\.gpu\.acceptance.*)": "tests/benchmarks/test_gpu_acceptance.py "
    "rehearses its steps",
    r"scmoe check .*": "it makes ranks that do not exist, in a process without others; tests/check has every file",
    r"scmoe plan .*": "a whole search takes seconds; tests/programs/test_plan.py plans for a small model",
    r"deepspeed --hostfile HOSTFILE .*": "the plan prints it; its capitals stand for files",
    r"(deepspeed .*scmoe_ds\.programs\.probe|scmoe probe) .*": "it measures for a minute; tests/probe does so with small sizes",
    r"python -m benchmarks\.speed\.expert_parts .*": "two nodes; tests/distributed/test_layouts.py trains its layouts",
    r"python -m benchmarks\.serving\.(copies|offload) .*": "several processes; tests/benchmarks/test_serving.py has its parts",
    r"python -m benchmarks\.speed\.train_offload .*": "minutes; tests/benchmarks/test_train_offload.py has its parts",
    r"(?s)(?=.*^\.\.\.$).*": "Python with lines left out; tests/test_examples.py compares it with a file that it runs",
}
"""Pattern of a whole command or block: why it is not run."""
LINKS = ("benchmarks", "clusters", "ds_configs", "examples", "pretrain_gpt_scmoe.py")
PARSERS = {"scmoe_ds.programs.pretrain_gpt": parse_arguments, "scmoe_ds.programs.pretrain_swin": parse_image_arguments}
PAGES = pages()


def is_listed(text: str) -> bool:
    return any(re.fullmatch(pattern, text, re.MULTILINE) for pattern in NOT_RUN)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the reader has, made once."""
    directory, before = tmp_path_factory.mktemp("reader"), Path.cwd()
    for name in LINKS:
        (directory / name).symlink_to(ROOT / name)
    os.chdir(directory)
    connect()
    try:
        make_readers_own()
        yield directory
    finally:
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(not is_listed(step.text) for step in PAGES[page])])
def test_a_page_runs(
    page: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(own, here, symlinks=True)
    monkeypatch.chdir(here)
    names: dict[str, Any] = NAMES[page]() if page in NAMES else {}
    failed = []
    for step in PAGES[page]:
        if is_listed(step.text):
            continue
        problem = run_command(step, monkeypatch) if step.kind == "command" else run_python(step, names)
        said = capfd.readouterr()
        if problem:
            failed.append(f"{step.where}: {step.text}\n{problem}\n{said.out[-1000:]}{said.err[-1000:]}")
    assert not failed, "\n\n".join(failed)


def run_command(step: Step, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is wrong with a command; nothing if it runs."""
    variables, words = split(step.text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accept_as_it_stands(words)
    code = run(smaller(words))
    return f"exit code {code}" if code else ""


def run_python(step: Step, names: dict[str, Any]) -> str:
    """What is wrong with a block of Python, which may use and change the names of its page."""
    code = step.text
    for there, here in PYTHON.items():
        code = code.replace(there, here)
    try:
        exec(compile(code, step.where, "exec"), names)
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def accept_as_it_stands(words: list[str]) -> None:
    """The launcher and the program accept a training command as the page has it: flags, presets, JSON, ranks, batch."""
    launcher, program, flags = started(words)
    if launcher is None or program not in PARSERS or "…" in flags:
        return
    args, config = PARSERS[program](flags)
    ranks = launcher.num_gpus if launcher.num_gpus > 0 else sum((fetch_hostfile(launcher.hostfile) or {"": 2}).values())
    config.section.check_world(ranks)
    batch_sizes(config.whole, ranks)
    if program.endswith("pretrain_swin"):
        swin_settings(args)


def test_the_list_has_no_pattern_too_many() -> None:
    texts = [step.text for steps in PAGES.values() for step in steps]
    assert [each for each in NOT_RUN if not any(re.fullmatch(each, text, re.MULTILINE) for text in texts)] == []


def test_sections_of_the_pages_are_valid() -> None:
    """Lines of JSON that a reader copies into a DeepSpeed JSON."""
    lines = [line for path in ROOT.glob("**/*.md") for line in path.read_text(encoding="utf-8").splitlines()]
    sections = [line for line in lines if re.fullmatch(r'"scmoe": \{.*\}', line)]
    assert len(sections) > 3
    for section in sections:
        ScMoEConfig.from_deepspeed(json.loads("{" + section + "}"))


TWO_RANKS = [
    (step.text, found[1])
    for steps in PAGES.values()
    for step in steps
    if (found := re.fullmatch(ON_TWO_RANKS, step.text))
]


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for _, script in TWO_RANKS])
def test_an_example_runs_on_two_ranks(script: str) -> None:
    done = programs.run(script.split(), 2, ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
