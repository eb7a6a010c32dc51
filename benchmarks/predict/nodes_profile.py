"""The profile of nodes in this machine: `scmoe probe` as the block benchmark runs, at the link rates of a record.

    python -m benchmarks.predict.nodes_profile --rates 0 200 --output benchmarks/results

One pinned rank on each node, one thread each. Rate 0 leaves the link as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.measure import environment
from benchmarks.harness.on_nodes import write
from lab.nodes import Nodes, available
from scmoe_ds.probe.text import table
from scmoe_ds.simulate.profile import Profile


def profile_of_nodes(nodes: Nodes, rate_mbit: float | None, seconds: float = 60.0, cores: int | None = None) -> Profile:
    """Runs the probe on all nodes, linked at that rate; None: without a limit.

    Args:
        cores: that the ranks take in turn; None: all.
    """
    nodes.set_rate(rate_mbit)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "profile.json")
        flags = ["--output", str(file), "--seconds", str(seconds)]
        nodes.launch([sys.executable, "-m", "scmoe_ds.programs.probe", *flags], 1, None, 300 + 5 * seconds, cores)
        return Profile.model_validate_json(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0], metavar="MBIT", help="Mbit/s of the link")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each probe")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument(
        "--cores", type=int, help="that the ranks share: with 1, two nodes are as fast as four are on two cores"
    )
    parser.add_argument("--name", default="nodes_profile", help="of the record")
    parser.add_argument("--output", type=Path, help="directory for the record and its page")
    args = parser.parse_args()
    if (reason := available()) is not None:
        sys.exit(f"nodes cannot be made here: {reason}")
    with Nodes(high_priority=True, count=args.nodes) as nodes:
        profiles = {rate: profile_of_nodes(nodes, rate or None, args.seconds, args.cores) for rate in args.rates}
    command = "python -m benchmarks.predict.nodes_profile " + " ".join(sys.argv[1:])
    record = {
        "command": command,
        "environment": environment(),
        "profiles": {f"{rate:g}": profile.model_dump(mode="json") for rate, profile in profiles.items()},
    }
    lines = ["# What nodes in this machine compute and send", "", f"`{command}`", ""]
    for rate, profile in profiles.items():
        link = f"Link limited to {rate:g} Mbit/s" if rate else "Link without a limit"
        lines += [f"## {link}", "", "```", *table(profile, details=True), "```", ""]
    print("\n".join(lines))
    if args.output:
        write(args.output, args.name, record, "\n".join(lines))


if __name__ == "__main__":
    main()
