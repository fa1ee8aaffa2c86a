"""Request schema: takes a job's schema and returns the schema that an engine decodes by, which offers null for what the pages lack.

    {"type": "object", "required": ["total", "items"],                {"type": "object", "required": ["total", "items"],
     "properties": {"total": {"type": "number"},              ->       "properties": {"total": {"type": ["number", "null"]},
                    "items": {"type": "array", "minItems": 1}}}                       "items": {"type": "array"}},
                                                                       "additionalProperties": false}

A constrained decoder must write whatever its schema requires. Under the schema on the left it writes a total on a page that shows
none. Under the one on the right it may write null, and the validator, which keeps the schema on the left, says what is missing.

Bounds, patterns and names are kept. Objects with declared properties are closed: another property would have no column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from pipeline.schema import (
    IN_PLACE,
    LOCAL_DATE_TIME,
    LOCAL_DATE_TIME_PATTERN,
    NAMED,
    NESTED,
    UNCHECKED_FORMATS,
    Schema,
    dump_compact_schema,
    find_decimal_number,
    format_pointer,
    list_types,
    resolve_reference,
    walk_in_place,
    walk_schema,
)

FORCING = {
    "if", "then", "else", "not", "contains", "minContains", "maxContains", "minProperties", "dependencies", "dependentRequired",
    "dependentSchemas",
}  # fmt: skip
"""Keywords that can require a value which the pages lack; the validator checks them in the answer, or in the merged answers."""
OPENING = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def build_request_schema(schema: Schema, absent: bool) -> str:
    """Return the compact JSON text of the schema that an engine decodes by.

    With `absent`, null is offered for every value, arrays may be empty, and no keyword requires a value.
    """
    return dump_compact_schema(RequestSchemaBuilder(schema, absent).rewrite_root())


class RequestSchemaBuilder:
    """Rewrites one schema."""

    def __init__(self, schema: Schema, absent: bool) -> None:
        self.root, self.absent = schema, absent
        self.composed = {unquote(ref) for _, part in walk_schema(schema) for ref in list_composed_references(part)}

    def rewrite_root(self) -> Schema:
        """Return the rewritten root. It is closed even where the schema says that it is open: what it does not declare has no column."""
        root: Schema = self.rewrite(self.root, "#", False)
        is_open = any(root.get(key, False) is not False for key in OPENING)
        if is_open and (self.absent or set(root.get("required", ())) <= root["properties"].keys()):
            root = {key: value for key, value in root.items() if key not in OPENING} | {"additionalProperties": False}
        return root

    def rewrite(self, part: Any, pointer: str, is_composed: bool) -> Any:
        """Return the rewritten part. `is_composed`: properties that apply to the same value are declared elsewhere too."""
        if not isinstance(part, dict):
            return part
        if number := find_decimal_number(part):
            notes = {key: value for key, value in part.items() if key != "anyOf"}
            return {**notes, **number, **({"type": ["number", "null"]} if len(part["anyOf"]) > 2 else {})}
        has_own = "properties" in part
        rewritten: Schema = {}
        for key, value in part.items():
            if self.absent and (key in FORCING or (key == "minItems" and not is_fixed_array(part))):
                continue
            inside = format_pointer([key], pointer)
            if key in NAMED and isinstance(value, dict):
                rewritten[key] = {
                    name: self.rewrite_named(key, sub, format_pointer([name], inside), is_composed) for name, sub in value.items()
                }
            elif key in NESTED:
                shared = key in IN_PLACE and (has_own or is_composed or key == "allOf")
                rewritten[key] = (
                    [self.rewrite(sub, inside, shared) for sub in value] if isinstance(value, list) else self.rewrite(value, inside, shared)
                )
            elif key == "required" and self.absent and not is_composed:
                declared = {name for inner in walk_in_place(part, self.root) for name in inner.get("properties", {})}
                rewritten[key] = [name for name in value if name in declared]
            else:
                rewritten[key] = value
        rewrite_format(rewritten)
        if self.is_closable(part, pointer, is_composed):
            rewritten["additionalProperties"] = False
        return rewritten

    def rewrite_named(self, keyword: str, part: Any, pointer: str, is_composed: bool) -> Any:
        rewritten = self.rewrite(part, pointer, keyword in IN_PLACE and is_composed)
        if keyword == "properties" and self.absent and not allows_null(part, self.root) and not self.can_be_empty(part):
            return offer_null(rewritten)
        return rewritten

    def can_be_empty(self, part: Any) -> bool:
        """Say whether a value is an array that may be empty, or an object whose own values may be null: it needs no null itself.

        One of several kinds of object does: its kind would have to be chosen.
        """
        shapes = list(walk_in_place(part, self.root))
        options = [option for inner in shapes for key in ("anyOf", "oneOf") for option in inner.get(key, [])]
        if sum(not allows_null(option, self.root) for option in options) > 1:
            return False
        types = {name for inner in shapes for name in list_types(inner)} - {"null"}
        return types in ({"array"}, {"object"}) and not any(is_fixed_array(inner) or "$ref" in inner for inner in shapes)

    def is_closable(self, part: Schema, pointer: str, is_composed: bool) -> bool:
        """Say whether an object can be closed: all properties that apply to it are declared in this part."""
        if "properties" not in part or "$ref" in part or is_composed or pointer in self.composed or any(key in part for key in OPENING):
            return False
        if not self.absent and not set(part.get("required", ())) <= part["properties"].keys():
            return False
        return not any("properties" in inner for inner in list(walk_in_place(part, self.root))[1:])


def list_composed_references(part: Schema) -> list[str]:
    """Return the references whose properties apply to the same value as other properties: in an `allOf`, or beside properties."""
    branches = [part, *(sub for key in IN_PLACE for sub in iterate_schemas(part.get(key)))] if "properties" in part else []
    branches += iterate_schemas(part.get("allOf"))
    return [branch["$ref"] for branch in branches if "$ref" in branch]


def iterate_schemas(value: Any) -> list[Schema]:
    """Return the schemas that are the value of a keyword: itself, its items, or its members."""
    found = value if isinstance(value, list) else [value, *value.values()] if isinstance(value, Mapping) else []
    return [sub for sub in found if isinstance(sub, dict)]


def is_fixed_array(part: Schema) -> bool:
    """Say whether the positions of an array have a meaning, as in a box of four numbers: it is whole or null."""
    return "prefixItems" in part or isinstance(part.get("items"), list) or part.get("minItems", -1) == part.get("maxItems")


def offer_null(part: Any) -> Any:
    """Return a schema that allows null, too."""
    if not isinstance(part, dict):
        return {"type": "null"}
    plain = not part.keys() & {"$ref", "allOf", "anyOf", "oneOf", "const"}
    if plain and ("type" in part or "enum" in part):
        types = {"type": [*list_types(part), "null"]} if "type" in part else {}
        return {**part, **types, **({"enum": [*part["enum"], None]} if "enum" in part else {})}
    notes = {key: value for key, value in part.items() if key in ("title", "description")}
    rest = {key: value for key, value in part.items() if key not in notes}
    if rest.keys() == {"anyOf"}:
        return {**notes, "anyOf": [*rest["anyOf"], {"type": "null"}]}
    return {**notes, "anyOf": [rest, {"type": "null"}]}


def rewrite_format(part: Schema) -> None:
    """Replace this package's own format by a pattern, and remove formats that restrict nothing: servers may refuse unknown ones."""
    if part.get("format") == LOCAL_DATE_TIME:
        del part["format"]
        part.setdefault("pattern", LOCAL_DATE_TIME_PATTERN)
    elif part.get("format") in UNCHECKED_FORMATS:
        del part["format"]


def list_unforced_keywords(schema: Schema) -> list[str]:
    """Return the JSON pointers of the keywords that a request schema with `absent` leaves out, other than `minItems`."""
    return [
        f"{pointer}/{key}" for pointer, part in walk_schema(schema, "", skip=FORCING) for key in part if key in FORCING - {"then", "else"}
    ]


def allows_null(given: Any, root: Schema, seen: tuple[str, ...] = ()) -> bool:
    """Say whether a schema allows null, as far as `type`, `enum`, `const` and the schemas combined with them decide it."""
    part, path = resolve_reference(given, root, seen)
    if "$ref" in part or given is False:
        return False
    if "type" in part and "null" not in list_types(part):
        return False
    if None not in part.get("enum", [None]) or part.get("const") is not None:
        return False
    if not all(allows_null(inner, root, path) for inner in part.get("allOf", ())):
        return False
    return all(any(allows_null(inner, root, path) for inner in part[key]) for key in ("anyOf", "oneOf") if key in part)


def list_required_leaves(schema: Schema) -> list[str]:
    """Return the paths of the scalar properties that a record must have and that may not be null: `$.line_items[].amount`."""
    found: dict[str, None] = {}

    def search(part: Any, path: str, seen: frozenset[str]) -> None:
        branches = [part, *iterate_schemas(part.get("anyOf")), *iterate_schemas(part.get("allOf"))]
        refs = {branch["$ref"] for branch in branches if "$ref" in branch}
        if refs & seen:
            return
        shapes = list(walk_in_place(part, schema))
        for inner in shapes:
            for name in inner.get("required", ()):
                given = inner.get("properties", {}).get(name, True)
                if isinstance(given, dict) and not allows_null(given, schema):
                    search(given, f"{path}.{name}", seen | refs)
            if isinstance(inner.get("items"), dict):
                search(inner["items"], f"{path}[]", seen | refs)
        types = {name for inner in shapes for name in list_types(inner)} - {"null"}
        if path != "$" and not path.endswith("[]") and types not in ({"array"}, {"object"}):
            found[path] = None

    search(schema, "$", frozenset())
    return list(found)
