"""What the jobs on two machines share: their files, and the losses of a run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import cluster, programs, training_log


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that a job reads."""
    directory = tmp_path_factory.mktemp("job")
    cluster.write_files(directory)
    return directory


@pytest.fixture(scope="session")
def reference(files: Path) -> dict[int, str]:
    """Losses of two processes on one node, from the first iteration on."""
    words = cluster.program(files, "--exit-interval", str(cluster.REFERENCE_ITERATIONS))
    done = programs.run(words, 2, files, cluster.ENVIRONMENT)
    losses = training_log.losses(done.stdout)
    assert done.returncode == 0 and list(losses) == [*range(1, cluster.REFERENCE_ITERATIONS + 1)], done.stderr
    assert len(set(losses.values())) == len(losses), "each iteration has its own loss"
    return losses
