"""Benchmarks on nodes in one machine: the program makes them, and every rank runs the same module again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks.harness.measure import environment
from lab.nodes import Nodes, available
from scmoe_ds.figure_style import save
from scmoe_ds.parallel.process import connect, end_rank

PREFIX = "RECORD "
"""Of the line that rank 0 prints its record on."""


def parse(
    parser: argparse.ArgumentParser, rank_main: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, and the settings that the ranks get. A rank's process does not return from here.

    Args:
        rank_main: makes the record, in a process group of all ranks; each has one thread. Rank 0's is printed.
    """
    parser.add_argument("--rank-settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_settings:
        torch.set_num_threads(1)
        connect()
        record = rank_main(json.loads(args.rank_settings))
        if dist.get_rank() == 0:
            print(PREFIX + json.dumps(record), flush=True)
        end_rank()
    return args, {key: value for key, value in vars(args).items() if key not in ("output", "rank_settings")}


def on_nodes(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m module --rank-settings …` on all nodes; what rank 0 printed as its record.

    Args:
        settings: "nodes" says how many.
    """
    if (reason := available()) is not None:
        sys.exit(f"nodes cannot be made here: {reason}")
    with Nodes(high_priority=True, count=settings.get("nodes", 2)) as nodes:
        program = [sys.executable, "-m", module, "--rank-settings", json.dumps(settings)]
        output = nodes.launch(program, timeout_s=3600)[0].stdout
    found = next(line for line in output.splitlines() if line.startswith(PREFIX))
    command = f"python -m {module} " + " ".join(sys.argv[1:])
    head = {"command": command, "environment": environment(), "settings": settings}
    return head | json.loads(found.removeprefix(PREFIX))


def write(directory: Path, name: str, record: dict[str, Any], text: str, figure: Figure | None = None) -> None:
    """Writes a record as JSON, as Markdown and, where there is one, as a figure."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (directory / f"{name}.md").write_text(text)
    if figure is not None:
        save(figure, directory / f"{name}.png")
