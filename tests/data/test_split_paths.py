"""--train-data-path, --valid-data-path, --test-data-path and --data-args-path: who reads what, and which go together."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.data.dataset import DataSettings, build_datasets, identify, validation_entropy
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.engine import connect
from scmoe_ds.errors import DataError
from scmoe_ds.programs.flags.data import DEFAULT_SPLIT, resolve_data_flags
from scmoe_ds.programs.flags.gpt import build_parser
from tests.programs.test_no_validation import gpt

SEQ = 8


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Datasets whose every token is one number, by that number's name."""
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    return {
        name: write_indexed_dataset(str(tmp_path / name), [[number] * 100] * 10, 257).prefix
        for name, number in numbers.items()
    }


def settings_for(*data_paths: tuple[str, ...], cache: str | None = None) -> DataSettings:
    return DataSettings((), None, SEQ, 5, ByteTokenizer(), cache, data_paths=data_paths)


def drawn(data: Any, count: int) -> dict[int, int]:
    return collections.Counter(token for i in range(count) for token in data[i]["tokens"].tolist())


@pytest.mark.parametrize("cached", [False, True])
def test_each_split_reads_its_own_data(tmp_path: Path, paths: dict[str, str], cached: bool) -> None:
    settings = settings_for(
        ("3", paths["one"], "1", paths["two"]),
        (paths["three"],),
        (paths["four"], paths["three"]),
        cache=str(tmp_path / "cache") if cached else None,
    )
    built: Any = build_datasets(settings, 1000, 50, 100)
    train, valid, test = (drawn(*each) for each in ((built.train, 1000), (built.valid, 50), (built.test, 100)))
    assert set(train) == {1, 2} and train[1] / (1000 * SEQ) == pytest.approx(0.75, abs=0.01)
    assert set(valid) == {3}
    assert set(test) == {3, 4} and test[4] / (100 * SEQ) == pytest.approx(0.5, abs=0.02)  # by tokens
    assert sorted(built.valid.indices) == list(range(10)), "all of the set, not a share"
    assert validation_entropy(built.valid) == pytest.approx(0, abs=1e-12)
    assert (tmp_path / "cache").exists() == cached


def test_one_dataset_in_two_splits_and_other_data_in_its_place(tmp_path: Path, paths: dict[str, str]) -> None:
    settings = settings_for((paths["one"],), (paths["one"],), (), cache=str(tmp_path / "cache"))
    built: Any = build_datasets(settings, 100, 20, 0)
    assert (set(drawn(built.train, 100)), set(drawn(built.valid, 20)), built.test) == ({1}, {1}, None)
    write_indexed_dataset(paths["one"], [[7] * 50] * 30, 257)
    again: Any = build_datasets(settings, 100, 20, 0)
    assert (set(drawn(again.train, 100)), set(drawn(again.valid, 20))) == ({7}, {7})
    assert len(again.train.indices) == 30


def test_what_a_split_lacks_is_said_with_its_flag(tmp_path: Path, paths: dict[str, str]) -> None:
    short = write_indexed_dataset(str(tmp_path / "short"), [[1] * SEQ], 257).prefix
    with pytest.raises(DataError, match=r"short: the valid split is 1 of 1 documents with 8 tokens"):
        build_datasets(settings_for((paths["one"],), (short,), ()), 10, 10, 0)
    with pytest.raises(DataError, match=r"--valid-data-path a 1 mixes weights"):
        build_datasets(settings_for((paths["one"],), ("a", "1"), ()), 10, 10, 0)
    with pytest.raises(DataError, match=r"absent\.bin"):
        build_datasets(settings_for((paths["one"],), ("absent",), ()), 10, 10, 0)
    assert build_datasets(settings_for((paths["one"],), ("absent",), ()), 10, 0, 0).valid is None


def test_the_record_of_a_run_names_the_training_data(paths: dict[str, str]) -> None:
    assert identify([paths["one"]], "--train-data-path") == identify([paths["one"]])
    assert identify([paths["one"]])["content"] != identify([paths["two"]])["content"]


# ---------------------------------------------------------------- flags


def parse(*flags: str) -> Any:
    args = build_parser().parse_args(list(flags))
    resolve_data_flags(args)
    return args


def test_flags(tmp_path: Path) -> None:
    assert parse().split == DEFAULT_SPLIT
    assert parse("--data-path", "a", "--split", "1,1").split == "1,1"
    per_split = parse("--train-data-path", "1", "a", "2", "b", "--test-data-path", "c")
    assert (per_split.train_data_path, per_split.valid_data_path, per_split.split) == (["1", "a", "2", "b"], None, None)
    (tmp_path / "blend").write_bytes(b"\xef\xbb\xbf0.5 first\n 0.5\tsecond\r\n")
    assert parse("--data-args-path", str(tmp_path / "blend")).data_path == ["0.5", "first", "0.5", "second"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-data-path a --data-path b", "--train-data-path names the data of one split, --data-path the data of"),
        ("--train-data-path a --split 9,1", "--split the data of all: give one or the other"),
        ("--train-data-path a --data-args-path f", "--data-args-path the data of all"),
        ("--valid-data-path a", "--valid-data-path without --train-data-path"),
        ("--data-args-path f --data-path a", "both name the data"),
        ("--data-args-path absent", "absent cannot be read: No such file"),
        ("--data-args-path EMPTY", "names no data"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, flags: str, message: str) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match=message):
        parse(*flags.replace("EMPTY", str(tmp_path / "empty")).split())


def test_a_run(tmp_path: Path, paths: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    connect()
    per_split = {"train_data_path": paths["one"], "data_path": None, "split": None}
    assert gpt(tmp_path, **per_split, valid_data_path=paths["two"], test_data_path=paths["three"]) == 0
    output = capsys.readouterr().out
    assert "validation loss" in output and "unigram entropy 0 nats" in output and "test loss" in output
    assert gpt(tmp_path, **per_split) == 0
    output = capsys.readouterr().out
    assert "no validation: --valid-data-path is not given\n" in output and "test loss" not in output
