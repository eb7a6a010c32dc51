"""Write clusters/cluster.schema.json, the JSON Schema of a cluster's description.

python -m scmoe_ds.programs.cluster_schema            # after a change of a description's fields
python -m scmoe_ds.programs.cluster_schema --check    # exit code 1 if the file is missing or stale; writes nothing
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scmoe_ds.config.schema import keep
from scmoe_ds.simulate.schema import json_schema


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return keep(json_schema(), Path("clusters", "cluster.schema.json"), "scmoe_ds.programs.cluster_schema", argv)


if __name__ == "__main__":
    sys.exit(main())
