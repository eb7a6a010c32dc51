"""Which variables of which launcher make a process a rank."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from scmoe_ds.errors import LauncherError
from scmoe_ds.parallel import launchers
from scmoe_ds.parallel.launchers import adopt_launcher
from scmoe_ds.parallel.process import prepare_environment

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
STEP = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-1",
}


@pytest.mark.parametrize(
    "environment",
    [
        ALLOCATION,
        {**ALLOCATION, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"},
        {**STEP, "SLURM_PTY_PORT": "40000"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        MPI,
    ],
    ids=["batch script", "with an address", "srun --pty", "a step of one task", "mpirun's variables, inherited"],
)
def test_a_process_that_was_started_by_hand_is_alone(environment: dict[str, str]) -> None:
    adopted = dict(environment)
    adopt_launcher(adopted)
    assert adopted == environment


def test_tasks_of_a_step_are_ranks() -> None:
    tasks = [{**STEP, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(8)]
    for task in tasks:
        adopt_launcher(task)
    assert [task["RANK"] for task in tasks] == list("01234567")
    assert {(task["WORLD_SIZE"], task["MASTER_ADDR"]) for task in tasks} == {("8", "127.0.0.1")}
    assert len({task["MASTER_PORT"] for task in tasks}) == 1
    other = {**STEP, "SLURM_STEP_ID": "1"}
    adopt_launcher(other)
    assert other["MASTER_PORT"] != tasks[0]["MASTER_PORT"], "two steps may share a host"


def test_tasks_on_several_hosts_need_an_address() -> None:
    task = {**STEP, "SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(LauncherError, match="MASTER_ADDR is not set: export it"):
        adopt_launcher(task)
    task["MASTER_ADDR"] = "node0"
    adopt_launcher(task)
    assert (task["RANK"], task["WORLD_SIZE"], task["MASTER_ADDR"]) == ("3", "8", "node0")


def test_mpi_counts_under_mpirun_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_under_mpi", lambda: True)
    adopted = dict(MPI)
    adopt_launcher(adopted)
    assert (adopted["RANK"], adopted["LOCAL_RANK"], adopted["WORLD_SIZE"]) == ("1", "1", "2")


def test_a_launcher_that_has_set_rank_is_right() -> None:
    environment = {**STEP, "RANK": "0"}
    adopt_launcher(environment)
    assert environment == {**STEP, "RANK": "0"}


def test_the_launchers_of_a_process() -> None:
    """A chain as the deepspeed launcher makes it, under a shell that is none of it."""
    program = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        from scmoe_ds.parallel.launchers import launchers
        print([each.cmdline()[1:3] for each in launchers()])
    """)
    fake = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    root = launchers.__file__.split("/scmoe_ds/")[0]
    rank = [sys.executable, "-c", program, root]
    deepest = subprocess.run([sys.executable, "-c", fake, *rank], capture_output=True, text=True, check=True)
    assert deepest.stdout == "[]\n", "started by hand"


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["/usr/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/usr/bin/python", "/opt/bin/deepspeed", "train.py"], True),
        (["/usr/bin/python", "/opt/bin/torchrun", "train.py"], True),
        (["/usr/bin/python", "-m", "torch.distributed.run"], True),
        (["slurmstepd:", "[7.0]"], True),
        (["prterun", "-n", "2"], True),
        (["bash", "run_deepspeed.sh"], False),
        (["bash", "-c", "deepspeed train.py"], False),
        (["vim", "deepspeed.json"], False),
        (["less", "deepspeed"], False),
        (["/usr/bin/python", "-m", "pytest", "tests"], False),
    ],
)
def test_what_looks_like_a_launcher(words: list[str], is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_words", lambda _: words)
    assert launchers._is_launcher(None) == is_one  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, but RANK is: set both, or neither for one process alone"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE = two: must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set, but RANK is"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set, but RANK is"),
    ],
)
def test_variables_that_a_user_has_set_by_hand(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LauncherError, match=message):
        prepare_environment()
