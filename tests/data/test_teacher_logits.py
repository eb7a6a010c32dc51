"""The directory of a teacher's logits: what is written is read, and nothing of anybody else's is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.data.teacher_logits import MANIFEST_FILE, TeacherLogits, bytes_of, open_directory
from scmoe_ds.errors import DataError

SEQUENCE, BEST = 6, 3
MADE_OF = {"corpus": ["abc"], "tokenizer": "def", "teacher": "123", "seed": 1}
FLAG = "--teacher-logits"


def opened(path: Path, made_of: Mapping[str, Any] = MADE_OF) -> TeacherLogits:
    return open_directory(path / "of teacher", FLAG, made_of, micro_batch_size=24)


def tokens(numbers: range) -> Tensor:
    return torch.stack([torch.arange(SEQUENCE) + 100 * number for number in numbers])


def of_teacher(numbers: range) -> list[Tensor]:
    ids = torch.stack([torch.arange(SEQUENCE * BEST).view(SEQUENCE, BEST) + number for number in numbers])
    return [ids, -ids.float() / 64, -ids[..., 0].float() / 7]


def fill(store: TeacherLogits, samples: int) -> None:
    for numbers in store.missing(samples):
        store.write(numbers, tokens(numbers), of_teacher(numbers))


def test_what_is_written_is_read_over_the_borders_of_files(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.samples_of_file == 72  # whole micro-batches of 24
    assert store.missing(150) == [range(72), range(72, 144), range(144, 150)]
    fill(store, 150)
    for numbers in (range(2), range(70, 75), range(144, 150)):
        ids, log_p, log_rest = opened(tmp_path).read(numbers, tokens(numbers))
        exact = of_teacher(numbers)
        assert torch.equal(ids, exact[0].int()) and torch.equal(log_rest, exact[2])
        torch.testing.assert_close(log_p.float(), exact[1], rtol=2**-11, atol=0)  # fp16


def test_an_interrupted_pass_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store, 150)
    (store.directory / "samples-000000072.safetensors").unlink()
    (store.directory / "samples-000000072.safetensors.0123.tmp").write_bytes(b"half")
    assert opened(tmp_path).missing(150) == [range(72, 144)]
    assert opened(tmp_path).missing(300) == [range(72, 144), range(144, 216), range(216, 288), range(288, 300)]
    fill(opened(tmp_path), 300)  # a longer run
    opened(tmp_path).read(range(148, 152), tokens(range(148, 152)))


def test_bytes_on_disk_are_foretold(tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store, 72)
    (file,) = store.directory.glob("*.safetensors")
    assert bytes_of(72, SEQUENCE, BEST) <= file.stat().st_size <= bytes_of(72, SEQUENCE, BEST) + 512  # a header


@pytest.mark.parametrize("name", sorted(MADE_OF))
def test_logits_of_something_else_are_refused(name: str, tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(DataError, match=f"made with {name} .*, but this run has other; name another directory"):
        opened(tmp_path, {**MADE_OF, name: "other"})


def test_other_samples_under_the_same_numbers_are_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store, 72)
    changed = tokens(range(4, 6))
    changed[1, 3] += 1
    with pytest.raises(DataError, match="read other tokens as training sample 5; name another directory"):
        store.read(range(4, 6), changed)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "of teacher").mkdir()
    (tmp_path / "of teacher" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds notes\.txt, but no manifest\.json"):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "scmoe_ds teacher logits, 1"}'])
def test_a_damaged_manifest_is_one_sentence(content: str, tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "of teacher" / MANIFEST_FILE).write_text(content)
    with pytest.raises(DataError, match="name another directory"):
        opened(tmp_path)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store, 72)
    (file,) = store.directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{file.name} cannot be read .*; remove it, and the next start"):
        store.read(range(2), tokens(range(2)))
