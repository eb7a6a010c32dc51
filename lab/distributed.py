"""Runs a function on several gloo processes and returns what each of them returned.

The processes are forked from a server that has imported the packages already: an import takes longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 240
PRELOADED = [
    "pytest",
    "torch",
    "deepspeed",
    "megatron.core",
    "transformers.modeling_utils",
    "scmoe_ds.programs.pretrain_gpt",
    "scmoe_ds.replace",
]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int | str) -> dict[str, str]:
    """The variables that a launcher sets for one of several processes of this machine."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def environment_of_one() -> dict[str, str]:
    """For a program of its own: without the variables of the process group that this process is in."""
    joined = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in joined}


def preload() -> None:
    """Says what the server imports; without effect once it runs."""
    multiprocessing.set_forkserver_preload(PRELOADED)


def run_distributed(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """`function(*arguments)` on every rank, inside a DeepSpeed process group on loopback.

    Args:
        function: importable from a test module; its result must be picklable by torch.save.

    Raises:
        RuntimeError: a rank failed (with its traceback), or did not end in time.
    """
    with tempfile.TemporaryDirectory() as directory:
        preload()
        context = mp.start_processes(
            _worker,
            (dict(os.environ), ranks, free_port(), directory, function, arguments),
            nprocs=ranks,
            join=False,
            start_method="forkserver",
        )
        assert context is not None
        # join() returns as soon as one process has ended; it is called until all have.
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=5):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise RuntimeError(f"{function.__name__} on {ranks} ranks did not end within {timeout_s} s: a hang?")
        files = [Path(directory) / str(rank) for rank in range(ranks)]
        return [torch.load(file, weights_only=False) for file in files]


def _worker(
    rank: int,
    environment: dict[str, str],
    ranks: int,
    port: int,
    directory: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)  # the server has that of its own start
    os.environ.update(rank_environment(rank, ranks, port))
    from scmoe_ds.engine import connect

    connect()
    torch.save(function(*arguments), Path(directory) / str(rank))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
