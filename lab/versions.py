"""The fast tests on the oldest and the newest packages that requirements.txt allows: `make test-versions`.

python -m lab.versions [--only oldest] [--tests tests/moe …]

Each set gets an environment under build/versions, which is reused while it is there, and prints a row for the table of
docs/versions.md. A set is several GB from the package index; one is installed at a time. pip's own variables choose
another index, for example one with torch for CPUs. Needs python3.10 and python3.12 on PATH, or --python.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = {"oldest": "3.10", "newest": "3.12"}
DECISIVE = ("torch", "deepspeed", "megatron-core", "transformers", "numpy", "pydantic")
"""Packages whose lower bound the oldest set has. pip chooses the others."""
FAST = ("-p", "no:cacheprovider", "-m", "not spawns and not slow")


def lower_bounds(requirements: str) -> list[str]:
    """The oldest release of each decisive package, with its latest bug fixes: `torch>=2.6` → `torch==2.6.*`."""
    found = re.findall(r"^([\w-]+)>=([\d.]+)", requirements, re.MULTILINE)
    return [f"{name}=={bound}.*" for name, bound in found if name in DECISIVE]


def install(name: str, python: str, environment: Path) -> None:
    """Makes an environment with the package and all that its tests need."""
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([python, "-m", "venv", environment], check=True)
    pins = lower_bounds((ROOT / "requirements.txt").read_text()) if name == "oldest" else []
    pip = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    variables = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, "install", "--upgrade", "--editable", f"{ROOT}[dev]", *pins], check=True, env=variables)
    if shutil.which("nvidia-smi") is None:
        # DeepSpeed imports Triton where it is installed, and Triton 3.2 raises an error without a GPU.
        subprocess.run([*pip, "uninstall", "--yes", "triton"], check=True)
    (environment / ".installed").touch()


def row(name: str, environment: Path, tests: list[str]) -> str:
    """Runs the tests of a set; returns its row of the table."""
    python = environment / "bin" / "python"
    variables = {
        **os.environ,
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(environment / "torch_extensions"),
        "TORCH_CUDA_ARCH_LIST": "8.0",  # megatron-core asks nvcc for the GPU's, and there may be none
    }
    run = subprocess.run(
        [python, "-m", "pytest", *FAST, *tests], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False
    )
    print(run.stdout, flush=True)
    counts = {kind: number for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", run.stdout[-300:])}
    ask = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
    versions = subprocess.run([python, "-c", ask, *DECISIVE], check=True, stdout=subprocess.PIPE, text=True).stdout
    cells = [
        str(datetime.date.today()),
        name,
        *versions.split(),
        *(counts.get(kind, "0") for kind in ("passed", "failed", "skipped")),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PYTHONS), help="one set instead of both")
    parser.add_argument("--python", help="interpreter for the sets; default: python3.10 and python3.12 on PATH")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--tests", nargs="+", default=[], help="files instead of all fast tests")
    args = parser.parse_args()
    rows = []
    for name in [args.only] if args.only else PYTHONS:
        python = args.python or shutil.which(f"python{PYTHONS[name]}")
        environment = args.directory / name
        if not (environment / ".installed").exists():
            if python is None:
                print(f"the {name} set needs python{PYTHONS[name]} on PATH, or --python", file=sys.stderr)
                return 2
            install(name, python, environment)
        rows.append(row(name, environment, args.tests))
    print(f"| date | set | Python | {' | '.join(DECISIVE)} | passed | failed | skipped |", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
