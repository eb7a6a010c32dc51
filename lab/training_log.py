"""Reads what training has printed, for tests and benchmarks. (Programs of users read log.jsonl.)

Numbers are text, as printed: with --log-precise they have all digits, so that runs can be compared bit by bit.
"""

from __future__ import annotations

import re

PRECISE = "--log-precise"


def steps(text: str) -> dict[int, dict[str, str]]:
    """Of every step line: "loss", "lr", "grad" and so on, by iteration. The last line of an iteration counts."""
    found: dict[int, dict[str, str]] = {}
    for iteration, rest in re.findall(r"\biter +(\d+)/\d+  (.*)$", text, re.MULTILINE):
        values = found[int(iteration)] = {}
        for first, second, *_ in (part.split() for part in rest.split("  ")):
            # A number stands behind its name, or before its unit.
            name, value = (first, second) if first.isalpha() else (second, first)
            values[name] = value
    return found


def losses(text: str) -> dict[int, str]:
    """Iteration to its loss. A launcher may print a node's name before each line."""
    return {iteration: values["loss"] for iteration, values in steps(text).items()}


def validations(text: str) -> dict[int, str]:
    """Iteration to the loss of its validation."""
    return {int(i): loss for i, loss in re.findall(r"\bvalidation at iteration (\d+)  loss (\S+)", text, re.MULTILINE)}


def step_line(iteration: int) -> str:
    """A regular expression for the beginning of an iteration's line."""
    return rf"\biter +{iteration}/"
