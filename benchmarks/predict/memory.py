"""Memory by arithmetic against `scmoe check`, which runs the step on tensors without values.

    python -m benchmarks.predict.memory --output benchmarks/results/plan_memory.json

Each case runs in a process of its own, half a minute each. The record and its page are rewritten after every case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import environment, environment_text
from benchmarks.predict.memory_cases import RECOMPUTE, TENSOR_PARALLEL, Case, cases


def checked(case: Case) -> dict[str, Any]:
    """What `scmoe check` finds."""
    from scmoe_ds.check.findings import as_json
    from scmoe_ds.check.step import Place, check_step
    from scmoe_ds.programs import check
    from scmoe_ds.programs.flags.check import parse_arguments

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ds.json"
        path.write_text(json.dumps(case.whole()), "utf-8")
        command = ["--preset", case.preset, "--deepspeed_config", str(path), "--world-size", str(case.world)]
        for flag, value in case.flags.items():
            command += [f"--{flag.replace('_', '-')}", str(value)]
        args, loaded, images = parse_arguments(command)
        subject = check._images(args, loaded) if images else check._text(args, loaded)
        place = Place(0, case.world, 8, getattr(args, TENSOR_PARALLEL, 1), check.card_of(case.card))
        with check._without_info():
            return as_json(check_step(subject, loaded, place), place)


def predicted(case: Case) -> dict[str, float]:
    """What the formula says, by parts."""
    from scmoe_ds.programs.plan_model import model_of
    from scmoe_ds.simulate.memory import memory_of
    from scmoe_ds.simulate.parameters import count
    from scmoe_ds.simulate.settings import read_settings

    whole = case.whole()
    model = model_of(argparse.Namespace(preset=case.preset, **case.flags), whole)
    settings = read_settings(whole, case.world, case.flags.get(TENSOR_PARALLEL, 1), case.flags.get(RECOMPUTE, False))
    assert settings.method is not None
    held = count(model, settings.method, settings.layout)
    memory = memory_of(model, settings.method, settings.layout)
    return {**vars(memory), "tensors": memory.tensors, "parameters": held.dense + held.experts}


def compare(case: Case) -> dict[str, Any]:
    """A row of the record."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(checked, (case,))
    formula = predicted(case)
    return {
        "case": case.name,
        "check": {"peak": found["peak_bytes"], "parameters": found["parameters"], "parts": found["at_peak"]},
        "formula": formula,
        "ratio": formula["tensors"] / found["peak_bytes"],
    }


def page(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    rows = sorted(record["rows"], key=lambda row: -abs(row["ratio"] - 1))
    within = sum(abs(row["ratio"] - 1) <= 0.05 for row in rows)
    equal = sum(row["formula"]["parameters"] == row["check"]["parameters"] for row in rows)
    lines = [
        "# Memory by arithmetic against `scmoe check`",
        "",
        f"{within} of {len(rows)} cases are within 5 %; the largest difference is "
        f"{100 * (rows[0]['ratio'] - 1):+.1f} % ({rows[0]['case']}). The parameters of a rank are equal in {equal}.",
        "",
        "Peak of the tensors of rank 0 in a step, GB. A case names what differs from the preset's file in "
        "`ds_configs/`. The step of `scmoe check` runs on tensors without values; nothing was measured on a GPU.",
        "",
        f"`{record['command']}`; {environment_text(record['environment'])}",
        "",
        "| case | check | formula | formula / check |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        peaks = (row["check"]["peak"] / 1e9, row["formula"]["tensors"] / 1e9)
        lines.append(f"| {row['case']} | {peaks[0]:.2f} | {peaks[1]:.2f} | {row['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `--again` computes the formula anew beside what a record's checks have found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="keep the record's checks, compute the formula anew")
    args = parser.parse_args(argv)
    known = {}
    if args.again or args.output.exists():
        known = {row["case"]: row for row in json.loads(args.output.read_text("utf-8"))["rows"]}
    if not args.again:
        import scmoe_ds.programs.check  # noqa: F401  # once for all processes
    command = "python -m benchmarks.predict.memory --output benchmarks/results/plan_memory.json"
    rows: list[dict[str, Any]] = []
    for case in cases():
        if case.name in known:
            formula, found = predicted(case), known[case.name]["check"]
            rows.append(
                {"case": case.name, "check": found, "formula": formula, "ratio": formula["tensors"] / found["peak"]}
            )
        elif not args.again:
            rows.append(compare(case))
        else:
            continue
        print(f"{rows[-1]['ratio']:.3f}  {case.name}", flush=True)
        record = {"benchmark": "plan_memory", "command": command, "environment": environment(), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        args.output.with_suffix(".md").write_text(page(record), "utf-8")


if __name__ == "__main__":
    main()
