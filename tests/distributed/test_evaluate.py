"""Evaluation on several ranks gives what one process computes, and what loops over tokens do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.distributed import run_distributed
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.programs import evaluate as evaluate_program
from tests.evaluation.test_evaluate import (
    ALL_TASKS,
    CONTEXT,
    DOCUMENTS,
    check_tasks,
    plain_nats,
    write_export,
    write_tasks,
)


def evaluate_each(load: list[str], what: list[list[str]]) -> None:
    """One evaluation after the other in one process group."""
    for flags in what:
        assert evaluate_program.main([*load, *flags]) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    prefix = write_indexed_dataset(str(directory / "set"), DOCUMENTS, 257).prefix
    return {"export": write_export(directory), "set": prefix, "tasks": write_tasks(directory)}


def check_dataset(out: Path, ranks: int) -> None:
    record = json.loads(out.read_text())
    results, tokens = record["results"], sum(map(len, DOCUMENTS))
    expected = sum(plain_nats(document, CONTEXT, CONTEXT // 2) for document in DOCUMENTS)
    assert (results["tokens"], results["bytes"], results["windows"]) == (tokens, tokens - 1, 13)
    assert results["loss"] == pytest.approx(expected / tokens, abs=1e-6)
    assert record["processes"] == ranks


def test_expert_parallel_ranks(files: dict[str, str], tmp_path: Path) -> None:
    """13 windows, two at a time on each of two ranks: the last pass of one of them is empty."""
    data = ["--data-path", files["set"], "--batch-size", "2", "--output", str(tmp_path / "data.json")]
    tasks = ["--tasks", ALL_TASKS, "--include-path", files["tasks"], "--output", str(tmp_path / "tasks.json")]
    run_distributed(evaluate_each, 2, ["--load", files["export"], "--moe-expert-parallel-size", "2"], [data, tasks])
    check_dataset(tmp_path / "data.json", 2)
    check_tasks(json.loads((tmp_path / "tasks.json").read_text()))


def test_tensor_parallel_ranks_count_once(files: dict[str, str], tmp_path: Path) -> None:
    data = ["--data-path", files["set"], "--batch-size", "3", "--output", str(tmp_path / "data.json")]
    run_distributed(evaluate_each, 4, ["--load", files["export"], "--tensor-model-parallel-size", "2"], [data])
    check_dataset(tmp_path / "data.json", 4)
