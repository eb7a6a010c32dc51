"""A small training job on two machines (`lab.machines`), started as users start it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from lab import training_log
from lab.machines import TwoMachines
from lab.nodes import ADDRESSES

ROOT = Path(__file__).parents[1]
REFERENCE_ITERATIONS = 100
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
# --train-iters shapes the shuffle: the same for all jobs that are compared, and far away for those that a fault ends.
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --hidden-dropout 0.1 "
    "--split 90,5,5 --log-interval 1 --log-precise --eval-iters 2 --train-iters 1000"
).split()
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=4 -oServerAliveCountMax=3",
}


def write_files(directory: Path) -> None:
    """The DeepSpeed JSON, the hostfile and .deepspeed_env that every job here starts from."""
    whole = json.loads((ROOT / "ds_configs" / "gpt_small_cpu.json").read_text())
    del whole["tensorboard"]
    # Chunks and the way of the all-to-all decide the order of sums, and may be chosen differently from run to run.
    whole["scmoe"] |= {
        "all_to_all": "collective",
        "overlap": {"num_chunks": 1, "expert_slot": 1, "calibration_steps": 0},
    }
    (directory / "ds.json").write_text(json.dumps(whole))
    (directory / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    # PATH: what the ranks compile at their start needs this environment's ninja. MASTER_ADDR: for Open MPI.
    variables = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "MASTER_ADDR": ADDRESSES[0],
    }
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        variables["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    (directory / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def program(directory: Path, *flags: str) -> list[str]:
    """Script and flags of a job whose files are in `directory`, with the corpus beside them."""
    arguments = ["--deepspeed_config", str(directory / "ds.json"), "--corpus-dir", str(directory / "corpus")]
    return [str(ROOT / "pretrain_gpt_scmoe.py"), *arguments, *FLAGS, *flags]


def command(directory: Path, launcher: Sequence[str], *flags: str) -> list[str]:
    """The launcher's command line for such a job."""
    return [*DEEPSPEED, *launcher, *program(directory, *flags)]


def remove_buffers(port: int) -> None:
    """DeepSpeed leaves what its CPU ranks share in memory, 66 MiB each, named after the job's port."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        buffer.unlink(missing_ok=True)


@dataclass
class Job:
    """A launcher that runs on a machine, and what it has written so far."""

    machines: TwoMachines
    process: Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = 300.0) -> re.Match[str]:
        """The first match in the log; fails if the job ends or the time is over before."""
        deadline = time.monotonic() + timeout_s
        while True:
            running = self.process.poll() is None
            if found := re.search(pattern, self.text):
                return found
            assert running and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text[-6000:]}"
            time.sleep(0.02)

    def wait_for_steps(self, count: int) -> None:
        """Returns when the job has done that many steps since its start."""
        first = int(self.wait_for(r"training scmoe from iteration (\d+) to")[1])
        self.wait_for(training_log.step_line(first + count))

    def end(self, deadline: float) -> int:
        """Exit code, once the launcher has ended and nothing of the job is left on either machine.

        Args:
            deadline: on `time.monotonic()`'s clock; the test fails if it passes.
        """
        while self.process.poll() is None or self.left():
            assert time.monotonic() < deadline, (
                f"launcher: {self.process.poll()}, left: {self.left()}, {self.text[-6000:]}"
            )
            time.sleep(0.05)
        return self.process.returncode

    def left(self) -> list[str]:
        """Command lines of what runs on the machines beside their own init and sshd."""
        return [
            line
            for node in range(2)
            if node in self.machines.running
            for line in self.machines.processes(node).values()
        ]


def start(
    machines: TwoMachines,
    directory: Path,
    line: Sequence[str],
    node: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Runs a command line on a machine; its log goes to a new file in `directory`."""
    log = directory / f"job{sum(1 for _ in directory.glob('job*.log'))}.log"
    with open(log, "wb") as output:
        process = machines.run_on(node, line, {**ENVIRONMENT, **(environment or {})}, directory, output)
    return Job(machines, process, log)
