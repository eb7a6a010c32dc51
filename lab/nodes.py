"""Nodes in one machine: network namespaces, two joined by a cable, more by a switch; `tc` limits the rate of each.

    with Nodes() as nodes:
        nodes.set_rate(200)
        results = nodes.launch([sys.executable, "my_ranks.py"])

Linux and root only; `available()` says why not. `python -m lab.nodes --check` measures the link.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ADDRESSES = tuple(f"10.10.0.{number}" for number in range(1, 9))
PREFIX = "scmoe"
GRACE_S = 2.0  # what the other ranks have for their own error messages once one has failed
_CPU_CGROUPS = Path("/sys/fs/cgroup/cpu")  # cgroup version 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_instances = itertools.count()


@dataclass(frozen=True)
class RankResult:
    """How one rank ended, and everything it wrote."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


class Nodes:
    """Context manager: network namespaces, each with an `eth0`, at `ADDRESSES`, MTU 9000, TCP reno.

    Two are joined by a veth pair, more by a bridge in a namespace of its own.

    The nodes and all that runs in them are gone after the block: at its end, after an exception, on SIGINT, SIGTERM and
    SIGHUP. After a SIGKILL the ranks still end with their launcher, and the next instance removes the namespaces.
    Entering raises RuntimeError with what is missing or refused.

    Args:
        high_priority: put the ranks of each core in a CPU cgroup that leaves almost nothing of a contended core to
            other processes (cgroup version 1 only; nothing is done where that is not possible).
        count: of nodes, from 2 to 8.
    """

    def __init__(self, high_priority: bool = False, count: int = 2) -> None:
        self._owner = os.getpid()
        self._name = f"{PREFIX}-{self._owner}-{next(_instances)}"
        self.names = tuple(f"{self._name}-node{node}" for node in range(count))
        self._high_priority = high_priority and os.access(_CPU_CGROUPS / "cpu.shares", os.W_OK)
        self._handled: list[signal.Signals] = []

    def __enter__(self) -> Nodes:
        for command in ("ip", "tc", "taskset", "setpriv"):
            if shutil.which(command) is None:
                raise RuntimeError(f"no command {command} (packages iproute2 and util-linux)")
        atexit.register(self.__exit__)
        with suppress(ValueError):  # only the main thread may set handlers
            for number in _SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:  # would end the process without leaving the block
                    signal.signal(number, lambda number, _: sys.exit(128 + number))
                    self._handled.append(number)
        try:
            for path in Path("/run/netns").glob(f"{PREFIX}-*-node0"):
                if not Path("/proc", path.name.split("-")[1]).exists():  # its launcher ended by SIGKILL
                    _remove(path.name.removesuffix("-node0"))
            for name in self.names:
                _run("ip", "netns", "add", name)
            self._connect()
            for node, name in enumerate(self.names):
                _run("ip", "-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    _run("ip", "-n", name, "link", "set", link, "up")
                with suppress(RuntimeError):  # a kernel without reno: its default then
                    _run(*self.prefix(node), "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._owner:  # a forked child leaves them to the process that made them
            return
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a second Ctrl-C must not stop this half way
        try:
            _remove(self._name)
            atexit.unregister(self.__exit__)
            for number in self._handled:
                signal.signal(number, signal.SIG_DFL)
            self._handled.clear()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _connect(self) -> None:
        ends = [["eth0", "netns", name, "mtu", "9000"] for name in self.names]
        if len(ends) == 2:
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            return
        switch = f"{self._name}-switch"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        for node, end in enumerate(ends):
            port = [f"port{node}", "netns", switch, "mtu", "9000"]
            _run("ip", "link", "add", *end, "type", "veth", "peer", "name", *port)
            _run("ip", "-n", switch, "link", "set", port[0], "master", "bridge", "up")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")

    def prefix(self, node: int) -> list[str]:
        """What to put before a command so that it runs in that node's namespace."""
        return ["ip", "netns", "exec", self.names[node]]

    def set_rate(self, mbit: float | None) -> None:
        """Limits what each node sends to `mbit` Mbit/s; None removes the limit."""
        for node in range(len(self.names)):
            _shape(mbit, self.prefix(node))

    def launch(
        self,
        program: Sequence[str],
        ranks_per_node: int = 1,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
        cores: int | None = None,
    ) -> list[RankResult]:
        """Runs `program` once per rank, node by node, each rank pinned to its own core (as far as there are cores).

        Every rank gets the variables of `torch.distributed`'s env:// rendezvous, gloo on `eth0`, DeepSpeed's CPU
        accelerator and one thread; `environment` is added last. Whatever runs in the nodes at the end is killed.

        Args:
            cores: that the ranks take in turn, the first ones; None: all.

        Raises:
            RuntimeError: with the last lines of all ranks that failed within `GRACE_S` of the first, or at the timeout.
        """
        with tempfile.TemporaryDirectory() as directory:
            processes: list[subprocess.Popen[bytes]] = []
            try:
                known = sorted(os.sched_getaffinity(0))[:cores]
                for rank in range(len(self.names) * ranks_per_node):
                    core = known[rank % len(known)]
                    # All of these replace themselves by the next: the process that is started is the rank itself.
                    command = [*self.prefix(rank // ranks_per_node), "taskset", "-c", str(core)]
                    command += ["setpriv", "--pdeathsig", "KILL", *program]
                    variables = self._variables(rank, ranks_per_node) | dict(environment or {})
                    processes.append(self._start(command, variables, Path(directory, str(rank))))
                    self._prefer(processes[-1], core)
                returncodes = _wait_for(processes, timeout_s)
            finally:
                for process in processes:
                    process.kill()  # it may not have entered its namespace yet
                _kill_all_in(self.names)
                for process in processes:
                    process.wait()
            read = partial(Path.read_text, errors="replace")
            files = [Path(directory, str(rank)) for rank in range(len(processes))]
            outputs = [(read(file.with_suffix(".out")), read(file.with_suffix(".err"))) for file in files]
        failed = [rank for rank, code in enumerate(returncodes) if code]
        # Those still running are of interest only where nothing has failed.
        if shown := failed or [rank for rank, code in enumerate(returncodes) if code is None]:
            lines = [f"ranks {shown} {'failed' if failed else f'did not end within {timeout_s:g} s'}"]
            for rank in shown:
                tails = [text.splitlines()[-15:] for text in outputs[rank]]
                lines += [f"--- rank {rank}, exit status {returncodes[rank]}:", *tails[0], *tails[1]]
            raise RuntimeError("\n".join(lines))
        return [RankResult(rank, 0, *output) for rank, output in enumerate(outputs)]

    def _variables(self, rank: int, ranks_per_node: int) -> dict[str, str]:
        return {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % ranks_per_node),
            "WORLD_SIZE": str(len(self.names) * ranks_per_node),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "CROSS_RANK": str(rank // ranks_per_node),  # all nodes have this machine's name
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def _start(self, command: Sequence[str], variables: Mapping[str, str], stem: Path) -> subprocess.Popen[bytes]:
        with open(stem.with_suffix(".out"), "wb") as out, open(stem.with_suffix(".err"), "wb") as err:
            return subprocess.Popen(  # a session of its own: a terminal's Ctrl-C is for the launcher alone
                command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def _prefer(self, process: subprocess.Popen[bytes], core: int) -> None:
        if not self._high_priority:
            return
        with suppress(ProcessLookupError):  # it may have ended already
            # One for each core: a group's shares are divided among the cores that it runs on.
            cgroup = _CPU_CGROUPS / f"{self._name}-core{core}"
            cgroup.mkdir(exist_ok=True)
            (cgroup / "cpu.shares").write_text("262144")  # the maximum; a process outside has 1024
            (cgroup / "cgroup.procs").write_text(str(process.pid))


def shape_own_end(mbit: float | None) -> None:
    """`Nodes.set_rate` for one direction: what the calling process' node sends. For a rank that searches for a rate.

    Raises:
        RuntimeError: the caller does not run in a node; the machine's own eth0 is not touched.
    """
    if not _run("ip", "netns", "identify").strip().startswith(f"{PREFIX}-"):
        raise RuntimeError("shape_own_end() is for processes that Nodes.launch() started")
    _shape(mbit)


@cache
def available() -> str | None:
    """None if two nodes can be made here, otherwise the reason why not."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Nodes() as nodes:
            nodes.set_rate(100)
    except RuntimeError as error:
        return str(error)
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _shape(mbit: float | None, prefix: Sequence[str] = ()) -> None:
    qdisc = ["noqueue"]
    if mbit is not None:
        if mbit <= 0:
            raise ValueError(f"the rate must be above 0 Mbit/s, or None for no limit: {mbit}")
        # A bucket of at least 1 ms: a smaller one would be empty before the timer refills it. A larger one would give
        # each message behind a pause a part that takes no time.
        burst_bytes = max(32 * 1024, round(mbit * 1e6 / 8 * 1e-3))
        qdisc = ["tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", str(burst_bytes), "limit", "4mb"]
    _run(*prefix, "tc", "qdisc", "replace", "dev", "eth0", "root", *qdisc)


def _wait_for(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Return codes when all have ended, `GRACE_S` after the first failure, or at the timeout: None if still running."""
    deadline = time.monotonic() + timeout_s
    failed_before = False
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes) and not failed_before:
            failed_before, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    return codes


def _kill_all_in(namespaces: Sequence[str]) -> None:
    """Returns when the killed processes are gone, or after 5 s."""
    deadline, pids = time.monotonic() + 5, ["all"]
    while pids and time.monotonic() < deadline:
        with suppress(RuntimeError):  # a namespace that was not made
            pids = []
            pids = [pid for name in namespaces for pid in _run("ip", "netns", "pids", name).split()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _remove(instance: str) -> None:
    nodes = [path.name for path in Path("/run/netns").glob(f"{instance}-*")]
    _kill_all_in(nodes)
    for command in ("ip -n {} link delete eth0", "ip netns delete {}"):
        for node in nodes:
            with suppress(RuntimeError):  # the second end of a link goes with the first; a switch has no eth0
                _run(*command.format(node).split())
    deadline = time.monotonic() + 5
    for cgroup in _CPU_CGROUPS.glob(f"{instance}-core*"):
        while cgroup.exists() and time.monotonic() < deadline:
            with suppress(OSError):  # busy until the kernel has buried the last process
                cgroup.rmdir()


def _check(rates_mbit: Sequence[float | None] = (100, 500, 1000, None)) -> None:
    print("8 MiB each way and a barrier: median ms, and Mbit/s each way. all-to-all: dist.all_to_all_single\n")
    print("| Mbit/s | 0 → 1 | 1 → 0 | irecv + isend | all-to-all |\n|---|---|---|---|---|")
    program = [sys.executable, "-c", "from lab import nodes; nodes._check_rank()"]
    with Nodes(high_priority=True) as nodes:
        for rate in rates_mbit:
            nodes.set_rate(rate)
            row = nodes.launch(program, environment={"PYTHONPATH": str(Path(__file__).parents[1])})[0].stdout
            print(f"| {rate or 'no limit'} {row.strip()}", flush=True)


def _check_rank(sent_bytes: int = 8 << 20) -> None:
    """One of two ranks; rank 0 prints the cells of a row."""
    import torch
    import torch.distributed as dist

    from scmoe_ds.parallel.process import end_rank
    from scmoe_ds.planner.rounds import interleave

    dist.init_process_group("gloo")
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    mine, theirs = torch.ones(2, sent_bytes, dtype=torch.uint8)
    both, both_out = torch.ones(2, 2 * sent_bytes, dtype=torch.uint8)  # half of it stays in the rank
    one_way = [partial(dist.broadcast, mine, source) for source in (0, 1)]
    pair = [dist.P2POp(dist.irecv, theirs, other), dist.P2POp(dist.isend, mine, other)]
    collective = partial(dist.all_to_all_single, both_out, both)
    transfers = [*one_way, lambda: [request.wait() for request in dist.batch_isend_irecv(pair)], collective]
    variants = {str(i): lambda transfer=transfer: (transfer(), dist.barrier()) for i, transfer in enumerate(transfers)}
    medians_s = [statistics.median(times) for times in interleave(variants, rounds=5).values()]
    if rank == 0:
        print("".join(f"| {s * 1e3:.1f} ({sent_bytes * 8e-6 / s:.0f}) " for s in medians_s) + "|")
    end_rank()


if __name__ == "__main__":
    usage = None if sys.argv[1:] == ["--check"] else "usage: python -m lab.nodes --check"
    if problem := usage or available():
        sys.exit(problem)
    _check()
