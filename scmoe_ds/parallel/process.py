"""Makes a process a rank, and ends it: reads what a launcher set, meets the others, with one limit for all waits."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from datetime import timedelta
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from scmoe_ds.compat import set_default_timeout, set_world_timeout
from scmoe_ds.errors import LauncherError, first_line
from scmoe_ds.parallel import compilation, standing, watch
from scmoe_ds.parallel.agreement import wait_for_all
from scmoe_ds.parallel.failures import leave
from scmoe_ds.parallel.launchers import adopt_launcher
from scmoe_ds.parallel.nccl import PRIORITY, prefer_communication
from scmoe_ds.parallel.output import log
from scmoe_ds.parallel.shared_memory import forget_names, require_room

_LATE_START_S = 10.0
"""Ranks do not start at the same moment. The first wait may take this much longer than a collective."""

_SLACK_S = 3.0


def connect(timeout: timedelta | None = None) -> bool:
    """Joins the process group, which expert-parallel layers need before they are built.

    It reads what DeepSpeed's launcher, torchrun, Slurm or MPI have set. A process without a launcher becomes a world of
    one.

    Args:
        timeout: of all collectives of all groups from here on; None leaves DeepSpeed's and torch's defaults.

    Returns:
        whether it was joined here, so that the caller has to destroy it.

    Raises:
        LauncherError: the ranks cannot meet.
    """
    compilation.announce()
    is_first = prefer_communication(os.environ)
    if dist.is_initialized():
        if is_first and dist.get_backend() == "nccl":
            log(
                f"torch.distributed was initialised before scmoe_ds.connect: groups that have communicated stay at "
                f"NCCL's normal priority; export {PRIORITY}=1"
            )
        deepspeed.init_distributed(auto_mpi_discovery=False)  # joins what torch.distributed already is
        forget_names()
        return False
    prepare_environment()
    # NCCL sends Python objects through the current device: without this, every rank of a node would use the first.
    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() == "cuda":
        standing.streams.append(torch.cuda.default_stream())
    if timeout is not None:
        set_default_timeout(timeout)
    timeout = timeout or default_pg_timeout
    meeting = timeout + timedelta(seconds=_LATE_START_S)
    # torch waits without a limit when another service answers at the address, or accepts and stays silent.
    words = str(_cannot_meet(TimeoutError("no answer"), meeting))
    limit_s = meeting.total_seconds() + _SLACK_S
    try:
        with watch.active.limit(limit_s, words) if watch.active is not None else nullcontext():
            if accelerator.device_name() == "cpu":
                # DeepSpeed compiles before the ranks meet, which may take a minute on one node and none on another.
                dist.init_process_group(accelerator.communication_backend_name(), timeout=meeting)
                require_room()
            else:
                deepspeed.init_distributed(auto_mpi_discovery=False, timeout=meeting)
    except dist.DistError as error:
        raise _cannot_meet(error, meeting) from error
    set_world_timeout(timeout)
    if watch.active is not None:
        watch.active.join()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    wait_for_all()
    forget_names()
    return True


def end_rank(code: int = 0) -> NoReturn:
    """The end of a rank whose work is done: leaves the process group and ends the process, without exit handlers.

    gloo's threads hold the tensors of a collective a moment longer than whoever waits for it, and a group's threads
    live as long as a layer that knows the group. A thread that lets go of a tensor while the interpreter shuts down
    asks for its lock. The interpreter then ends the thread inside a destructor, and C++ aborts the process: "terminate
    called without an active exception" (a stack of it was read in torch 2.13). So a rank does not shut down its
    interpreter.
    """
    dist.destroy_process_group()
    leave(code)


def prepare_environment() -> None:
    """Sets torch's environment variables for this process, if no launcher has.

    Raises:
        LauncherError: as `adopt_launcher`; a variable is missing or is no number.
    """
    adopt_launcher()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.setdefault("LOCAL_RANK", "0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name)
        if value is None:
            raise LauncherError(f"{name} is not set, but RANK is: set both, or neither for one process alone")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise LauncherError(f"{name} = {value}: must be a number")


def _cannot_meet(error: Exception, limit: timedelta) -> LauncherError:
    rank, ranks, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return LauncherError(
            f"--master_port (MASTER_PORT) = {port}: another process of {socket.gethostname()} listens on this port; "
            "end that process, or choose another port for all ranks"
        )
    return LauncherError(
        f"rank {rank} did not meet all {ranks} ranks at {os.environ['MASTER_ADDR']}:{port} within "
        f"{limit.total_seconds():.0f} s: look whether each rank was started and reaches that "
        f"address, or raise --distributed-timeout-minutes ({first_line(error, 200)})"
    )


def device() -> torch.device:
    """Where DeepSpeed's accelerator puts this rank's tensors."""
    return torch.device(deepspeed.get_accelerator().current_device_name())
