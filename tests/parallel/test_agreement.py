"""Errors that travel between ranks keep their class and what the operating system said."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel import agreement


class TwoPartError(ValueError):
    """Cannot be built from its `args`."""

    def __init__(self, place: str, rule: str) -> None:
        super().__init__(f"{place}: {rule}")


class Model(pydantic.BaseModel):
    """Its ValidationError is a ValueError that pickle cannot build."""

    number: int


def raised_by(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


def on_another_rank(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """What rank 0 raises for an error of rank 1."""

    def gather(_: Any) -> list[Any]:
        return [None, pickle.loads(pickle.dumps(agreement._that_travels(error)))]  # type: ignore[arg-type]

    monkeypatch.setattr(agreement, "gather", gather)
    return raised_by(lambda: agreement.run_together(lambda: None))


@pytest.mark.parametrize(
    "act",
    [
        lambda: b"\xff".decode(),
        lambda: json.loads("[1,"),
        lambda: int("x"),
        lambda: Path("/no/such/file").read_text(),
        lambda: Path("/").read_text(),
    ],
    ids=["UnicodeDecodeError", "JSONDecodeError", "ValueError", "FileNotFoundError", "IsADirectoryError"],
)
def test_the_class_travels(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    original = raised_by(act)
    found = on_another_rank(original, monkeypatch)
    assert type(found) is type(original)
    if isinstance(original, OSError):
        assert isinstance(found, OSError)
        assert (found.errno, found.strerror, found.filename) == (original.errno, original.strerror, original.filename)
    else:
        assert "found by rank 1" in str(found) and str(original).split(":")[0] in str(found)


def test_errors_that_cannot_be_built_again_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert on_another_rank(full, monkeypatch).errno == errno.ENOSPC  # type: ignore[attr-defined]
    for error in (TwoPartError("a", "b"), raised_by(lambda: Model(number="x"))):  # type: ignore[arg-type]
        found = on_another_rank(error, monkeypatch)
        assert isinstance(found, ValueError) and str(error) in str(found)
    found = on_another_rank(CheckpointError("broken"), monkeypatch)
    assert type(found) is CheckpointError and str(found) == "broken (found by rank 1)"
