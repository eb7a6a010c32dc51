"""The file of trained experts: nobody's but its run's, from the first byte to the last."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from scmoe_ds.offload.files import ExpertFile
from scmoe_ds.offload.pages import PAGE_BYTES, page_aligned
from scmoe_ds.offload.records import FileRecords

CPU = torch.device("cpu")


def descriptors(directory: Path) -> int:
    """How many this process has of files in a directory, or of what were files there."""
    found = 0
    for each in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{each}").startswith(str(directory))
        except OSError:  # that of this listing
            continue
    return found


def test_a_file_has_no_name_when_it_takes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, names = os.posix_fallocate, []

    def noted(*arguments: int) -> None:
        names.append(os.listdir(tmp_path))
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    FileRecords(str(tmp_path), [[PAGE_BYTES]], CPU)
    assert names == [[]]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not list descriptors")
def test_a_file_is_closed_with_its_user(tmp_path: Path) -> None:
    records = FileRecords(str(tmp_path), [[PAGE_BYTES]] * 2, CPU)
    value, found = page_aligned(PAGE_BYTES).fill_(3), page_aligned(PAGE_BYTES)
    records.write(1, 0, value).result()
    records.read(1, 0, found).result()
    assert torch.equal(value, found) and descriptors(tmp_path)
    del records
    (tmp_path / "export").write_bytes(bytes(PAGE_BYTES))
    file = ExpertFile(tmp_path / "export", "")
    file._without_direct_reads()
    file.read(0, PAGE_BYTES, [found.numpy().data])
    assert not found.any()
    del file
    gc.collect()
    assert not descriptors(tmp_path)
