"""Locks a --save directory for one job. The lock names its holder, and nobody has to remove it by hand.

Rank 0 holds a POSIX lock on a file in the directory while its process lives. The operating system releases it however
the process ends, and no child inherits it. On some network file systems such locks hold for one host only, or do not
exist. Therefore the file also names its holder. A newcomer on the same host looks whether that process lives. A
newcomer on another host waits whether the holder touches the file, as it does every few seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmoe_ds.errors import CheckpointError

logger = logging.getLogger("scmoe_ds")

LOCK_FILE = "scmoe.lock"
REFRESH_S = 5.0
"""Time between two touches of the file."""
STALE_S = 30.0
"""A job on another host counts as ended when it has not touched the file for this long."""
ENDING_S = 3.0
"""A killed process first frees its memory, and only then its lock."""
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_held: DirectoryLock | None = None


def hold(directory: Path) -> None:
    """Makes the directory if necessary and holds its lock until `release` or the end of the process.

    Raises:
        CheckpointError: another job holds it; names host and process.
        OSError: the directory cannot be written.
    """
    global _held
    if _held is None or _held.directory != directory.resolve():
        release()
        _held = DirectoryLock(directory)


def release() -> None:
    """Releases the lock, if this process holds one."""
    global _held
    if _held is not None:
        _held.release()
        _held = None


def require(directory: Path) -> None:
    """Raises a CheckpointError if this process took the directory's lock, but another process has it now."""
    if _held is not None and _held.directory == directory.resolve():
        _held.require()


class DirectoryLock:
    """The lock that `hold` takes."""

    def __init__(self, directory: Path) -> None:
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._made = directory.resolve(), made
        self.path = self.directory / LOCK_FILE
        self._shown = directory
        self._descriptor, has_locks = self._open()
        try:
            holder = self._read()
            if holder is not None and self._lives(holder):
                raise self._refusal(holder)
            self._own = _identity()
            self._write()
            if not has_locks:  # when several jobs start at once, the last to write has the lock
                time.sleep(1)
                self.require()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._refresh, name="lock of --save", daemon=True).start()

    def require(self) -> None:
        """Raises a CheckpointError if another process has taken the lock."""
        found = self._read()
        if not self._is_in_place() or found != self._own:
            raise self._refusal(found)

    def release(self) -> None:
        """Releases the lock, and removes the directory if it was made for the lock and is empty."""
        self._ended.set()
        with suppress(OSError):
            if self._is_in_place() and self._read() == self._own:
                self.path.unlink()
        os.close(self._descriptor)
        if self._made:
            with suppress(OSError):
                self.directory.rmdir()

    def _open(self) -> tuple[int, bool]:
        """The locked file, and whether its file system has locks. The file must not be opened twice: when a process
        closes one descriptor, it releases the lock of the other."""
        deadline = time.monotonic() + ENDING_S
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_locks = True
            except OSError as error:
                holder = self._read()
                if error.errno in _NO_LOCKS:
                    return self._descriptor, False
                os.close(self._descriptor)
                if error.errno in _BUSY and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise self._refusal(holder) if error.errno in _BUSY else error from None
            if self._is_in_place():
                return self._descriptor, has_locks
            os.close(self._descriptor)  # its holder has just removed it

    def _lives(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("place") == _place():
            started = holder.get("process_start")
            return holder.get("pid") != os.getpid() and started is not None and started == _start_of(holder.get("pid"))
        who = f"process {holder.get('pid')} on host {holder.get('host')}"
        logger.info(f"--save {self._shown}: its lock is of {who}; waiting {STALE_S:.0f} s for a sign of life from it")
        before, deadline = os.fstat(self._descriptor).st_mtime_ns, time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_S / 10))
            if not self._is_in_place() or os.fstat(self._descriptor).st_mtime_ns != before:
                return True
        logger.warning(f"--save {self._shown}: no sign of life from {who} for {STALE_S:.0f} s: its lock is taken over")
        return False

    def _is_in_place(self) -> bool:
        try:
            there, own = self.path.stat(), os.fstat(self._descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        content = json.dumps(self._own, indent=1).encode() + b"\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)
        os.fsync(self._descriptor)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            with suppress(OSError):
                os.utime(self._descriptor)

    def _refusal(self, holder: Mapping[str, Any] | None) -> CheckpointError:
        who = "it is starting"
        if holder is not None:
            who = f"host {holder.get('host')}, process {holder.get('pid')}, started {holder.get('since')}"
        return CheckpointError(
            f"--save {self._shown}: another job saves there ({who}; its lock is {LOCK_FILE}). "
            "Wait for its end, end it, or choose another directory"
        )


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _start_of(os.getpid()),
        "place": _place(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _place() -> str:
    """Boot of this machine and namespace of its process ids. Within both, an id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: object) -> int | None:
    """When a process of this place started, in the kernel's ticks; None when it has ended."""
    try:
        status = Path(f"/proc/{int(str(pid))}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    fields = status.rpartition(")")[2].split()  # the command, in parentheses, may contain anything
    return None if fields[0] in "ZX" else int(fields[19])
