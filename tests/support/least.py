"""Answers that say as little as a schema allows: null where it is offered, else 0, "", false or an empty item.

A constrained decoder must write what its schema requires. A model that knows nothing writes this.
"""

from __future__ import annotations

from typing import Any

from pipeline.schema import Schema, list_types, resolve_reference
from pipeline.schema.request_schema import allows_null


def write_least(part: Any, root: Schema) -> Any:
    """Return the least value of a schema; keywords other than types, bounds, choices and required properties are not followed."""
    part, _ = resolve_reference(part, root)
    if allows_null(part, root):
        return None
    for combined in ("anyOf", "oneOf"):
        if combined in part:
            return write_least(part[combined][0], root)
    if "allOf" in part:
        merged: dict[str, Any] = {}
        for inner in part["allOf"]:
            value = write_least(inner, root)
            merged |= value if isinstance(value, dict) else {}
        return merged | (write_object(part, root) if "properties" in part else {})
    if "enum" in part:
        return part["enum"][0]
    if "const" in part:
        return part["const"]
    match list_types(part)[0]:
        case "object":
            return write_object(part, root)
        case "array":
            count = part.get("minItems", 0)
            items = [*part.get("prefixItems", []), *[part.get("items", {})] * count]
            return [write_least(item, root) for item in items[: max(count, len(part.get("prefixItems", [])))]]
        case "string":
            return {"date": "0001-01-01", "date-time": "0001-01-01T00:00:00Z"}.get(part.get("format", ""), "x" * part.get("minLength", 0))
        case "boolean":
            return False
        case _:
            return max(0, part.get("minimum", 0))


def write_object(part: Schema, root: Schema) -> dict[str, Any]:
    properties = part.get("properties", {})
    return {name: write_least(properties.get(name, {}), root) for name in part.get("required", [])}


def list_scalars(value: Any) -> list[Any]:
    """Return the scalars of a value, null left out."""
    if isinstance(value, (dict, list)):
        return [scalar for inner in (value.values() if isinstance(value, dict) else value) for scalar in list_scalars(inner)]
    return [] if value is None else [value]
