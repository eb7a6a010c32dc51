"""The environment of all tests, so that `pytest` alone has it; and no process group outlives the module that made it,
nor do the variables by which its ranks would find each other."""

import os
import subprocess
import sys
from pathlib import Path

# One thread per process, as every rank has on the machines that run these tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed compiles its CPU collectives at the first run; they belong to this environment alone.
if os.access(sys.prefix, os.W_OK):
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
# Programs that tests start from another directory are those of this checkout and of this environment.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.helpers.spawning import spawns

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compiles DeepSpeed's CPU collectives before the first test. Otherwise the order of the tests decides which of
    them takes a minute longer and prints that something is compiled."""
    directory = os.environ.get("TORCH_EXTENSIONS_DIR")
    is_worker = hasattr(session.config, "workerinput")
    if is_worker or session.config.option.collectonly or directory is None or torch.cuda.is_available():
        return
    if not any(Path(directory).glob("deepspeed_shm_comm/*.so")):
        compile_them = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        subprocess.run([sys.executable, "-c", compile_them], capture_output=True, check=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Minutes of waiting for timeouts, beside which the other worker computes; last, it would be alone.
    items.sort(key=lambda item: not item.path.match("cluster/test_faults.py"))
    for item in items:
        if isinstance(item, pytest.Function) and spawns(item):
            item.add_marker("spawns")


@pytest.fixture(scope="module", autouse=True)
def leaves_no_process_group() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        from scmoe_ds.compat import forget_process_groups

        dist.destroy_process_group()
        forget_process_groups()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
