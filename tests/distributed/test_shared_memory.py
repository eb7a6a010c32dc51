"""What DeepSpeed's CPU collectives share must not stay in the machine's memory when a job has ended, however it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.distributed import free_port, rank_environment
from scmoe_ds.parallel.shared_memory import DIRECTORY

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, torch, deepspeed.comm
import scmoe_ds.parallel.process as engine
names = lambda: [name for name in os.listdir("/dev/shm") if f"_{os.environ['MASTER_PORT']}_" in name]
forget = engine.forget_names
engine.forget_names = lambda: (print("named:", len(names())), forget())
engine.connect()
deepspeed.comm.barrier()
summed = torch.ones(4096)
deepspeed.comm.inference_all_reduce(summed)
print("left:", len(names()), "sum:", summed[0].item(), flush=True)
os.kill(os.getpid(), 9)
"""


NO_ROOM = """
import os
from scmoe_ds.parallel import shared_memory
if os.environ["RANK"] == "1":  # has looked when rank 0 had taken the last of it
    shared_memory.room_bytes = lambda: 66 << 20
"""


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="no /dev/shm")
def test_no_buffer_outlives_its_job() -> None:
    outputs, port = run(PROGRAM)
    if "named: 0" in outputs[0] + outputs[1]:
        pytest.skip("DeepSpeed shares no memory here")
    for output in outputs:
        assert "left: 0 sum: 2.0" in output
    assert not list(DIRECTORY.glob(f"deepspeed_*_{port}_*"))


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="no /dev/shm")
def test_without_room_collectives_go_through_torch() -> None:
    """64 MiB are what Docker gives: DeepSpeed does not notice, and its ranks end by a segmentation fault."""
    for output in run(NO_ROOM + PROGRAM)[0]:
        assert "named: 0" in output and "left: 0 sum: 2.0" in output


def run(program: str) -> tuple[list[str], int]:
    port, ranks = free_port(), []
    for rank in range(2):
        joined = rank_environment(rank, 2, port)
        environment = {**os.environ, **joined, "LOCAL_SIZE": "2", "PYTHONPATH": str(ROOT)}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        )
    return [process.communicate(timeout=240)[0] for process in ranks], port
