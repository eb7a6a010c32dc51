"""Two machines in one: `nodes.Nodes` whose nodes have their own processes, mounts, hostname and ssh server.

    with TwoMachines() as machines:
        job = machines.run_on(0, ["deepspeed", "--hostfile", "hostfile", …], directory=shared, output=log)
        machines.power_off(1)

DeepSpeed's launchers start jobs in them as in a cluster: hosts are `HOSTS`, ssh asks no password, the file system is
shared but for /dev/shm and /run. Linux, root, and the Debian packages of `make cluster-packages`;
`machines_available()` says why not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from lab.nodes import _SIGNALS, ADDRESSES, PREFIX, Nodes, _kill_all_in, _run

HOSTS = ("node0", "node1")
COMMANDS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
_FILES = Path("/etc/netns")  # `ip netns exec` binds what is in <namespace>/ here over /etc
_START_S = 20.0

# The client's key and the hosts' keys are bound over /etc/ssh in the nodes: the machine's own files are not touched.
_SSH_CONFIG = """Host *
IdentityFile /etc/ssh/client_key
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
LogLevel ERROR
"""
# ClientAlive: what a dead launcher's node left here ends, too.
_SSHD_CONFIG = """HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/client_key.pub
PermitRootLogin yes
PasswordAuthentication no
PrintMotd no
ClientAliveInterval 5
ClientAliveCountMax 3
"""
# Process 1 of a node. What root has set up for itself (keys, a shell that takes a lock) is hidden; /run is for sshd.
_INIT = """set -e
hostname {host}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
if [ -f ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi
exec {sshd} -D -e
"""


class TwoMachines(Nodes):
    """Context manager: `Nodes` with process, mount, hostname and IPC namespaces and an sshd per node.

    All of it is gone after the block, in the cases that `Nodes` names. Entering raises RuntimeError with what is
    missing or refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoMachines:
        for command, package in COMMANDS.items():
            if shutil.which(command, path=_search_path()) is None:
                raise RuntimeError(f"no command {command} (package {package}; `make cluster-packages` installs it)")
        super().__enter__()
        try:
            for path in _FILES.glob(f"{PREFIX}-*"):
                if not Path("/proc", path.name.split("-")[1]).exists():  # its owner ended by SIGKILL
                    _remove_files(path)
            self._write_files()
            for node in range(2):
                self._start_node(node)
            for node in range(2):
                self._wait_for_ssh(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        if os.getpid() != self._owner:
            return
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for process in self.running.values():
                process.kill()
                process.wait()
            self.running.clear()
            super().__exit__(*details)
            for name in self.names:
                _remove_files(_FILES / name)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def run_on(
        self,
        node: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        directory: str | os.PathLike[str] = "/",
        output: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a node; stdout and stderr both go to `output`.

        The returned process waits for the command and ends with its exit code; signals reach the command through
        `send_signal`, not through the returned process.
        """
        enter = ["nsenter", "-t", str(self._init(node).pid), "-n", "-u", "-i", "-p", "-m"]
        return subprocess.Popen(
            [*enter, "env", "-C", os.fspath(directory), *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for the caller
        )

    @staticmethod
    def send_signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Sends a signal to the command that `run_on` started."""
        (command,) = psutil.Process(process.pid).children()
        command.send_signal(number)

    def processes(self, node: int) -> dict[int, str]:
        """Process id (on the outer machine) to command line of all that runs on a node, but for its init and sshd."""
        found = {}
        for pid in _run("ip", "netns", "pids", self.names[node]).split():
            with suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if process.status() != psutil.STATUS_ZOMBIE and process.name() not in ("sshd", "unshare"):
                    found[process.pid] = " ".join(process.cmdline()) or process.name()
        return found

    def pids(self, node: int, words: str) -> list[int]:
        """Processes of a node whose command line contains `words`."""
        return [pid for pid, command in self.processes(node).items() if words in command]

    def link(self, up: bool) -> None:
        """Cuts or restores the link between the nodes; connections are neither closed nor told."""
        _run("ip", "-n", self.names[1], "link", "set", "eth0", "up" if up else "down")

    def power_off(self, node: int) -> None:
        """Ends all of a node at once, without a last word to the other."""
        _run("ip", "-n", self.names[node], "link", "set", "eth0", "down")  # or the kernel would close its connections
        process = self.running.pop(node)
        process.kill()
        process.wait()
        _kill_all_in([self.names[node]])

    def power_on(self, node: int) -> None:
        """Starts a node again; returns when ssh reaches it."""
        _run("ip", "-n", self.names[node], "link", "set", "eth0", "up")
        self._start_node(node)
        self._wait_for_ssh(node)

    def _write_files(self) -> None:
        """/etc/netns/<namespace>/ of both nodes: hosts, nsswitch.conf, ssh/ with one client key and own host keys."""
        hosts = "127.0.0.1 localhost\n" + "".join(f"{a} {h}\n" for a, h in zip(ADDRESSES, HOSTS, strict=False))
        with tempfile.TemporaryDirectory() as keys:
            for name in ("client_key", *HOSTS):
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", f"{keys}/{name}")
            known = "".join(f"{host} {Path(keys, f'{host}.pub').read_text()}" for host in HOSTS)
            for name, host in zip(self.names, HOSTS, strict=True):
                ssh = _FILES / name / "ssh"
                ssh.mkdir(parents=True)
                (ssh.parent / "hosts").write_text(hosts)
                (ssh.parent / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
                (ssh / "known_hosts").write_text(known)
                (ssh / "ssh_config").write_text(_SSH_CONFIG)
                (ssh / "sshd_config").write_text(_SSHD_CONFIG)
                for source, target in (
                    ("client_key", "client_key"),
                    ("client_key.pub", "client_key.pub"),
                    (host, "host_key"),
                    (f"{host}.pub", "host_key.pub"),
                ):
                    shutil.copy(Path(keys, source), ssh / target)

    def _start_node(self, node: int) -> None:
        init = _INIT.format(host=HOSTS[node], sshd=shutil.which("sshd", path=_search_path()))
        command = [*self.prefix(node), "setpriv", "--pdeathsig", "KILL"]  # a dead owner's nodes do not live on
        command += ["unshare", "-u", "-i", "-p", "-m", "--fork", "--kill-child", "--mount-proc", "bash", "-c", init]
        with open(self._log(node), "wb") as log:
            self.running[node] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for_ssh(self, node: int) -> None:
        """Tries from node 0 until it works.

        Raises:
            RuntimeError: it does not within `_START_S`, or the node ended; with its last words.
        """
        deadline, answer = time.monotonic() + _START_S, ""
        while time.monotonic() < deadline and self.running[node].poll() is None:
            with suppress(ProcessLookupError):  # node 0 has no process 1 yet
                trial = self.run_on(0, ["ssh", "-oConnectTimeout=5", HOSTS[node], "hostname"])
                answer = trial.communicate()[0].decode(errors="replace").strip()
                if answer == HOSTS[node]:
                    return
            time.sleep(0.05)
        words = self._log(node).read_text(errors="replace").strip()
        raise RuntimeError(f"{HOSTS[node]} did not start, or ssh does not reach it: {answer} {words[-1000:]}".strip())

    def _init(self, node: int) -> psutil.Process:
        """Process 1 of a node, or ProcessLookupError."""
        with suppress(psutil.Error, KeyError):
            for child in psutil.Process(self.running[node].pid).children():
                if child.name() == "sshd":  # bash before: it has not mounted all yet
                    return child
        raise ProcessLookupError(f"{HOSTS[node]} does not run")

    def _log(self, node: int) -> Path:
        return _FILES / self.names[node] / "ssh" / "sshd.log"


@cache
def machines_available() -> str | None:
    """None if two machines can be made here, otherwise the reason why not."""
    if os.geteuid() != 0:
        return "namespaces need root"
    try:
        with TwoMachines():
            pass
    except RuntimeError as error:
        return str(error)
    return None


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])


def _remove_files(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):  # others use it, or had made it
        _FILES.rmdir()
