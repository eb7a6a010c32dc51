"""What goes wrong between ranks or during a save."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist

from lab.distributed import run_distributed
from scmoe_ds import checkpoint, compat
from scmoe_ds.comm.all_to_all import start
from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.errors import CheckpointError


def late_rank(method: str) -> None:
    """Rank 1 does not come, and rank 0 shall not wait for it for ever; in a group as DeepSpeed makes them."""
    compat.set_default_timeout(timedelta(seconds=2))
    group = deepspeed.comm.new_group([0, 1])
    if dist.get_rank() == 1:
        time.sleep(20)
    start(torch.ones(4, 2), Transport(group, method)).wait()


@pytest.mark.parametrize("method", METHODS)
def test_no_group_waits_for_ever(method: str) -> None:
    with pytest.raises(Exception, match=r"Timed out waiting 2000ms|Application timeout caused pair closure"):
        run_distributed(late_rank, 2, method)


def interrupted_saves(directory: str) -> list[str]:
    """The checkpoint in use after each of: a save, one that fails half way, one that fails at its end."""

    def write(save_dir: str, tag: str, client_state: dict, save_latest: bool) -> None:
        assert not save_latest, "DeepSpeed would switch before every rank has written"
        if tag == "global_step2.part":
            raise OSError(28, "No space left on device")
        Path(save_dir, tag, f"rank_{dist.get_rank()}.pt").write_bytes(b"weights")
        if tag == "global_step3.part" and dist.get_rank() == 0:
            Path(save_dir, tag, checkpoint.MANIFEST_FILE).mkdir()  # cannot be written

    checkpoint.claim(directory)
    engine = SimpleNamespace(
        save_checkpoint=write, overlap=SimpleNamespace(state=lambda: None), module=torch.nn.Module(), optimizer=None
    )
    used = []
    for iteration in (1, 2, 3, 4):
        with contextlib.suppress(CheckpointError):
            checkpoint.save(engine, directory, iteration, 0, {})
        dist.barrier()
        used.append((Path(directory) / "latest").read_text())
    assert not list(Path(directory).glob("*.part"))
    checkpoint.release()
    return used


def claims(free: str, taken: str) -> list[str]:
    """What each rank hears about both directories; the process that started the ranks saves in the second."""
    heard = []
    for directory in (free, taken):
        try:
            checkpoint.claim(directory)
            heard.append("free")
        except CheckpointError as error:
            heard.append(str(error))
    return heard


def test_all_ranks_hear_that_another_job_saves_there(tmp_path: Path) -> None:
    checkpoint.claim(tmp_path / "taken")
    try:
        first, second = run_distributed(claims, 2, str(tmp_path / "free"), str(tmp_path / "taken"))
    finally:
        checkpoint.release()
    assert first[0] == second[0] == "free"
    assert (
        first[1] == second[1]
        and f"another job saves there (host {socket.gethostname()}, process {os.getpid()}" in first[1]
    )


def test_an_interrupted_save_leaves_the_last_checkpoint_in_use() -> None:
    with tempfile.TemporaryDirectory() as directory:
        used = ["global_step1", "global_step1", "global_step1", "global_step4"]
        assert run_distributed(interrupted_saves, 2, directory) == [used, used]
