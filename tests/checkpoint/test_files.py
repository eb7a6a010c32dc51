"""Which checkpoints are whole, which one a run starts from, which are removed; files only, no engine."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import files, rotation
from scmoe_ds.checkpoint.directories import read_latest
from scmoe_ds.checkpoint.files import DamagedCheckpointError
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.durable_files import file_entry
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.tensor import Split, shard, unshard

SETTINGS = GPTSettings(2, 16, 2, 32, 16)
CONFIG = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4}})
JSON = {"zero_optimization": {"stage": 1}}
DESCRIPTION = fields.describe(SETTINGS, CONFIG, 2, JSON)


def make(root: Path, step: int, description: dict[str, Any] = DESCRIPTION, latest: bool = True) -> Path:
    """A checkpoint as `save` leaves it, with tensors of two ranks."""
    part, final = root / f"global_step{step}.part", root / f"global_step{step}"
    part.mkdir(parents=True)
    for rank in (0, 1):
        torch.save(torch.full((50,), 2 * step + rank), part / f"rank_{rank}.pt")
    (part / files.DESCRIPTION_FILE).write_text(json.dumps(description))
    before = read_latest(root)
    rotation.publish(part, final, {file.name: file_entry(file) for file in part.iterdir()})
    if not latest and before is not None:
        (root / "latest").write_text(before)
    return final


def tags(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "latest")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def alter(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_checksum_is_the_whole_files(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # several blocks
    (tmp_path / "file").write_bytes(content)
    assert file_entry(tmp_path / "file") == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}


DAMAGE = {
    "bit": (flip_a_bit, r"rank_1\.pt is damaged: its checksum is \w{8} instead of \w{8}\. Name an earlier"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"rank_1\.pt has \d+ bytes instead of \d+; "),
    "missing": (lambda file: file.unlink(), r"rank_1\.pt is missing; .*--auto-resume"),
    "bit in the description": (
        lambda file: alter(file.with_name("scmoe.json"), '"num_layers": 2', '"num_layers": 4'),
        r"scmoe\.json is damaged",
    ),
    "no manifest": (
        lambda file: file.with_name("scmoe_files.json").unlink(),
        r"scmoe_files\.json cannot be read \(No such file",
    ),
    "torn manifest": (
        lambda file: file.with_name("scmoe_files.json").write_text('{"a"'),
        r"scmoe_files\.json is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_auto_resume_takes_the_one_before(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = DAMAGE[case]
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    damage(newer / "rank_1.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
    with caplog.at_level(logging.WARNING, "scmoe_ds"):
        source = checkpoint.choose(None, str(tmp_path), True, DESCRIPTION)
    assert source is not None and source.path == older and not source.changed
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "passed over: --auto-resume" in warnings[0] and "global_step10" in warnings[0]
    assert warnings[0].endswith("An earlier one is looked for")


def test_auto_resume(tmp_path: Path) -> None:
    root, other = tmp_path / "saved", tmp_path / "other"

    def choose(load: str | None = None) -> Path | None:
        source = checkpoint.choose(load, str(root), True, DESCRIPTION)
        return None if source is None else source.path

    start = make(other, 3)
    assert choose() is None, "nothing there: from scratch"
    assert choose(str(other)) == start, "nothing there: --load is where it starts"
    root.mkdir()
    (root / "global_step30.part").mkdir()
    (root / "removing-global_step1").mkdir()
    assert choose() is None
    make(root, 9)
    newest = make(root, 100, latest=False)
    (root / "global_step200").mkdir()
    assert choose() == newest, "by number, not by name or by latest; an unfinished one does not count"
    assert choose(str(other)) == newest, "its own checkpoint comes before the start"
    assert checkpoint.choose(str(root), None, False, DESCRIPTION).path == root / "global_step9", "--load follows latest"  # type: ignore[union-attr]
    assert checkpoint.choose(str(newest), None, False, DESCRIPTION).path == newest, "--load of one checkpoint"  # type: ignore[union-attr]
    make(root, 300, fields.describe(GPTSettings(4, 16, 2, 32, 16), CONFIG, 2, JSON))
    with pytest.raises(
        CheckpointError, match=r"--auto-resume .*300 is .* another model: num_layers: 4 in the checkpoint, 2"
    ):
        choose()


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"absent is neither .* \(no such directory\); correct the path, or leave --load"
    ):
        checkpoint.choose(str(tmp_path / "absent"), None, False, DESCRIPTION)
    make(tmp_path, 1)
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"latest names global_step7, but there is no such .*global_step1"):
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
    flat = {**DESCRIPTION["model"], "number of processes": 2}
    with pytest.raises(CheckpointError, match=r"written by an earlier version"):
        make(tmp_path, 2, flat)
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)


def test_what_binds_and_what_does_not() -> None:
    other = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, "expert_parallel_size": 4, "capacity_factor": 1.5}})
    now = fields.describe(SETTINGS, other, 4, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    fields.check_model(DESCRIPTION, now, "it")
    changed = fields.changed_layout(DESCRIPTION, now)
    assert changed == {
        "number of processes": (2, 4),
        "scmoe.expert_parallel_size": (1, 4),
        "zero_optimization.stage": (1, 2),
        "precision": ("fp32", "bf16"),
    }
    assert fields.layout_text({"a": (1, 2), "b": (3, 4)}) == "from a 1, b 3 to a 2, b 4"
    assert fields.changed_layout(DESCRIPTION, DESCRIPTION) == {}
    for stage, message in ((0, r"stage = 0 binds"), (3, r"stage = 3 binds")):
        with pytest.raises(CheckpointError, match=message):
            fields.check_layout_is_free({**now["layout"], "zero_optimization.stage": stage}, "it")
    with pytest.raises(CheckpointError, match="round_robin_gradients = True binds"):
        fields.check_layout_is_free({**now["layout"], fields.ROUND_ROBIN: True}, "it")
    settings, config = fields.rebuild(json.loads(json.dumps(now)))
    assert settings == SETTINGS and config.num_experts == 4 and config.capacity_factor == 1.5
    assert config.expert_parallel_size == 1


def test_a_layout_that_binds_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    make(tmp_path, 1)
    now = fields.describe(SETTINGS, CONFIG, 2, {"zero_optimization": {"stage": 0}})
    with pytest.raises(CheckpointError, match=r"\(this run\): zero_optimization.stage = 0 binds"):
        checkpoint.choose(str(tmp_path), None, False, now)


def test_keep_last(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        make(tmp_path, step)
    (tmp_path / "global_step5").mkdir()  # of somebody else
    rotation.remove_old(tmp_path, 2)
    assert tags(tmp_path) == ["global_step10", "global_step11", "global_step5"]
    (tmp_path / "latest").write_text("global_step10")
    rotation.remove_old(tmp_path, 1)
    assert tags(tmp_path) == ["global_step10", "global_step11", "global_step5"], "latest, and what is newer, stays"
    make(tmp_path, 12)
    rotation.remove_old(tmp_path, 1)
    assert tags(tmp_path) == ["global_step12", "global_step5"]


def test_the_last_checkpoint_that_a_validation_passed_stays(tmp_path: Path) -> None:
    """`save` asks before it writes; a validation at iteration 25 has passed the weights of 20, not those of 30."""

    def save(step: int, validated: int | None) -> list[str]:
        known = rotation.last_validated(tmp_path, step, validated)
        make(tmp_path, step, {**DESCRIPTION, rotation.VALIDATED: known})
        rotation.remove_old(tmp_path, 1)
        return tags(tmp_path)

    assert save(10, None) == ["global_step10"]
    assert save(20, None) == ["global_step20"], "no validation yet"
    assert save(30, 25) == ["global_step20", "global_step30"]
    assert save(40, 25) == ["global_step20", "global_step40"], "what is between them goes"
    assert save(50, None) == ["global_step20", "global_step50"], "after a resume, before its first validation"
    assert save(60, None) == ["global_step20", "global_step60"]
    assert save(70, 70) == ["global_step70"]
    assert save(75, 75) == ["global_step75"]


def test_a_removal_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    kept = make(tmp_path, 2)
    remove = rotation.shutil.rmtree

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "rank_0.pt").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rotation.shutil, "rmtree", killed)
        rotation.remove_old(tmp_path, 1)
    assert rotation.shutil.rmtree is remove
    assert checkpoint.choose(None, str(tmp_path), True, DESCRIPTION).path == kept  # type: ignore[union-attr]
    assert files.newest_first(tmp_path) == ["global_step2"], "what is half removed is no candidate"
    rotation.remove_unfinished(tmp_path)
    assert tags(tmp_path) == ["global_step2"]


def test_publishing_again_replaces(tmp_path: Path) -> None:
    first = make(tmp_path, 1)
    (first / "stale.pt").write_bytes(b"of another layout")
    again = make(tmp_path, 1)
    assert again == first and not (again / "stale.pt").exists() and tags(tmp_path) == ["global_step1"]
    files.verify(again, "--load")


@pytest.mark.parametrize("rule", [None, Split(0, (8, 4, 4)), Split(0, (6,)), Split(1, (4, 4))])
def test_split_and_merge(rule: Split | None) -> None:
    rows = 6 if rule == Split(0, (6,)) else 16
    full = torch.arange(rows * 8).view(rows, 8)
    parts = [shard(full, rule, rank, 2) for rank in (0, 1)]
    assert torch.equal(unshard(parts, rule), full)
    if rule == Split(0, (8, 4, 4)):
        assert parts[1][:, 0].tolist() == [row * 8 for row in (4, 5, 6, 7, 10, 11, 14, 15)], "its piece of each section"
    assert shard(full, rule, 0, 1) is full


@pytest.mark.parametrize("record", [5, ["seed"], "optimizer"])
def test_a_record_of_the_run_that_is_none_is_damage(record: Any, tmp_path: Path) -> None:
    older = make(tmp_path, 1)
    make(tmp_path, 2, {**DESCRIPTION, "run": record})
    with pytest.raises(DamagedCheckpointError, match="global_step2: the checkpoint cannot be read"):
        checkpoint.choose(str(tmp_path), None, False, DESCRIPTION)
    assert checkpoint.choose(None, str(tmp_path), True, DESCRIPTION).path == older  # type: ignore[union-attr]
