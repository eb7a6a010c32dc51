"""Which lines of other packages our programs leave out: each is one that the installed package has; all else passes."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from scmoe_ds.programs import quiet

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    with warnings.catch_warnings():
        quiet.filter_log()
        quiet.filter_prints_and_warnings()
        yield
    for module, _ in quiet.PRINTS:
        vars(importlib.import_module(module)).pop("print", None)


@pytest.mark.parametrize(("module", "text"), sorted(quiet.PRINTS | quiet.LOGGED | quiet.WARNINGS))
def test_the_installed_package_says_it(module: str, text: str) -> None:
    """An entry that fails here after an update of the package can be deleted, or has to be written anew."""
    package = module.split(".")[0]
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    if importlib.metadata.version(package).split("+")[0] != pinned[package]:
        pytest.skip(f"the table is that of {package} {pinned[package]}")
    source = importlib.util.find_spec(module)
    assert source is not None and source.origin is not None
    tree = ast.parse(Path(source.origin).read_text("utf-8"))
    said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert all(any(part in each for each in said) for part in text.split("*"))


def test_a_print(capsys: pytest.CaptureFixture[str]) -> None:
    said = {module: vars(importlib.import_module(module))["print"] for module, _ in quiet.PRINTS}
    line = "No existing process group found, creating a new group named: ep_size_2"
    said["deepspeed.moe.layer"](line)
    said["deepspeed.comm.torch"]("DeepSpeed deepspeed.ops.comm.shm built successfully")
    said["deepspeed.moe.layer"]("No existing process group found: failed", 1, sep="=")
    assert capsys.readouterr().out == "No existing process group found: failed=1\n"
    print(line)
    assert capsys.readouterr().out == line + "\n", "what others print passes"


def test_the_log_of_deepspeed(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("DeepSpeed")
    log.addHandler(caplog.handler)
    try:
        for _, text in quiet.LOGGED:
            log.warning(text)
            log.warning(f"{text} or not")
        log.error("a rank has failed")
    finally:
        log.removeHandler(caplog.handler)
    assert [each.getMessage() for each in caplog.records] == [
        *(f"{t} or not" for _, t in quiet.LOGGED),
        "a rank has failed",
    ]


def test_warnings() -> None:
    with warnings.catch_warnings(record=True) as seen:
        for _, text in quiet.WARNINGS:
            warnings.warn(text, FutureWarning, stacklevel=1)
            warnings.warn(f"all of {text}", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.barrier` is deprecated", FutureWarning, stacklevel=1)
    expected = {*(f"all of {text}" for _, text in quiet.WARNINGS), "`torch.distributed.barrier` is deprecated"}
    assert {str(each.message) for each in seen} == expected
