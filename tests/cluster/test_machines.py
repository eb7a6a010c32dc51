"""The machines are machines: own processes and names, ssh between them, power and a link that can fail; nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import machines as module
from lab.machines import TwoMachines, machines_available

needs_machines = pytest.mark.skipif(
    machines_available() is not None, reason=f"no two machines here: {machines_available()}"
)
ROOT = Path(__file__).parents[2]
ETC = Path("/etc/netns")

HOLD = """
import time
from lab.machines import TwoMachines
with TwoMachines() as machines:
    machines.run_on(1, ["sleep", "1000"])
    print(machines.names[0], flush=True)
    time.sleep(1000)
"""


def said(machines: TwoMachines, node: int, command: str) -> str:
    process = machines.run_on(node, ["sh", "-c", command])
    return process.communicate(timeout=30)[0].decode().strip()


def files() -> dict[Path, bytes]:
    """The machine's own files that the nodes have others of."""
    paths = [Path("/etc/hosts"), Path("/etc/nsswitch.conf"), *Path("/etc/ssh").glob("*"), *Path.home().glob(".ssh/*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def assert_gone(*names: str) -> None:
    assert not set(names) & set(subprocess.check_output(["ip", "netns", "list"], text=True).split())
    assert not [name for name in names if (ETC / name).exists()]


@needs_machines
def test_two_machines_that_know_each_other() -> None:
    before = files()
    with TwoMachines() as machines:
        assert [said(machines, node, "hostname; hostname -I") for node in range(2)] == [
            "node0\n10.10.0.1",
            "node1\n10.10.0.2",
        ]
        assert said(machines, 0, "ssh node1 hostname") == "node1"
        assert said(machines, 0, "pdsh -R ssh -w node0,node1 hostname | sort") == "node0: node0\nnode1: node1"
        assert said(machines, 0, "touch /dev/shm/scmoe_seen; ssh node1 ls /dev/shm") == ""
        assert not Path("/dev/shm/scmoe_seen").exists()
        process = machines.run_on(1, ["sleep", "1000"])
        sleepers = "pgrep -x sleep | wc -l"
        while len(machines.processes(1)) < 2:  # nsenter, and what it starts
            time.sleep(0.02)
        assert said(machines, 0, f"{sleepers}; ssh node1 '{sleepers}'") == "0\n1"
        assert len(machines.pids(1, "sleep")) == 2 and machines.processes(0) == {}
        machines.send_signal(process, signal.SIGTERM)
        assert process.wait(10) != 0 and machines.processes(1) == {}
    assert files() == before
    assert_gone(*machines.names)


@needs_machines
def test_power_and_link() -> None:
    with TwoMachines() as machines:
        process = machines.run_on(1, ["sleep", "1000"])
        machines.link(False)
        assert "timed out" in said(machines, 0, "ssh -oConnectTimeout=1 node1 hostname").lower()
        machines.link(True)
        assert said(machines, 0, "ssh node1 hostname") == "node1"
        machines.power_off(1)
        assert process.wait(10) != 0 and machines.processes(1) == {}
        with pytest.raises(ProcessLookupError, match="node1 does not run"):
            machines.run_on(1, ["true"])
        machines.power_on(1)
        assert said(machines, 0, "ssh node1 hostname") == "node1"
    assert_gone(*machines.names)


@needs_machines
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing(number: signal.Signals) -> None:
    """After SIGKILL all processes are gone at once, and the files when the next machines are made."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    name = holder.stdout.readline().strip()
    names = [name, name.replace("node0", "node1")]
    assert (ETC / name).exists()
    holder.send_signal(number)
    assert holder.wait(20) != 0
    deadline = time.monotonic() + 10
    while number == signal.SIGKILL and any(subprocess.check_output(["ip", "netns", "pids", n]).split() for n in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGKILL:
        with TwoMachines():
            pass
    assert_gone(*names)


def test_a_missing_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(module.shutil, "which", lambda name, **more: None if name == "pdsh" else which(name, **more))
    with pytest.raises(RuntimeError, match=r"no command pdsh .*make cluster-packages"):
        TwoMachines().__enter__()


def test_without_root_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert machines_available.__wrapped__() == "namespaces need root"
