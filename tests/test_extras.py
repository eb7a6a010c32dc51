"""What only some users need is no requirement: without it every program starts, and a sentence names the extra."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, sys, warnings
warnings.simplefilter("ignore")

sys.modules.update(dict.fromkeys(["matplotlib", "cycler", "PIL", "lm_eval", "sklearn", "accelerate", "zstandard"]))
from scmoe_ds.programs.__main__ import PROGRAMS
for module, *_ in PROGRAMS.values():
    importlib.import_module(f"scmoe_ds.programs.{module}")
from pathlib import Path
from scmoe_ds.analysis import records
from scmoe_ds.data.images import Digits, ImageFolder
from scmoe_ds.errors import UserError, imports_of
from scmoe_ds.evaluation import tasks
from scmoe_ds.trace import timeline_figure

def page():
    with imports_of("plots", "the page"):
        from scmoe_ds.analysis import feasibility_page

for call in (
    lambda: records.draw({}, Path("record.json")),
    lambda: timeline_figure.figure([]),
    page,
    lambda: ImageFolder("images", 8),
    lambda: Digits(8),
    tasks.prepare,
):
    try:
        call()
        print("no error")
    except UserError as error:
        print("said:", error)
"""


def test_programs_without_the_extras() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    said = [line.removeprefix("said: ") for line in run.stdout.splitlines() if line.startswith(("said: ", "no error"))]
    assert said == [
        'the figure of record.json needs matplotlib: pip install "scmoe_ds[plots]"',
        'the figure of a timeline needs matplotlib: pip install "scmoe_ds[plots]", or open the trace in ui.perfetto.dev',
        'the page needs matplotlib: pip install "scmoe_ds[plots]"',
        'a folder of images needs PIL: pip install "scmoe_ds[images]"',
        '--dataset digits needs sklearn: pip install "scmoe_ds[images]"',
        '--tasks needs lm_eval: pip install "scmoe_ds[eval]"',
    ]
