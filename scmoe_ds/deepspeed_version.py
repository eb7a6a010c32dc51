"""Importing this module checks that there is a DeepSpeed, and that it is new enough.

Every room that imports DeepSpeed imports this one first. `scmoe plan` and `scmoe_ds.simulate` do not: they run where
neither DeepSpeed nor torch is installed.
"""

import re
from importlib import metadata

OLDEST_DEEPSPEED = "0.19.4"
"""Its gate takes `sparse_routes` and returns the expert, place and weight of each choice (moe/deepspeed_gate.py)."""


def check() -> None:
    """Nothing, with a DeepSpeed that is new enough.

    Raises:
        ImportError: there is none, or an older one.
    """
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        found = "none"
    numbers, oldest = ([int(part) for part in re.findall(r"\d+", each)[:3]] for each in (found, OLDEST_DEEPSPEED))
    if numbers < oldest:
        raise ImportError(
            f"scmoe_ds needs DeepSpeed >= {OLDEST_DEEPSPEED}, whose gate returns sparse routes; found {found}: "
            f'pip install "deepspeed>={OLDEST_DEEPSPEED},<0.20"'
        )


check()
