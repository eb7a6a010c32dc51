"""Whatever happens to a file of a checkpoint: it is passed over or refused by name, or what is read is what was written.

In-process: no engine, no process group.
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import files, tensor_files
from scmoe_ds.checkpoint.files import DamagedCheckpointError
from scmoe_ds.errors import CheckpointError
from tests.checkpoint.test_files import DESCRIPTION, alter, make

FLIPS = 1500


def choose(root: Path) -> Path | None:
    source = checkpoint.choose(None, str(root), True, DESCRIPTION)
    return None if source is None else source.path


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / files.MANIFEST_FILE).read_text())


def write_manifest(directory: Path, manifest: Any) -> None:
    (directory / files.MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", [files.MANIFEST_FILE, files.DESCRIPTION_FILE, "rank_1.pt"])
def test_a_flipped_bit_anywhere_is_passed_over(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint before is used, and the log names the newer one; there is no flip without effect."""
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    file, rng = newer / name, random.Random(0)
    whole = file.read_bytes()
    for _ in range(FLIPS // 3):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        caplog.clear()
        assert choose(tmp_path) == older, content
        assert "global_step10" in caplog.text and "passed over" in caplog.text


def test_a_flipped_bit_in_latest(tmp_path: Path) -> None:
    steps = (9, 10, 11, 12)
    for step in steps:
        make(tmp_path, step)
    latest, found = tmp_path / "latest", set()
    whole = latest.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        latest.write_bytes(content)
        try:
            source = checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
        except CheckpointError as error:
            assert f"--load {tmp_path}: latest " in str(error) and "global_step12" in str(error)
        else:
            assert source is not None
            found.add(source.path.name)
    assert found == {"global_step10"}, "the one other checkpoint that is a bit away from global_step12"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # of the bits that are flipped
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_flipped_bit_in_tensors_whose_checksum_nobody_compares(kind: str, tmp_path: Path) -> None:
    """`generate` with experts in files compares sizes only."""
    file, rng = tmp_path / "a.pt", random.Random(0)
    torch.save(
        {"stage": ZeroStageEnum(1), "w": {"a.b": torch.ones(20), "c": [torch.zeros(3, 4), "text", 1.5]}},
        file,
        _use_new_zipfile_serialization=kind == "zip",
    )
    whole, refused = file.read_bytes(), 0
    for _ in range(FLIPS // 5):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            tensor_files.read(file)
        except CheckpointError as error:
            assert f"--load {tmp_path}: a.pt " in str(error)
            refused += 1
    assert refused > FLIPS // 50


def _set(entry: Any) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        write_manifest(directory, {**manifest_of(directory), "rank_1.pt": entry})

    return act


def _add(name: str) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        manifest = manifest_of(directory)
        write_manifest(directory, {**manifest, name: manifest["rank_1.pt"]})

    return act


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    content = text.encode() if isinstance(text, str) else text
    return lambda directory: (directory / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def _replaced(name: str, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / name).unlink()
        act(directory / name)

    return replace


def _drop(directory: Path) -> None:
    manifest = manifest_of(directory)
    del manifest["rank_1.pt"]
    write_manifest(directory, manifest)


def _link(directory: Path) -> None:
    outside = directory.parent / "elsewhere.pt"
    shutil.move(directory / "rank_1.pt", outside)
    (directory / "rank_1.pt").symlink_to(outside)


GOOD = {"bytes": 1, "crc32": "00000000"}
MANIFEST = r"scmoe_files\.json is damaged"
NAME = r"scmoe_files\.json is damaged .*its entry '.*' is no file's name"
STRUCTURE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (_text(files.MANIFEST_FILE, ""), MANIFEST),
    "no entries": (_text(files.MANIFEST_FILE, "{}"), MANIFEST),
    "a list": (_text(files.MANIFEST_FILE, "[]"), MANIFEST),
    "NaN": (lambda d: alter(d / files.MANIFEST_FILE, '"bytes": ', '"bytes": NaN, "a": '), MANIFEST),
    "a huge integer": (_text(files.MANIFEST_FILE, '{"a": ' + "9" * 5000 + "}"), MANIFEST),
    "deep nesting": (_text(files.MANIFEST_FILE, "[" * 100_000), MANIFEST),
    "not UTF-8": (_text(files.MANIFEST_FILE, b'{"\xff": 1}'), MANIFEST),
    "sizes only": (_set(7), NAME),
    "a size that is text": (_set({**GOOD, "bytes": "1"}), NAME),
    "a size that is a bool": (_set({**GOOD, "bytes": True}), NAME),
    "a negative size": (_set({**GOOD, "bytes": -1}), NAME),
    "a checksum that is a number": (_set({**GOOD, "crc32": 0}), NAME),
    "a checksum in capitals": (_set({**GOOD, "crc32": "ABCDEF00"}), NAME),
    "a surplus key": (_set({**GOOD, "mode": 1}), NAME),
    "a missing key": (_set({"bytes": 1}), NAME),
    "a key twice": (lambda d: alter(d / files.MANIFEST_FILE, "rank_1.pt", "rank_0.pt"), MANIFEST),
    "up and out": (_add("../global_step9/rank_1.pt"), NAME),
    "absolute": (_add("/etc/passwd"), NAME),
    "parent": (_add(".."), NAME),
    "itself": (_add("."), NAME),
    "NUL": (_add("rank\0.pt"), NAME),
    "half a character": (_add("\ud800"), NAME),
    "a newline": (_add("rank\n.pt"), NAME),
    "of a file that is not there": (_add("rank_2.pt"), r"rank_2\.pt is missing"),
    "an entry too few": (_drop, r"rank_1\.pt is not named in scmoe_files\.json"),
    "a directory for the manifest": (_replaced(files.MANIFEST_FILE, os.mkdir), r"scmoe_files\.json cannot be read"),
    "a directory for the description": (_replaced(files.DESCRIPTION_FILE, os.mkdir), r"scmoe\.json cannot be read"),
    "a directory for tensors": (_replaced("rank_1.pt", os.mkdir), r"rank_1\.pt is missing"),
    "a pipe for the manifest": (_replaced(files.MANIFEST_FILE, os.mkfifo), r"scmoe_files\.json cannot be read"),
    "a pipe for tensors": (_replaced("rank_1.pt", os.mkfifo), r"rank_1\.pt is missing"),
    "tensors that are linked from elsewhere": (_link, r"rank_1\.pt is a link that leads out"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_what_is_no_manifest(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    damage, message = STRUCTURE[case]
    damage(newer)
    with pytest.raises(DamagedCheckpointError, match=message):
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
    assert choose(tmp_path) == older and "global_step10" in caplog.text


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "no layout": {"layout": None},
    "a layout that is a list": {"layout": []},
    "ranks as text": {"layout": {**DESCRIPTION["layout"], "number of processes": "2"}},
    "a layout of a newer version": {"layout": {**DESCRIPTION["layout"], "--context-parallel-size": 2}},
    "no ranks": {"layout": {**DESCRIPTION["layout"], "--tensor-model-parallel-size": 0}},
    "a model that is text": {"model": "GPT"},
    "no shape": {"gpt": None},
    "a shape with an unknown key": {"gpt": {**DESCRIPTION["gpt"], "colour": "red"}},
    "a section that is a list": {"scmoe": [1]},
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_made_up_description_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Its checksum is right: nobody but its writer has changed it."""
    newer = make(tmp_path, 10, {**DESCRIPTION, **DESCRIPTIONS[case]})
    for load, save, resume in ((str(tmp_path), None, False), (None, str(tmp_path), True)):
        with pytest.raises(CheckpointError, match=newer.name):
            checkpoint.choose(load, save, resume, DESCRIPTION)


@pytest.mark.parametrize("method", ["read_text", "stat", "open"])
def test_files_that_may_not_be_read(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything: the operating system's answer is put in its mouth."""
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    real = getattr(Path, method)

    def refused(self: Path, *args: Any, **named: Any) -> Any:
        if self.parent == newer:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **named)

    monkeypatch.setattr(Path, method, refused)
    assert choose(tmp_path) == older


LATEST = {
    "../other/global_step1": r"latest names '\.\./other/global_step1', which is no checkpoint's name",
    "/etc": r"latest names '/etc', which is no",
    "global_step9\nglobal_step10": r"latest names 'global_step9\\nglobal_step10', which is no",
    "global_step9/../../other/global_step1": "which is no checkpoint's name",
    "global_step10.part": "which is no checkpoint's name",
    "global_step010": "which is no checkpoint's name",
    "global_step\u0661\u0660": "which is no checkpoint's name",
    ".": "which is no checkpoint's name",
    "": r"latest is empty",
    "global_step" + "9" * 5000: "which is no checkpoint's name",
    "\udcff": r"latest cannot be read \(not UTF-8\)",
}


@pytest.mark.parametrize("content", LATEST)
def test_latest_names_a_checkpoint_of_its_directory_or_nothing(content: str, tmp_path: Path) -> None:
    make(tmp_path / "other", 1)
    root, newest = tmp_path / "saved", make(tmp_path / "saved", 10)
    (root / "latest").write_bytes(os.fsencode(content))
    with pytest.raises(CheckpointError, match=LATEST[content]) as caught:
        checkpoint.choose(str(root), None, False, DESCRIPTION)
    assert str(caught.value).endswith(f"name a checkpoint itself: {newest}"), "and this remedy works:"
    assert checkpoint.choose(str(newest), None, False, DESCRIPTION).path == newest  # type: ignore[union-attr]
    assert choose(root) == newest


def test_a_link_to_itself(tmp_path: Path) -> None:
    newest = make(tmp_path, 10)
    loop = tmp_path / "global_step11"
    loop.symlink_to(loop)
    assert choose(tmp_path) == newest
    (tmp_path / "latest").write_text(loop.name)
    with pytest.raises(CheckpointError, match=f"name .* --load {newest}|name a checkpoint itself: {newest}"):
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
    tensors = newest / "rank_0.pt"
    tensors.unlink()
    tensors.symlink_to(tensors)
    with pytest.raises(DamagedCheckpointError, match=tensors.name):
        checkpoint.choose(str(newest), None, False, DESCRIPTION)


def test_links_out_of_the_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other, own = make(tmp_path / "other", 20), make(tmp_path / "saved", 9)
    link = own.with_name(other.name)
    link.symlink_to(other)
    (own.parent / "latest").write_text(link.name)
    with pytest.raises(CheckpointError, match=r"names 'global_step20', which is a link that leads out"):
        checkpoint.choose(str(own.parent), None, False, DESCRIPTION)
    assert choose(own.parent) == own
    assert f"{link} is a link that leads out of the directory; --load {other} uses it" in caplog.text
    assert checkpoint.choose(str(link), None, False, DESCRIPTION) is not None, (
        "what the user names is the user's choice"
    )
    (tmp_path / "linked").symlink_to(own.parent)
    assert choose(tmp_path / "linked") == tmp_path / "linked" / own.name, "the whole directory may be a link"


class Payload:
    """Runs a command when it is read without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("content", ["posix.system", "functools.partial", "builtins.getattr", "eval"])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_class_that_is_no_part_of_a_checkpoint(content: str, kind: str, tmp_path: Path) -> None:

    class Getattr:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (collections.OrderedDict, "clear")

    payload = {
        "posix.system": Payload(tmp_path / "ran"),
        "functools.partial": functools.partial(print, 1),
        "builtins.getattr": Getattr(),
        "eval": eval,
    }[content]
    directory = make(tmp_path, 1)
    torch.save(
        {"w": torch.ones(2), "extra": payload}, directory / "rank_1.pt", _use_new_zipfile_serialization=kind == "zip"
    )
    whole = (directory / "rank_1.pt").read_bytes()
    entry = {"bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"}
    write_manifest(directory, {**manifest_of(directory), "rank_1.pt": entry})
    for load, save, resume, flag in (
        (str(tmp_path), None, False, "--load"),
        (None, str(tmp_path), True, "--auto-resume"),
    ):
        with pytest.raises(
            CheckpointError, match=rf"^{flag} .*rank_1\.pt holds (builtins\.)?{content}, which is no part of a check"
        ):
            checkpoint.choose(load, save, resume, DESCRIPTION)
    assert not (tmp_path / "ran").exists()


def test_auto_resume_is_not_loud_about_whole_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scmoe_ds"):
        assert choose(make(tmp_path, 3).parent) == tmp_path / "global_step3"
    assert not caplog.records
