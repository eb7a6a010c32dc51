"""Cached sample indices: whatever happens to their files, a run reads the right samples or ends in one sentence."""

import errno
import logging
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scmoe_ds.data import durable_files, index_cache
from scmoe_ds.data.dataset import DataSettings, build_datasets
from scmoe_ds.data.index_cache import IndexCache
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import DataError


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    rng = random.Random(0)
    documents = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(60)]
    prefix = write_indexed_dataset(str(tmp_path / "data"), documents, 257).prefix
    return DataSettings((prefix,), "8,1,1", 8, 5, ByteTokenizer(), str(tmp_path / "cache"))


def samples(settings: DataSettings) -> list[list[int]]:
    train: Any = build_datasets(settings, 200, 0, 0).train
    return [train[i]["tokens"].tolist() for i in range(200)]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "foreign":
        np.save(path.open("wb"), np.arange(500, dtype=np.int32))
    else:  # one bit, near the place that the name says
        place = {"first bit": 0, "bit of the header": 60, "bit in the middle": len(content) // 2, "last bit": -2}[how]
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)


HOW = ["removed", "empty", "half", "foreign", "first bit", "bit of the header", "bit in the middle", "last bit"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", ["document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt"])
def test_a_damaged_file_is_made_anew(
    settings: DataSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, how: str
) -> None:
    before = samples(settings)
    cache = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    (path,) = (tmp_path / "cache").glob(f"*-train-{file}")
    damage(path, how)
    assert samples(settings) == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == cache
    said = [record.message for record in caplog.records if "made anew" in record.message]
    assert len(said) == 1 and str(tmp_path / "cache") in said[0]


def test_an_entry_of_other_data_under_the_same_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def cache(description: str) -> IndexCache:
        return IndexCache(str(tmp_path), "name", ("array",), description)

    for description, value in (("a", 1), ("b", 2), ("b", 3)):
        (found,) = cache(description).load_or_build(lambda value=value: (np.full(5, value),))
    assert found.tolist() == [2] * 5  # the third finds the second
    assert ["it is of other data or settings" in record.message for record in caplog.records] == [True]


def test_a_whole_cache_is_read_without_a_word_and_without_writing(
    settings: DataSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = samples(settings)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(durable_files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(index_cache.np, "save", refuse)
    with caplog.at_level(logging.WARNING):
        assert samples(settings) == before
    assert not caplog.records


def test_a_disk_that_fills_up_under_numpy_is_one_sentence(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise OSError("9600 requested and 4064 written")

    monkeypatch.setattr(index_cache.np, "save", short)
    with pytest.raises(DataError, match=r"cache: there is no room \(9600 requested and 4064 written\)\. Set --data-c"):
        samples(settings)


@pytest.mark.parametrize(("place", "code"), [("TemporaryFile", errno.EROFS), ("save", errno.ENOSPC)])
def test_a_directory_that_cannot_be_written_is_one_sentence(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable_files.tempfile if place == "TemporaryFile" else index_cache.np, place, refuse)
    with pytest.raises(
        DataError, match=rf"^cannot write the index cache in .*cache: {os.strerror(code)}. Set --data-c"
    ):
        samples(settings)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert len(samples(settings)) == 200  # and works when there is room again


def _build_again_and_again(settings: DataSettings, expected: list[list[int]], seed: int) -> None:
    directory, rng = Path(str(settings.data_cache_path)), random.Random(seed)
    for _ in range(8):
        for path in directory.glob("*.npy"):
            if rng.random() < 0.3:
                path.unlink(missing_ok=True)
        assert samples(settings) == expected


def test_jobs_that_write_one_entry_at_once(settings: DataSettings) -> None:
    """Each also removes files of the others' entry, at any moment."""
    expected = samples(settings)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_build_again_and_again, args=(settings, expected, seed)) for seed in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        job.kill()
    assert [job.exitcode for job in jobs] == [0, 0]
