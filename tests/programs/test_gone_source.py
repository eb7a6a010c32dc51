"""A student whose source is gone goes on from its own checkpoint, unless its teacher has to be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from tests.programs.test_bad_input import run

TOPK = {"scmoe.architecture": "topk", "scmoe.top_k": 2}
STUDENT = {"scmoe": {}}  # all else as in the source


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def test_a_student_goes_on_without_its_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 300).tolist() for _ in range(20)]
    data = write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix
    source, logits = str(tmp_path / "source"), str(tmp_path / "logits")
    assert run(tmp_path, data, TOPK, {"--save": source}) == 0
    students = {
        "plain": {"--adapt-from": source},
        "taught": {"--distill-from": source, "--teacher-logits": logits},
        "live": {"--distill-from": source},
    }
    for name, flags in students.items():
        assert (
            run(
                tmp_path,
                data,
                STUDENT,
                {**flags, "--train-iters": "2", "--save": str(tmp_path / name), "--save-interval": "1"},
            )
            == 0
        )
        shutil.rmtree(tmp_path / name / "global_step2")
    shutil.rmtree(source)
    for name, flags in students.items():
        capfd.readouterr()
        start = {**flags, "--train-iters": "2", "--save": str(tmp_path / name), "--auto-resume": None}
        assert run(tmp_path, data, STUDENT, start) == (2 if name == "live" else 0), name
        said = capfd.readouterr()
        if name == "live":
            assert "source is neither a checkpoint" in said.err
        else:
            assert "differs from the one that saved" not in said.err
            assert (tmp_path / name / "global_step2").is_dir()
