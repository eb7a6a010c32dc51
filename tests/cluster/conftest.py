"""What the jobs on two machines share: their files, and the losses of a run that nothing disturbed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lab import cluster, training_log
from lab.distributed import free_port


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that a job reads."""
    directory = tmp_path_factory.mktemp("job")
    cluster.write_files(directory)
    return directory


@pytest.fixture(scope="session")
def reference(files: Path) -> dict[int, str]:
    """Losses of two processes on one node, from the first iteration on."""
    port, flags = free_port(), ("--exit-interval", str(cluster.REFERENCE_ITERATIONS))
    line = cluster.command(files, ["--num_accelerators", "2", "--master_port", str(port)], *flags)
    environment = {**os.environ, **cluster.ENVIRONMENT}
    done = subprocess.run(line, cwd=files, env=environment, capture_output=True, text=True, timeout=300, check=False)
    cluster.remove_buffers(port)
    losses = training_log.losses(done.stdout)
    assert done.returncode == 0 and list(losses) == [*range(1, cluster.REFERENCE_ITERATIONS + 1)], done.stderr
    assert len(set(losses.values())) == len(losses), "each iteration has its own loss"
    return losses
