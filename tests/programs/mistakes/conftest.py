"""The workplace of the mistakes, one for each file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scmoe_ds.engine import connect
from tests.programs.mistakes.workplace import furnish


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory of all tests of a file."""
    connect()  # one process group for all; the programs leave a group alone that they did not make
    before, place = Path.cwd(), tmp_path_factory.mktemp("workplace")
    os.chdir(place)
    furnish(place)
    yield place
    os.chdir(before)
