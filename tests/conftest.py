"""One thread per process, as every rank has on the machines that run these tests; and no process group outlives the
module that made it, nor do the variables by which its ranks would find each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module", autouse=True)
def leaves_no_process_group() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        from deepspeed.utils import groups

        dist.destroy_process_group()
        groups._release_process_group_references()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
