"""What a validator of JSON Schema would find, for the keywords that pydantic writes here."""

from __future__ import annotations

import re
from typing import Any

_KNOWN = set(
    "title description default examples $schema $defs required $ref anyOf enum const type minimum exclusiveMinimum maximum "
    "exclusiveMaximum pattern items prefixItems minItems maxItems properties additionalProperties propertyNames".split()
)
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def schema_errors(
    value: Any, schema: dict[str, Any], path: str = "$", whole: dict[str, Any] | None = None
) -> list[str]:
    """Its findings; refuses a schema with other keywords.

    Args:
        schema: of the value.
        path: of the value.
        whole: with the definitions; default: the schema.
    """
    whole = whole or schema
    assert set(schema) <= _KNOWN, f"{path}: teach schema_errors {set(schema) - _KNOWN}"
    if "$ref" in schema:
        return schema_errors(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], path, whole)
    if "anyOf" in schema:
        found = [schema_errors(value, option, path, whole) for option in schema["anyOf"]]
        return [] if [] in found else [error for errors in found for error in errors]
    if "type" in schema:
        wrong = not isinstance(value, _TYPES[schema["type"]])
        if wrong or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            return [f"{path}: {value!r} is not of type {schema['type']}"]
    broken = [
        f"{path}: {value!r} is not one of {schema[key]!r}"
        for key in ("enum", "const")
        if key in schema and value not in (schema[key] if key == "enum" else [schema[key]])
    ]
    broken += _out_of_bounds(value, schema, path)
    if isinstance(value, list):
        for index, item in enumerate(value):
            inner = schema.get("prefixItems", [])
            broken += schema_errors(
                item, inner[index] if index < len(inner) else schema.get("items", {}), f"{path}[{index}]", whole
            )
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        broken += [f"{path}.{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in properties:
                broken += schema_errors(item, properties[key], f"{path}.{key}", whole)
            elif others is False:
                broken.append(f"{path}.{key}: unknown key")
            elif isinstance(others, dict):
                broken += schema_errors(item, others, f"{path}.{key}", whole)
    return broken


def _out_of_bounds(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    broken = []
    if "minimum" in schema and value < schema["minimum"]:
        broken.append(f"{path}: {value!r} is below {schema['minimum']}")
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        broken.append(f"{path}: {value!r} must exceed {schema['exclusiveMinimum']}")
    if "maximum" in schema and value > schema["maximum"]:
        broken.append(f"{path}: {value!r} is above {schema['maximum']}")
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        broken.append(f"{path}: {value!r} must be less than {schema['exclusiveMaximum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        broken.append(f"{path}: {value!r} does not match {schema['pattern']}")
    if not schema.get("minItems", 0) <= (len(value) if isinstance(value, list) else 0) <= schema.get("maxItems", 10**9):
        broken.append(f"{path}: has {len(value)} items")
    return broken
