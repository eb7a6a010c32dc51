"""What a cluster does to a job, on two machines under the pdsh launcher.

The jobs follow each other: all have the same command and the same --save directory, and each goes on, with exactly the
losses of a run that nothing disturbed, where the fault before left the last good checkpoint.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cluster, training_log
from lab.cluster import Job
from lab.machines import TwoMachines, machines_available

pytestmark = pytest.mark.skipif(
    machines_available() is not None, reason=f"no two machines here: {machines_available()}"
)
TIMEOUT_S = 9.0
SLACK_S = 15.0  # from a timeout to the end of all processes
LINK_MBIT = 10.0  # steps of some tenths of a second, without work for the processors
RANK = "--local_rank=0"  # one on each machine


class Training:
    """Starts the jobs, and knows at which step the next one has to go on."""

    def __init__(self, machines: TwoMachines, files: Path, save: Path, reference: dict[int, str]) -> None:
        self.machines, self.files, self.save, self.reference = machines, files, save, reference
        self.step, self.checked = 0, True
        self.damaged: dict[Path, bytes] = {}  # files as they were left

    def start(self, timeout_s: float = TIMEOUT_S, *flags: str) -> Job:
        arguments = [
            "--save",
            str(self.save),
            "--save-interval",
            "2",
            "--auto-resume",
            "--distributed-timeout-minutes",
            str(timeout_s / 60),
            *flags,
        ]
        line = cluster.command(self.files, ["--hostfile", "hostfile", "--launcher", "pdsh"], *arguments)
        self.checked = False
        return cluster.start(self.machines, self.files, line)

    def end_after(self, fault: Callable[[], object], job: Job) -> int:
        """Inflicts a fault; the exit code, when in good time nothing of the job is left on any machine."""
        struck = time.monotonic()
        fault()
        # Exactly the limit on a machine that has nothing else to do.
        slower = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
        code = job.end(struck + TIMEOUT_S + SLACK_S * slower)
        print(f"{time.monotonic() - struck:.1f} s to the end, exit code {code}")
        return code

    def check(self, job: Job) -> None:
        """The job went on at the right step with the right losses; notes the step at which the next one starts."""
        found = training_log.losses(job.text)
        assert list(found) == list(range(self.step + 1, self.step + 1 + len(found))), job.text
        assert found == {i: self.reference[i] for i in found}, job.text
        self.step, self.checked = self.latest(), True
        print(f"last loss: {max(found)}, the next job goes on after {self.step}")

    def latest(self) -> int:
        """What the directory itself says, whatever a log says."""
        with suppress(FileNotFoundError):
            return int((self.save / "latest").read_text().removeprefix("global_step"))
        return 0

    def damage_newest(self, change: Callable[[bytes], bytes]) -> Path:
        """Changes a file of the last good checkpoint, so that the one before takes its place."""
        if self.step < 4:  # this test runs alone
            job = self.start(TIMEOUT_S, "--exit-interval", "4")
            job.wait_for("finished at iteration")
            assert job.end(time.monotonic() + 120) == 0, job.text
            self.check(job)
        file = next((self.save / f"global_step{self.step}").glob("*expert_2_*.pt"))
        file.write_bytes(change(file.read_bytes()))
        self.damaged[file] = file.read_bytes()
        still = {each.parent for each, left in self.damaged.items() if each.is_file() and each.read_bytes() == left}
        names = [path.name.removeprefix("global_step") for path in set(self.save.glob("global_step*")) - still]
        self.step = max(int(name) for name in names if name.isdecimal() and int(name) < self.step)
        return file

    def next_save(self) -> int:
        """The step at which the next job saves first."""
        return self.step + 2 - self.step % 2


@pytest.fixture(scope="module")
def chain(files: Path, reference: dict[int, str]) -> Iterator[Training]:
    """Two machines whose checkpoints go to a small shared disk."""
    save = files / "saved"
    save.mkdir()
    # Before the machines start: they would not see it otherwise.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(save)], check=True)
    try:
        with TwoMachines() as machines:
            machines.set_rate(LINK_MBIT)
            yield Training(machines, files, save, reference)
    finally:
        subprocess.run(["umount", "--lazy", str(save)], check=True)


@pytest.fixture
def training(chain: Training) -> Iterator[Training]:
    """The chain, and machines that are whole again whatever the test before did."""
    yield chain
    machines = chain.machines
    for node in range(2):
        if node not in machines.running:
            machines.power_on(node)
        for pid in machines.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    machines.link(True)
    if not chain.checked:  # the test failed: one failure is enough
        chain.step = chain.latest()


def kill_a_rank(job: Job) -> None:
    (pid,) = job.machines.pids(1, RANK)
    os.kill(pid, signal.SIGKILL)


def stop_a_rank(job: Job) -> None:
    (pid,) = job.machines.pids(1, RANK)
    os.kill(pid, signal.SIGSTOP)


def kill_the_launcher(job: Job) -> None:
    """Its own process; pdsh, ssh and what runs on the machines go on."""
    runner = max(job.machines.pids(0, "deepspeed.launcher.runner"))  # the other one is nsenter
    os.kill(runner, signal.SIGKILL)


def power_off(job: Job) -> None:
    job.machines.power_off(1)


def cut_the_link(job: Job) -> None:
    job.machines.link(False)


def interrupt_the_launcher(job: Job) -> None:
    job.machines.send_signal(job.process, signal.SIGINT)


# What a user has to find in the log: who failed, and how.
# With several exchanges in flight the one that is waited for need not be the first that times out.
TIMED_OUT = "(Timed out waiting 9000ms|timed out, as another exchange)"
SILENT = [rf"rank 0 \(host node0\).*{TIMED_OUT}.*rank 1", r"node1: ssh exited with exit code 255"]
FAULTS = {
    "a rank is killed": (kill_a_rank, [r"rank 0 \(host node0\).*onnection.*rank 1", r"node1: .*return code = -9"]),
    "a rank hangs": (
        stop_a_rank,
        [
            r"rank 1 \(host node1\) gave no sign of life for \d+ s \(it is stopped\) and was killed",
            r"rank 0 \(host node0\).*rank 1 \(host node1\) has not said why",
        ],
    ),
    "the launcher is killed": (kill_the_launcher, [r"the launcher of rank 0 has gone", r"stopping at iteration"]),
    "a machine loses its power": (power_off, SILENT),
    "the link goes down": (cut_the_link, SILENT),
    "the launcher gets SIGINT": (interrupt_the_launcher, [r"interrupt"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_job(fault: str, training: Training) -> None:
    inflict, words = FAULTS[fault]
    job = training.start()
    job.wait_for_steps(3)
    code = training.end_after(lambda: inflict(job), job)
    assert code != 0
    for pattern in words:
        assert re.search(pattern, job.text, re.IGNORECASE), (pattern, job.text)
    training.check(job)
    assert training.step > 0


def test_a_truncated_file_and_a_rank_killed_during_a_save(training: Training) -> None:
    damaged = training.damage_newest(lambda data: data[: len(data) // 2])
    job = training.start()
    job.wait_for("training scmoe from iteration")
    job.wait_for(rf"saved .*global_step{training.next_save()}\b")
    rank = stop_in_a_save(job, training.save)
    last_good = training.latest()
    assert training.end_after(lambda: os.kill(rank, signal.SIGKILL), job) != 0
    assert re.search(r"node1: .*return code = -9", job.text), job.text
    assert damaged.name in job.text.split("training scmoe")[0], "a warning"
    training.check(job)
    assert training.step == last_good


def test_a_flipped_bit_and_a_full_disk_during_a_save(training: Training) -> None:
    damaged = training.damage_newest(lambda data: data[:-2000] + bytes([data[-2000] ^ 1]) + data[-1999:])
    job = training.start()
    newest = training.next_save()
    job.wait_for(rf"saved .*global_step{newest}\b")
    filler = training.save / "filler"
    try:
        code = training.end_after(lambda: fill(filler), job)
    finally:
        filler.unlink()
    assert code != 0
    assert re.search(r"No space left|file write failed|cannot write", job.text), job.text
    assert damaged.name in job.text.split("training scmoe")[0], "a warning"
    training.check(job)
    assert training.step >= newest


def test_a_short_cut_of_the_link_and_a_signal_to_one_rank(training: Training) -> None:
    """After all that is above: the job stalls and goes on after the first, and ends as asked after the second."""
    job = training.start(timeout_s=60)  # TCP tries again at growing intervals
    job.wait_for_steps(2)
    job.machines.link(False)
    before = max(training_log.losses(job.text))
    time.sleep(5)
    stalled_at = max(training_log.losses(job.text))
    job.machines.link(True)
    job.wait_for(training_log.step_line(stalled_at + 3))
    assert stalled_at <= before + 1, "the link was not down"
    (rank,) = job.machines.pids(1, RANK)
    assert training.end_after(lambda: os.kill(rank, signal.SIGTERM), job) == 0, job.text
    stopped = re.search(r"stopping at iteration (\d+): SIGTERM received", job.text)
    assert stopped, job.text
    training.check(job)
    assert training.step == int(stopped[1]), "all is saved"


def stop_in_a_save(job: Job, save: Path) -> int:
    """Process id of rank 1, standing still while a checkpoint is half written."""
    (rank,) = job.machines.pids(1, RANK)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.process.poll() is None:
        if list(save.glob("global_step*.part")):
            os.kill(rank, signal.SIGSTOP)
            time.sleep(0.5)
            if list(save.glob("global_step*.part")):  # and rank 0 waits for rank 1
                return rank
            os.kill(rank, signal.SIGCONT)  # too late for this one
        time.sleep(0.001)
    raise AssertionError(job.text)


def fill(file: Path) -> None:
    """Leaves 64 KiB on the disk: enough for a checkpoint's description, not for its tensors."""
    disk = os.statvfs(file.parent)
    with suppress(OSError), open(file, "wb", buffering=0) as filler:  # the job may be writing, too: then less is left
        filler.write(bytes(max(disk.f_bavail * disk.f_frsize - (64 << 10), 0)))
