"""Writes the tables of flags in docs/from_megatron_deepspeed.md, from the tables that the parsers use.

python -m scmoe_ds.programs.flags.table
"""

from __future__ import annotations

import json

from scmoe_ds.programs.flags.megatron import (
    IN_FORCE,
    JSON_FLAGS,
    LENGTH_FLAGS,
    NO_EFFECT,
    SAME,
    SAME_AS,
    SCHEDULE_FLAGS,
)
from scmoe_ds.programs.flags.megatron_refused import REFUSED
from scmoe_ds.programs.flags.other_names import BY_TOOL


def megatron_table() -> str:
    """All flags of Megatron-DeepSpeed by what becomes of them, in Markdown."""
    becomes = dict.fromkeys(SAME, "the same")
    for flag, (path, kind) in JSON_FLAGS.items():
        becomes[flag] = f"`{path}`" + (f" = {json.dumps(kind)}" if isinstance(kind, (bool, str)) else "")
    becomes |= dict.fromkeys(SCHEDULE_FLAGS, "`scheduler`, [above](#optimizer-and-schedule)")
    becomes |= dict.fromkeys(LENGTH_FLAGS, "`--train-iters`, with the batch size; the shortest of the three holds")
    becomes |= {flag: f"`{other}{'' if callable(kind) else ' ' + kind}`" for flag, (other, kind) in SAME_AS.items()}
    for flag, (values, reason) in IN_FORCE.items():
        as_it_is = f"{' or '.join(values)}: as it is here, else refused" if values else "as it is here"
        becomes[flag] = f"{as_it_is}: {reason}"
    becomes |= {flag: f"no effect, named in the log: {reason}" for flag, (_, reason) in NO_EFFECT.items()}
    becomes |= {flag: f"refused: {reason}" for flag, reason in REFUSED.items()}
    return _table("Megatron-DeepSpeed", becomes)


def other_tables() -> str:
    """Names of other tools, and what they are called here, in Markdown."""
    return "\n\n".join(
        _table(tool, {f"--{name}": answer if " " in answer else f"`{answer}`" for name, answer in rows.items()})
        for tool, rows in BY_TOOL.items()
        if tool != "other spellings"
    )


def _table(heading: str, becomes: dict[str, str]) -> str:
    rows: dict[str, list[str]] = {}
    for flag in sorted(becomes, key=str.lower):
        rows.setdefault(becomes[flag], []).append(f"`{flag}`")
    lines = [f"| {', '.join(flags)} | {text} |" for text, flags in rows.items()]
    return "\n".join([f"| {heading} | here |", "|---|---|", *lines])


if __name__ == "__main__":
    print(megatron_table(), other_tables(), sep="\n\n")
