"""The nodes are real: gloo meets across them, the rate is set where it is said to be, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.nodes import PREFIX, Nodes, available, shape_own_end

pytestmark = pytest.mark.skipif(available() is not None, reason=f"no two nodes here: {available()}")
REPOSITORY = Path(__file__).parents[2]

MEET = """
import os, torch, torch.distributed as dist
from lab.nodes import shape_own_end
dist.init_process_group("gloo")
rank = dist.get_rank()
received = torch.empty(2)
dist.all_to_all_single(received, torch.tensor([10.0, 20.0]) + rank)
shape_own_end(50)
dist.barrier()
print(*received.tolist(), len(os.sched_getaffinity(0)), os.environ["LOCAL_RANK"], os.environ["EXTRA"])
dist.destroy_process_group()
"""

# Each rank listens at its own address, and greets the next one.
GREET = """
import os, socket, time
from lab.nodes import ADDRESSES
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
own = socket.create_server((ADDRESSES[rank], 5000))
next = None
while next is None:
    try:
        next = socket.create_connection((ADDRESSES[(rank + 1) % ranks], 5000), timeout=5)
    except OSError:
        time.sleep(0.05)
next.sendall(b"from %d" % rank)
next.close()
print(own.accept()[0].recv(100).decode(), *os.sched_getaffinity(0))
"""

# Rank 0 would sleep for ever, and has a child that does so too.
FAIL = """
import os, subprocess, sys, time
if os.environ["RANK"] == "0":
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    time.sleep(1000)
time.sleep(0.3)
print("a word before")
sys.exit("rank 1 has no tokens")
"""

HOLD = """
import time
from lab.nodes import Nodes
with Nodes(high_priority=True) as nodes:
    print(nodes.names[0], flush=True)
    nodes.launch(["sleep", "1000"])
"""


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def qdisc_of(nodes: Nodes, node: int) -> str:
    return output_of(*nodes.prefix(node), "tc", "qdisc", "show", "dev", "eth0")


def pids_in(nodes: Nodes) -> list[str]:
    return [pid for name in nodes.names for pid in output_of("ip", "netns", "pids", name).split()]


def assert_gone(*names: str) -> None:
    """No namespace, no cgroup, and no end of the link among the links of this machine."""
    assert not set(names) & set(output_of("ip", "netns", "list").split())
    instances = {name.rpartition("-")[0] for name in names}
    assert not [
        path for path in Path("/sys/fs/cgroup/cpu").glob(f"{PREFIX}-*") if path.name.rpartition("-")[0] in instances
    ]
    assert not [name for name in names if name in output_of("ip", "link", "show")]


def assert_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/ns/net").exists()]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def test_gloo_meets_across_the_nodes_and_a_rank_sets_its_own_rate() -> None:
    with Nodes() as nodes:
        environment = {"PYTHONPATH": str(REPOSITORY), "EXTRA": "added"}
        results = nodes.launch([sys.executable, "-c", MEET], environment=environment, timeout_s=60)
        assert [result.stdout for result in results] == ["10.0 11.0 1 0 added\n", "20.0 21.0 1 0 added\n"]
        assert [(result.rank, result.returncode) for result in results] == [(0, 0), (1, 0)]
        assert all("rate 50Mbit" in qdisc_of(nodes, node) for node in range(2))
    assert_gone(*nodes.names)


def test_ranks_of_a_node_follow_each_other() -> None:
    with Nodes(high_priority=True) as nodes:
        program = ["sh", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE $(ip netns identify)"]
        lines = [result.stdout.split() for result in nodes.launch(program, ranks_per_node=2, timeout_s=20)]
        first, second = nodes.names
        assert lines == [
            ["0", "0", "4", first],
            ["1", "1", "4", first],
            ["2", "0", "4", second],
            ["3", "1", "4", second],
        ]
    assert_gone(*nodes.names)


def test_more_than_two_nodes_meet_at_a_switch_and_may_share_a_core() -> None:
    with Nodes(count=3) as nodes:
        nodes.set_rate(50)
        assert all("rate 50Mbit" in qdisc_of(nodes, node) for node in range(3))
        environment = {"PYTHONPATH": str(REPOSITORY)}
        results = nodes.launch([sys.executable, "-c", GREET], environment=environment, timeout_s=30, cores=1)
        core = min(os.sched_getaffinity(0))
        assert [result.stdout for result in results] == [f"from {sender} {core}\n" for sender in (2, 0, 1)]
    assert_gone(*nodes.names, nodes.names[0].replace("node0", "switch"))


def test_a_failing_rank_ends_the_others_and_is_quoted() -> None:
    with Nodes() as nodes:
        with pytest.raises(
            RuntimeError, match=r"ranks \[1\] failed\n--- rank 1, exit status 1:\na word before\nrank 1 has no tokens"
        ):
            nodes.launch([sys.executable, "-c", FAIL], timeout_s=60)
        assert pids_in(nodes) == []
        with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] failed\n(.|\n)*no-such-program"):
            nodes.launch(["no-such-program"], timeout_s=20)
    assert_gone(*nodes.names)


def test_a_timeout_names_the_ranks_that_still_run() -> None:
    with Nodes() as nodes:
        program = ["sh", "-c", "echo rank $RANK waits; [ $RANK = 0 ] || sleep 1000"]
        with pytest.raises(RuntimeError, match=r"ranks \[1\] did not end within 0.5 s\n.*\nrank 1 waits"):
            nodes.launch(program, timeout_s=0.5)
        assert pids_in(nodes) == []
    assert_gone(*nodes.names)


def test_an_exception_in_the_block_leaves_nothing() -> None:
    with pytest.raises(KeyError), Nodes() as nodes:
        sleeper = subprocess.Popen([*nodes.prefix(1), "sleep", "1000"])
        raise KeyError
    assert sleeper.wait(5) == -signal.SIGKILL
    assert_gone(*nodes.names)
    nodes.__exit__()  # a second time does no harm


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals) -> None:
    name, pids, holder = held()
    holder.send_signal(number)
    assert holder.wait(10) != 0
    assert_dead(pids)
    assert_gone(name, name.replace("node0", "node1"))


def test_the_next_instance_removes_what_a_killed_launcher_left() -> None:
    name, pids, holder = held()
    holder.kill()
    holder.wait(10)
    assert_dead(pids)  # the ranks end with their launcher
    assert name in output_of("ip", "netns", "list")
    with Nodes():
        assert_gone(name, name.replace("node0", "node1"))


def default_signals() -> None:
    """A shell's background job is started with SIGINT ignored, and hands that on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def held() -> tuple[str, list[int], subprocess.Popen[str]]:
    """Name of the first node, the ranks' process ids, and a process that holds two nodes and runs ranks in them."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, preexec_fn=default_signals
    )
    assert holder.stdout is not None
    name = holder.stdout.readline().strip()
    pids: list[int] = []
    deadline = time.monotonic() + 10
    while len(pids) < 2 and time.monotonic() < deadline:
        nodes = [name, name.replace("node0", "node1")]
        pids = [int(pid) for node in nodes for pid in output_of("ip", "netns", "pids", node).split()]
        pids = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
    return name, pids, holder


def test_the_rate_is_on_both_ends_until_it_is_removed() -> None:
    with Nodes() as nodes, Nodes() as others:
        for mbit, shown in ((200, "rate 200Mbit"), (2500, "rate 2500Mbit"), (0.5, "rate 500Kbit burst 32Kb")):
            nodes.set_rate(mbit)
            assert all("qdisc tbf" in qdisc_of(nodes, node) and shown in qdisc_of(nodes, node) for node in range(2))
            assert all("tbf" not in qdisc_of(others, node) for node in range(2))  # another instance is another link
        nodes.set_rate(None)
        nodes.set_rate(None)
        assert all("tbf" not in qdisc_of(nodes, node) for node in range(2))
        with pytest.raises(ValueError, match="above 0"):
            nodes.set_rate(0)
    assert_gone(*nodes.names, *others.names)


def test_the_machines_own_link_is_not_shaped() -> None:
    with pytest.raises(RuntimeError, match="Nodes"):
        shape_own_end(100)


def test_without_root_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert available.__wrapped__() == "network namespaces need root"


def test_without_its_commands_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no command ip" in available.__wrapped__()
