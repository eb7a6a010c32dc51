"""A rank that ends while a thread of its process group still holds a tensor."""

from __future__ import annotations

import os
import subprocess
import sys

from lab.distributed import free_port, rank_environment

# Rank 1 holds the interpreter's lock from the moment when a thread has ended its collective, and waits for the lock to
# let go of the tensor, until its interpreter is shutting down. There the last object of its module lets threads run.
PROGRAM = """
import argparse, sys, time, torch, torch.distributed as dist
from benchmarks.harness.on_nodes import parse

class Last:
    sleep = time.sleep
    def __del__(self):
        self.sleep(0.5)

def rank_main(settings):
    last.group = dist.group.WORLD  # a layer knows its group, too
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(0.3)
        dist.all_reduce(torch.ones(2))
    else:
        sys.setswitchinterval(1000)
        dist.all_reduce(torch.ones(2), async_op=True)
        begun = time.monotonic()
        while time.monotonic() < begun + 1:
            pass
    return settings

last = Last()
parse(argparse.ArgumentParser(), rank_main)
"""


def test_a_rank_ends_well_while_a_thread_of_its_group_lets_go_of_a_tensor() -> None:
    """The interpreter's own end would abort it: "terminate called without an active exception"."""
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, "--rank-settings", '{"of": 1}']
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **rank_environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (printed, _), (_, errors) = [rank.communicate(timeout=120) for rank in ranks]
    assert ranks[1].returncode == 0 and "terminate called" not in errors, errors
    assert 'RECORD {"of": 1}' in printed
