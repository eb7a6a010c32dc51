"""Reads the records of an adaptation and writes its page. The flags are in flags/adapt_report.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from scmoe_ds.analysis.adaptation_report import WHO, read_evaluated, report
from scmoe_ds.errors import AnalysisError, imports_of, one_line
from scmoe_ds.figure_style import short_names
from scmoe_ds.programs.dashboard import read_run
from scmoe_ds.training.record import FILE_NAME


def write_report(args: argparse.Namespace) -> None:
    """Writes the page, and prints its verdict.

    Raises:
        AnalysisError: a record that is missing, damaged or of something else; a page that cannot be written.
    """
    with imports_of("plots", "the page's figure"):
        from scmoe_ds.analysis import adaptation_report_page  # matplotlib takes a second to import

    paths = [str(path) for path in args.runs]
    runs = {path: read_run(Path(path)) for path in paths}
    teacher = None if args.teacher_run is None else read_run(args.teacher_run)
    evaluated = {who: [read_evaluated(f"--{who}", path) for path in getattr(args, who) or ()] for who in WHO}
    try:
        found = report(runs, teacher, evaluated)
        lines = [adaptation_report_page.verdict(found)]
        name = short_names(paths)[paths[-1]]
        written = adaptation_report_page.write(found, name, args.output_prefix)
    except (TypeError, LookupError, AttributeError) as error:  # a foreign record may hold anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise AnalysisError(f"{FILE_NAME} of {', '.join(paths)} is damaged or of another program ({what})") from None
    print(*lines, *(f"wrote {path}" for path in written), sep="\n", flush=True)
