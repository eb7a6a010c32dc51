"""The examples of docs/replace.md, run as a reader runs them, and quoted as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ["replace_moe", "upcycle_gpt2"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_its_loss_falls(name: str) -> None:
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    run = subprocess.run([sys.executable, "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True,
                         timeout=600, check=False, env=alone)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(each) for each in re.findall(r"^(?:ScMoE, )?step.* ([\d.]+)$", run.stdout, re.MULTILINE)]
    assert len(losses) >= 6
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_has_what_the_example_has(name: str) -> None:
    """Every line of Python that docs/replace.md quotes under an example's name is in the file."""
    page = (ROOT / "docs/replace.md").read_text(encoding="utf-8")
    source = {line.strip() for line in (ROOT / f"examples/{name}.py").read_text(encoding="utf-8").splitlines()}
    _, _, after = page.partition(f"examples/{name}.py")
    block = re.search(r"```python\n(.*?)```", after, re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        assert line.strip() in {*source, "", "..."}, line
