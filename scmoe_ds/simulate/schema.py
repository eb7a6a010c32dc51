"""The JSON Schema of a cluster's description, for editors. `python -m scmoe_ds.programs.cluster_schema` writes it.

It knows each field alone; what fields say together is checked when a description is read.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from scmoe_ds.simulate.cards import NAMES
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.gpu import Efficiency, Gpu, Measured
from scmoe_ds.simulate.interconnect import Between, Curve, Inside


def json_schema() -> dict[str, Any]:
    """JSON Schema of a file of clusters/."""
    schema = Cluster.model_json_schema()
    definitions = schema["$defs"]
    for kind in (Cluster, Gpu, Efficiency, Measured, Inside, Between, Curve):
        _describe(kind, schema if kind is Cluster else definitions[kind.__name__])
    gpu = definitions["Gpu"]
    named = {"enum": list(NAMES), "type": "string"}
    definitions["LikeGpu"] = {
        **gpu,
        "description": "A GPU type of the table, with what differs from it.",
        "properties": {"like": named, **gpu["properties"]},
        "required": ["like"],
        "title": "LikeGpu",
    }
    said = schema["properties"]["gpu"]["description"]
    options = [named, {"$ref": "#/$defs/LikeGpu"}, {"$ref": "#/$defs/Gpu"}]
    schema["properties"]["gpu"] = {"anyOf": options, "description": said}
    schema["properties"] = {"$schema": {"type": "string"}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _describe(kind: type[BaseModel], definition: dict[str, Any]) -> None:
    """Puts what the docstring says of the attributes to the fields."""
    first, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    definition["description"] = first.strip()
    for names, text in re.findall(r"^    ((?:\w+, )*\w+): (.*(?:\n {8,}.*)*)", attributes, re.MULTILINE):
        for name in names.split(", "):
            definition["properties"][name]["description"] = " ".join(text.split())
