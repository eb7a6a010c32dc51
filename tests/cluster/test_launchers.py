"""Every way to start a job on two machines gives the losses of one machine, bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cluster, training_log
from lab.distributed import free_port
from lab.machines import TwoMachines, machines_available
from lab.nodes import ADDRESSES

needs_machines = pytest.mark.skipif(
    machines_available() is not None, reason=f"no two machines here: {machines_available()}"
)
STEPS = 6
FLAGS = ("--exit-interval", str(STEPS))
BY_HAND = ["--no_ssh", "--master_port", "29600"]
LAUNCHERS = {
    "pdsh": ["--launcher", "pdsh"],
    "openmpi": ["--launcher", "openmpi", "--launcher_args", "--bind-to none"],
}


@pytest.fixture(scope="module")
def machines() -> Iterator[TwoMachines]:
    with TwoMachines() as both:
        yield both


def check(text: str, reference: dict[int, str]) -> None:
    assert training_log.losses(text) == {i: reference[i] for i in range(1, STEPS + 1)}, text
    assert re.search(r"ranks +2 × CPU.*expert parallel 2", text), text


@needs_machines
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_command_starts_both_machines(
    launcher: str, machines: TwoMachines, files: Path, reference: dict[int, str]
) -> None:
    line = cluster.command(files, ["--hostfile", "hostfile", *LAUNCHERS[launcher]], *FLAGS)
    job = cluster.start(machines, files, line)
    job.wait_for("finished at iteration")
    assert job.end(time.monotonic() + 60) == 0, job.text
    check(job.text, reference)
    assert "1 of 1 send tokens between nodes (2 node(s))" in job.text, "the experts are on both machines"


@needs_machines
def test_one_command_per_machine(machines: TwoMachines, files: Path, reference: dict[int, str]) -> None:
    jobs = []
    for node in range(2):
        launcher = [*BY_HAND, "--hostfile", "hostfile", "--node_rank", str(node), "--master_addr", ADDRESSES[0]]
        # .deepspeed_env is not read in this form.
        jobs.append(
            cluster.start(
                machines, files, cluster.command(files, launcher, *FLAGS), node, {"GLOO_SOCKET_IFNAME": "eth0"}
            )
        )
    jobs[0].wait_for("finished at iteration")
    assert [job.end(time.monotonic() + 60) for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    check(jobs[0].text, reference)
    assert training_log.losses(jobs[1].text) == {}, "one machine reports"


def test_two_launchers_on_one_machine(files: Path, reference: dict[int, str]) -> None:
    """The same without root; ranks of one hostname, so that nothing is said to cross nodes."""
    port, processes = free_port(), []
    for node in range(2):
        launcher = ["--no_ssh", "--hostfile", "hostfile", "--node_rank", str(node), "--master_addr", "127.0.0.1"]
        line = cluster.command(files, [*launcher, "--master_port", str(port)], *FLAGS)
        processes.append(
            subprocess.Popen(
                line,
                cwd=files,
                env={**os.environ, **cluster.ENVIRONMENT},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
        cluster.remove_buffers(port)
    assert [process.returncode for process in processes] == [0, 0], texts
    check(texts[0], reference)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", sorted(path.name for path in (cluster.ROOT / "examples").glob("*.s[hl]*")))
def test_example_scripts_are_bash(script: str) -> None:
    """All that can be checked of the Slurm script without Slurm."""
    done = subprocess.run(
        ["bash", "-n", str(cluster.ROOT / "examples" / script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
