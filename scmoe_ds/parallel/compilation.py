"""Announces what DeepSpeed compiles at its first use, and removes locks whose owner is dead.

torch's lock is a file that its owner removes. An interrupted compilation leaves it, and every later start would
silently wait for it. A process that compiles also writes a file with its name beside the lock, for other hosts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from deepspeed.ops.op_builder.builder import OpBuilder

from scmoe_ds.compat import build_directory

logger = logging.getLogger("scmoe_ds")
_QUIET_S = 600.0
"""A compilation on another host, whose processes are not visible here, is dead after this long without a new file."""
_NETWORK = ("nfs", "lustre", "beegfs", "gpfs", "ceph", "fuse", "cifs", "smb", "9p", "afs", "panfs", "wekafs")


def announce() -> None:
    """Makes DeepSpeed announce every compilation from here on, and check its lock first."""
    load = OpBuilder.jit_load
    if hasattr(load, "announces"):
        return

    def jit_load(builder: Any, *args: Any, **kwargs: Any) -> Any:
        directory = build_directory(builder.name)
        name = wait_for_lock(directory)
        try:
            if not (directory / f"{builder.name}.so").exists() and os.environ.get("LOCAL_RANK", "0") == "0":
                what = f"DeepSpeed compiles {builder.name} for this machine, once"
                logger.warning(f"{what}: about a minute (in {directory})")
            return load(builder, *args, **kwargs)
        finally:
            with suppress(OSError):
                name.unlink(missing_ok=True)

    jit_load.announces = True  # type: ignore[attr-defined]  # a mark of ours
    OpBuilder.jit_load = jit_load


def wait_for_lock(directory: Path, poll_s: float = 1.0) -> Path:
    """Waits while a lock's owner may live on another host. Removes a lock whose owner is dead.

    Args:
        directory: of one extension.

    Returns:
        a file with this process's name, for other hosts. The caller removes it after the compilation.
    """
    told = False
    while True:
        with _exclusively(directory):  # between look and removal nobody else may remove the lock and take it
            lock, before = directory / "lock", _identity(directory / "lock")
            free = before is None or _is_owned_here(directory)
            if before != _identity(lock):  # released during the search for its owner
                continue
            if not free and (not _may_be_owned_elsewhere(directory) or _quiet_s(directory) > _QUIET_S):
                for file in (lock, *_names_elsewhere(directory)):
                    file.unlink(missing_ok=True)
                logger.warning("removed %s: the compilation that it belongs to was interrupted", lock)
                free = True
            if free:
                for name in directory.glob(f"compiler-{_here()}-*"):
                    if not psutil.pid_exists(int(name.name.split("-")[2])):
                        name.unlink(missing_ok=True)
                name = directory / f"compiler-{_here()}-{os.getpid()}"
                with suppress(OSError):  # a read-only directory
                    name.touch()
                return name
        if not told:
            told = True
            logger.warning(
                f"{lock}: another host or user compiles this, or was interrupted; if nobody does, remove the file "
                f"(this is done after {_QUIET_S / 60:.0f} minutes)"
            )
        time.sleep(poll_s)


def _here() -> str:
    """This host and its namespace of processes: a container counts as another host."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname().replace('-', '_')}_{namespace}"


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _names_elsewhere(directory: Path) -> list[Path]:
    return [name for name in directory.glob("compiler-*-*") if name.name.split("-")[1] != _here()]


def _is_owned_here(directory: Path) -> bool:
    """Whether a process that is visible here has the lock open, as its owner has, or compiles in the directory."""
    lock = str(directory / "lock")
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == str(directory) or any(file.path == lock for file in process.open_files()):
                return True
    return False


def _may_be_owned_elsewhere(directory: Path) -> bool:
    """Whether the owner may be invisible here: on another host, in another container, or of another user."""
    with suppress(FileNotFoundError):
        if os.geteuid() not in (0, (directory / "lock").stat().st_uid):
            return True
    return bool(_names_elsewhere(directory)) or _is_on_network(directory)


def _quiet_s(directory: Path) -> float:
    with suppress(OSError, ValueError):
        return time.time() - max(file.stat().st_mtime for file in directory.iterdir() if "compiler-" not in file.name)
    return 0.0


def _is_on_network(directory: Path) -> bool:
    above = {str(directory), *map(str, directory.parents)}
    mounts = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    innermost = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return innermost is not None and innermost.fstype.startswith(_NETWORK)


@contextmanager
def _exclusively(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
