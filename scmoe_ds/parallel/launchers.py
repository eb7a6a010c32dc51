"""Finds what started this process: the rank that a launcher gave it, and the launcher's own processes."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import zlib
from collections.abc import MutableMapping
from contextlib import suppress

import psutil

from scmoe_ds.errors import LauncherError

_MPI = r"mpirun|mpiexec\S*|orterun|prterun|orted|prted|prte|hydra\S*"
_LAUNCHER = re.compile(rf"({_MPI}|deepspeed|ds|torchrun|accelerate|srun|slurmstepd\S*)$")
_INTERPRETER = re.compile(r"python|pypy|sh$|bash$|env$")
_MODULES = re.compile(r"deepspeed\.launcher\.\w+|torch\.distributed\.(run|launch)|accelerate\.commands\S*")
_PR_SET_PDEATHSIG = 1


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Uses the ranks of Open MPI or Slurm when no launcher has set RANK.

    A process that a user starts by hand inside an allocation has Slurm's variables too, but it is no task of a step.

    Raises:
        LauncherError: there is no address at which the ranks can meet.
    """
    if "RANK" in environment:
        return
    if "OMPI_COMM_WORLD_RANK" in environment and _under_mpi():
        on_one_host = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment.get("OMPI_COMM_WORLD_SIZE")
        variables = "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_SIZE"
        _adopt(environment, "Open MPI", variables, on_one_host, environment.get("PMIX_NAMESPACE", ""))
    # An interactive shell under `srun --pty` is a task, but the programs that are started in it are not.
    elif "SLURM_STEP_ID" in environment and "SLURM_PTY_PORT" not in environment:
        job = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
        on_one_host = environment.get("SLURM_STEP_NUM_NODES") == "1"
        _adopt(environment, "Slurm", "SLURM_PROCID SLURM_LOCALID SLURM_STEP_NUM_TASKS", on_one_host, job)


def _adopt(environment: MutableMapping[str, str], name: str, variables: str, on_one_host: bool, job: str) -> None:
    rank, local_rank, ranks = (environment.get(variable) for variable in variables.split())
    if rank is None or local_rank is None or ranks is None or ranks == "1":
        return
    if "MASTER_ADDR" not in environment:
        if not on_one_host:
            raise LauncherError(
                f"{name} started {ranks} processes on several hosts, but MASTER_ADDR is not set: export it (the "
                "host of rank 0, as the others reach it) and MASTER_PORT, or start with the deepspeed launcher"
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
        # The port is the same on all ranks and another one for another job on this host.
        environment.setdefault("MASTER_PORT", str(20000 + zlib.crc32(job.encode()) % 10000))
    environment.setdefault("MASTER_PORT", "29500")
    environment.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=ranks)


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, even when it is stopped (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def launchers() -> list[psutil.Process]:
    """The launcher's processes on this host, whose end ends the job; empty if a user started this rank by hand.

    They are this process's ancestors up to the last launcher. When pdsh and ssh connect the launcher's parts, they also
    are the ssh server's session, and on the host where the job was started pdsh and what started it.
    """
    above = _ancestors(psutil.Process())
    found = above[: max((place + 1 for place, each in enumerate(above) if _is_launcher(each)), default=0)]
    world = next((word for each in found[:1] for word in _words(each) if word.startswith("--world_info=")), None)
    by_ssh = len(found) == 1 and world is not None and "SSH_CONNECTION" in os.environ and "SSH_TTY" not in os.environ
    if by_ssh:
        session = next((place for place, each in enumerate(above) if _program(each).startswith("sshd")), 0)
        found = above[: session + 1] or found
        for each in psutil.process_iter():
            words = _words(each)
            if world in words and any(os.path.basename(word) == "pdsh" for word in words[:2]):
                found += [each, *(parent for parent in _ancestors(each) if _is_launcher(parent))]
    return found


def _is_launcher(process: psutil.Process) -> bool:
    """Judges by its program: a binary, a script that an interpreter runs, or a module."""
    words = _words(process)[:6]
    programs = [os.path.basename(word.rstrip(":")) for word in words[:3] if not word.startswith("-")]
    modules = [after for word, after in itertools.pairwise(words) if word == "-m"]
    scripts = programs[1:2] if programs and _INTERPRETER.match(programs[0]) else []
    named = any(_LAUNCHER.match(each) for each in programs[:1] + scripts)
    return named or any(_MODULES.fullmatch(each) for each in modules)


def _under_mpi() -> bool:
    return any(re.match(rf"({_MPI})$", _program(each)) for each in _ancestors(psutil.Process()))


def _program(process: psutil.Process) -> str:
    return os.path.basename(next(iter(_words(process)), ""))


def _ancestors(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [each for each in process.parents() if each.pid != 1]
    except psutil.Error:
        return []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
