"""Flags that have a step drawn: of training, of generation."""

from __future__ import annotations

import argparse


def add_trace(group: argparse._ArgumentGroup, step: str) -> None:
    """
    Args:
        step: what is drawn, with its number N.
    """
    group.add_argument("--scmoe-trace", type=int, metavar="N", help=f"draw {step}: a trace for Perfetto and a figure")
    group.add_argument("--scmoe-trace-dir", default="traces", help="directory for trace and figure")
