"""Which method and layout train a model fastest on a cluster that is not here: scmoe_ds/simulate/ says how.

scmoe plan --cluster clusters/2x8xA800-8x100g.json --preset gpt2-moe-medium --tokens 300e9
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scmoe_ds.errors import ArgumentError, PlanError, imports_of
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.plan import build_parser
from scmoe_ds.programs.plan_config import launch_lines, write_config
from scmoe_ds.programs.plan_fit import StepParts, fit_lines
from scmoe_ds.programs.plan_page import page
from scmoe_ds.programs.plan_question import Question, question_of
from scmoe_ds.programs.plan_record import record
from scmoe_ds.programs.plan_text import lines
from scmoe_ds.simulate.answers import Answers, answer
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.fit import Parts
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import machine_of
from scmoe_ds.simulate.method import METHODS, Method
from scmoe_ds.simulate.rows import Row
from scmoe_ds.simulate.scaling import of_size
from scmoe_ds.simulate.search import Run, layout_text, mode_of, run
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.timeline import timeline_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Plans; returns the exit code: 2 with one sentence where there is no answer."""
    args = build_parser().parse_args(argv)
    return run_alone("scmoe plan", lambda: plan(args), argv)


def plan(args: argparse.Namespace) -> None:
    """Answers, prints, and writes what is asked for.

    Raises:
        UserError: a description or flag to correct, or a model that fits nowhere.
    """
    question = question_of(args)
    for flag, name in (("--row", args.row), ("--explain", args.explain)):
        if name:
            require_row(flag, name)
    if args.timeline and not args.explain:
        raise ArgumentError(f"--timeline {args.timeline}: is the drawing of --explain; name a row there")
    for gpus in args.scale or ():
        of_size(question.cluster, gpus)
    found = answer(
        question.model,
        question.cluster,
        question.profile,
        question.routing,
        question.fixed,
        question.tokens,
        args.scale or (),
        question.given,
    )
    print(*lines(question, found), sep="\n", flush=True)
    row = named(found, "--row", args.row) if args.row else found.best
    print("", *launch_lines(question, row.run, args.write), sep="\n", flush=True)
    if args.explain:
        explain(question, named(found, "--explain", args.explain).run, args.timeline)
    if args.fit:
        method, layout = question.given or (row.run.method, row.run.layout)
        fitted = fit_lines(args.fit, question.model, method, layout, question.cluster, parts_of(question))
        print("", *fitted, sep="\n", flush=True)
    if args.write:
        write_config(question, row.run, args.write)
        print(f"wrote {args.write}")
    for path, text in (
        (args.json, lambda: json.dumps(record(question, found), indent=2) + "\n"),
        (args.html, lambda: page(question, found)),
    ):
        if path is not None:
            Path(path).write_text(text(), "utf-8")
            print(f"wrote {path}")
    sys.stdout.flush()


def explain(question: Question, found: Run, path: Path | None) -> None:
    """Prints a step in time, and writes it as a trace or figure."""
    step = run_step(found.times, found.layout, mode_of(found.layout), spans=True)
    title = f"{question.model.name}, {found.method.name}, {layout_text(found.layout)}"
    print("", title, *timeline_lines(step), sep="\n", flush=True)
    if path is not None:
        with imports_of("plots", "the figure of a step"):
            from scmoe_ds.programs.plan_timeline import save_simulated  # needs torch, as what records steps does

            save_simulated(step, path, found.method.name)
        print(f"wrote {path}")


def parts_of(question: Question) -> StepParts:
    """Simulates settings on changed descriptions of the cluster, for --fit."""

    def parts(cluster: Cluster, method: Method, layout: Layout) -> Parts:
        step = run(question.model, method, layout, machine_of(cluster, question.profile), question.routing).step
        return {
            "total": step.total_ms,
            "exposed": step.exposed_ms,
            "reduce": step.exposed_reduce_ms,
            "optimizer": step.optimizer_ms,
        }

    return parts


def require_row(flag: str, name: str) -> None:
    """Raises an ArgumentError for what cannot be a row's name, before the search."""
    names = [each.name for each in METHODS]
    if not name.isdecimal() and ".json: " not in name and name.casefold() not in map(str.casefold, names):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        raise ArgumentError(f"{flag} {name}: is no row{hint}; the rows are {', '.join(names)}, or their numbers")


def named(found: Answers, flag: str, name: str) -> Row:
    """A row by its name or number.

    Raises:
        PlanError: there is none.
    """
    for number, row in enumerate(found.rows, start=1):
        if name.casefold() in (row.name.casefold(), str(number)):
            return row
    reasons = {each.casefold(): reason for each, reason in found.search.missing.items()}
    reason = reasons.get(name.casefold(), f"the table has {len(found.rows)} rows")
    raise PlanError(f"{flag} {name}: has no row: {reason}")


if __name__ == "__main__":
    sys.exit(main())
