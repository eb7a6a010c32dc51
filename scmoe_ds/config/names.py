"""The names that fields of the "scmoe" section take, today and in files of before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import WithJsonSchema

Architecture = Literal["as_is", "scmoe", "topk", "shared_expert", "dgmoe", "pipelined_topk", "overlapped_shared_expert"]
Position = Literal["pos1", "pos2", "pos3"]
Join = Literal["end", "late"]
Merge = Literal["add", "cg1", "cg2"]
_AUTO = {"const": "auto", "type": "string"}
TopK = Annotated[int, WithJsonSchema({"anyOf": [{"type": "integer"}, _AUTO]})]
MergeOrAuto = Annotated[Merge, WithJsonSchema({"anyOf": [{"enum": list(get_args(Merge)), "type": "string"}, _AUTO]})]
BoolOrAuto = Annotated[bool, WithJsonSchema({"anyOf": [{"type": "boolean"}, _AUTO]})]
"""The file may have "auto", which is the same as no field."""
Dispatch = Literal["exact", "padded"]
GateSoftmax = Literal["deepspeed", "all", "chosen", "kept"]
FORMER_GATE_SOFTMAX: dict[str, GateSoftmax] = {"before_topk": "deepspeed", "after_topk": "kept"}
"""Former names, and the names of what they did."""


def in_present_words(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in which former names are replaced, so that JSON files and checkpoints of before keep their numbers."""
    former = section.get("gate_softmax")
    if not isinstance(former, str) or former not in FORMER_GATE_SOFTMAX:
        return dict(section)
    ignored = section.get("architecture") in ("topk", "shared_expert")  # DeepSpeed's own layers did not read it
    return {**section, "gate_softmax": "deepspeed" if ignored else FORMER_GATE_SOFTMAX[former]}
