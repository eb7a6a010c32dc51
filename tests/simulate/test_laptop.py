"""Clusters are planned where nothing but pydantic is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import importlib, importlib.metadata, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed", "transformers", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, version=importlib.metadata.version):
    if name in ("torch", "deepspeed", "transformers", "numpy"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.version = version
import scmoe_ds, scmoe_ds.simulate
from scmoe_ds.programs.__main__ import main
from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of

for found in pkgutil.iter_modules(scmoe_ds.simulate.__path__, "scmoe_ds.simulate."):
    importlib.import_module(found.name)
for name, program in PROGRAMS.items():
    if not program.needs_deepspeed:
        parser_of(name)
        importlib.import_module(f"scmoe_ds.programs.{program.module}")
scmoe_ds.Schedule, scmoe_ds.ScMoEConfigError
for use in (lambda: scmoe_ds.initialize, lambda: scmoe_ds.ScMoEConfig, lambda: importlib.import_module("scmoe_ds.engine")):
    try:
        use()
    except ImportError as error:
        assert "needs DeepSpeed >= " in str(error) and "found none: pip install" in str(error), error
    else:
        raise AssertionError("imported")
sys.exit(main(["dashboard", "runs"]))
"""


def test_no_torch_no_deepspeed() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("scmoe dashboard: error: scmoe_ds needs DeepSpeed >= "), done.stderr
