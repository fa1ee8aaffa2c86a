"""A JSON Schema file -> a `Schema` that is known to be sound, and a JSON text -> its value. Knows no grammar and no column.

Numbers with a fraction are `Decimal`s on both sides, so that 19.99 is a multiple of 0.01 and stays 19.99:

    schemas/invoice.json --load--> {"properties": {"total": {"type": "number", "multipleOf": Decimal("0.01")}, …}, …}
    '{"total": 19.99}'   --parse-> {"total": Decimal("19.99")}

What `load` returns is an object with properties, valid by its draft, without misspelt keywords, every `$ref` of it local.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker
from jsonschema.exceptions import FormatError, best_match
from jsonschema.protocols import Validator

from pipeline.errors import JobError

Schema = dict[str, Any]


class LenientFormatChecker(FormatChecker):
    """Checks the formats of 2020-12 in both drafts, and takes a checker that stumbles over a text for a no."""

    checkers = Draft202012Validator.FORMAT_CHECKER.checkers

    def check(self, instance: object, format: str) -> None:
        try:
            super().check(instance, format)
        except (ValueError, OverflowError, RecursionError) as error:  # a regex such as a{99999999999}
            raise FormatError(f"{instance!r} is not a {format!r}", cause=error) from None


LATEST_DRAFT = "json-schema.org/draft/2020-12/schema"
DRAFTS: dict[str, type[Validator]] = {LATEST_DRAFT: Draft202012Validator, "json-schema.org/draft-07/schema": Draft7Validator}
FORMATS = LenientFormatChecker()
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
PASSIVE = {*ANNOTATIONS, "$schema", "$id", "$anchor", "$defs", "definitions", "then", "else", "contentEncoding", "contentMediaType"}
"""Keywords that are known but have no rule of their own in a validator."""
UNREAD = ("$schema", "$id", "$comment")
"""Keywords that change nothing in a schema that passed `check`."""
KEYWORDS: dict[type[Validator], set[str]] = {
    Draft7Validator: {*PASSIVE, *Draft7Validator.VALIDATORS},
    Draft202012Validator: {*PASSIVE, *Draft202012Validator.VALIDATORS, "minContains", "maxContains", "contentSchema"},
}
NAMED = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}
"""Keywords whose value holds schemas by name."""
NESTED = {"additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "contentSchema", "else", "if", "items", "not"}
NESTED |= {"oneOf", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"}
"""Keywords whose value is a schema or a list of them."""
IN_PLACE = ("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas")
"""Keywords whose schemas speak of the same value as the schema they stand in."""

MAX_DEPTH = 100
"""Levels of nesting in a JSON text: more than any document has, few enough for every recursion over its value."""
MAX_EXPONENT = 308
"""Powers of ten in a JSON number: what a 64-bit float holds. Exact arithmetic on 1e999999999 would fill the memory."""


def load_schema(path: str | Path) -> Schema:
    """Return the schema in a file.

    Raises JobError with one sentence that names the file, the place in it, what was found and what is allowed.
    """
    try:
        return check_schema(parse_json(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise JobError(f"schema {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"schema {path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except ValueError as error:
        raise JobError(f"schema {path}: {error}") from None


def check_schema(schema: Any) -> Schema:
    """Return the schema, a `$ref` at its root put in place; raises ValueError with the pointer to what is wrong."""
    if not isinstance(schema, dict):
        raise ValueError(f"the root is {format_value(schema)}; it must be an object with 'type' and 'properties'")
    draft = find_draft(schema)
    check_draft(schema, draft)
    check_keywords(schema, draft)
    check_references(schema, draft)
    root, _ = resolve_reference(schema, schema)
    check_root(root)
    return root


def find_draft(schema: Schema) -> type[Validator]:
    """Return the draft that `$schema` names, by default 2020-12."""
    given = schema.get("$schema", "https://" + LATEST_DRAFT)
    name = given.partition("://")[2].rstrip("#") if isinstance(given, str) else ""
    if name not in DRAFTS:
        raise ValueError(f"#/$schema is {format_value(given)}; allowed are " + " and ".join(f"'https://{known}'" for known in DRAFTS))
    return DRAFTS[name]


def check_draft(schema: Schema, draft: type[Validator]) -> None:
    """Hold the schema against its draft's own schema."""
    error = best_match(draft(draft.META_SCHEMA, format_checker=FORMATS).iter_errors(schema))
    if error:
        message = re.sub(r"Decimal\('(.*?)'\)", r"\1", error.message)
        raise ValueError(f"{format_pointer(error.absolute_path)}: {truncate_text(message, 200)}")


def check_keywords(schema: Schema, draft: type[Validator]) -> None:
    """Refuse words that the draft does not know: `requried` would silently require nothing. Formats likewise."""
    for place, part in walk_schema(schema):
        for key in part:
            if key not in KEYWORDS[draft] and not key.startswith("x-"):
                guess = suggest_word(key, KEYWORDS[draft])
                raise ValueError(f"{place}: '{key}' is not a keyword of its draft{guess}; notes of your own must begin with 'x-'")
        name = part.get("format", "date")
        if name not in FORMATS.checkers:
            allowed = ", ".join(sorted(FORMATS.checkers))
            raise ValueError(f"{place}/format is '{name}'{suggest_word(name, FORMATS.checkers)}; allowed are {allowed}")


def check_references(schema: Schema, draft: type[Validator]) -> None:
    """Refuse references that leave the file, lead nowhere or in a circle, and base addresses that would bend them."""
    places = {place for place, _ in walk_schema(schema)}
    for place, part in walk_schema(schema):
        if "$dynamicRef" in part or (place != "#" and not part.get("$id", "#").startswith("#")):
            raise ValueError(f"{place}: '$dynamicRef' and a nested '$id' are not supported; use '$ref' to '#/$defs/…'")
        if "$ref" not in part:
            continue
        if not part["$ref"].startswith("#"):
            raise ValueError(f"{place}/$ref is '{part['$ref']}'; allowed are places in this file, '#/…'")
        if unquote(part["$ref"]) not in places:
            raise ValueError(f"{place}/$ref is '{part['$ref']}', which is no schema in this file{suggest_word(part['$ref'], places)}")
        if any("$ref" in loop for loop in walk_in_place(part, schema)):
            raise ValueError(f"{place}/$ref is '{part['$ref']}', which leads back to itself without a property or an item between")
        beside = [key for key in part if key not in PASSIVE | {"$ref"} and not key.startswith("x-")]
        if beside and draft is Draft7Validator:
            raise ValueError(f"{place}: draft-07 ignores '{beside[0]}' beside '$ref'; move it, or use draft 2020-12")


def check_root(root: Schema) -> None:
    """Refuse a root that gives no columns, or columns that would clash with a record's own."""
    if root.get("type") != "object":
        raise ValueError(
            f"#/type is {format_value(root.get('type'))}; the root must be of type 'object', because its properties become columns"
        )
    if not root.get("properties"):
        raise ValueError("#/properties is missing or empty; the root must declare the properties that become columns")
    for name in root["properties"]:
        if name.startswith("_"):
            raise ValueError(
                f"{format_pointer(['properties', name])}: a column's name must not begin with '_', which marks a record's provenance"
            )


def walk_schema(schema: Any, place: str = "#") -> Iterator[tuple[str, Schema]]:
    """Yield the pointer and value of every schema inside a schema, itself first; true and false count as {}."""
    part = schema if isinstance(schema, dict) else {}
    yield place, part
    for path, sub in list_subschemas(part):
        yield from walk_schema(sub, format_pointer(path, place))


def list_subschemas(part: Schema) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the path and value of each schema directly inside this one."""
    for key, value in part.items():
        if key in NAMED:
            yield from (((key, name), sub) for name, sub in value.items() if isinstance(sub, (dict, bool)))
        elif key in NESTED and isinstance(value, list):
            yield from (((key, index), sub) for index, sub in enumerate(value))
        elif key in NESTED:
            yield (key,), value


def format_pointer(path: Collection[str | int], start: str = "#") -> str:
    """Return a JSON pointer in fragment form, not percent-encoded."""
    return "/".join([start, *(str(step).replace("~", "~0").replace("/", "~1") for step in path)])


def resolve_reference(schema: Any, root: Schema, seen: tuple[str, ...] = ()) -> tuple[Schema, tuple[str, ...]]:
    """Return the schema that a `$ref` points to, and the references followed so far.

    A schema that comes back with its `$ref` is one that was already on the way here: a recursion. What stands beside
    the `$ref` holds too; where both say the same keyword the result is an `allOf`.
    """
    if not isinstance(schema, dict):
        return {}, seen
    ref = schema.get("$ref")
    if ref is None or ref in seen:
        return schema, seen
    target = root
    for key in unquote(ref).split("/")[1:]:
        step = key.replace("~1", "/").replace("~0", "~")
        target = target[int(step)] if isinstance(target, list) else target[step]
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    if isinstance(target, dict) and (beside.keys() & target.keys()) - PASSIVE:
        return {**{key: beside[key] for key in beside if key in ANNOTATIONS}, "allOf": [target, beside]}, (*seen, ref)
    return resolve_reference({**target, **beside} if isinstance(target, dict) else beside, root, (*seen, ref))


def walk_in_place(schema: Any, root: Schema, seen: tuple[str, ...] = ()) -> Iterator[Schema]:
    """Yield every schema that speaks of the same value, this one first, references followed."""
    part, path = resolve_reference(schema, root, seen)
    yield part
    for (key, *_), sub in list_subschemas(part):
        if key in IN_PLACE:
            yield from walk_in_place(sub, root, path)


def dump_compact_schema(schema: Schema) -> str:
    """Return the schema as the shortest text of the same meaning, its keys in the author's order, which generation follows."""
    plain = copy.deepcopy(schema)
    for _, part in walk_schema(plain):
        for key in UNREAD:
            part.pop(key, None)
    return dump_json(plain)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, its numbers exact.

    Raises ValueError with a sentence on anything that another reader might take differently: a key given twice, NaN, a
    number beyond a 64-bit float's range, half a surrogate pair, endless nesting.
    """
    try:
        value = json.loads(
            text, parse_float=parse_decimal, parse_int=parse_integer, parse_constant=refuse_constant, object_pairs_hook=build_object
        )
        dump_json(value).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"not text: a string holds the lone surrogate {error.object[error.start]!a}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return value


def parse_decimal(digits: str) -> Decimal:
    """Return a number with a fraction or an exponent."""
    number = Decimal(digits)
    if abs(number.adjusted()) > MAX_EXPONENT:
        raise ValueError(f"the number {truncate_text(digits, 40)} is beyond the range of a 64-bit float")
    return number


def parse_integer(digits: str) -> int:
    """Return a whole number."""
    if len(digits) > MAX_EXPONENT:
        raise ValueError(f"the number {truncate_text(digits, 40)} is beyond the range of a 64-bit float")
    return int(digits)


def refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"not JSON: {constant} is not a number")


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, refusing a key that is given twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {format_value(max(names, key=names.count))} occurs twice in one object")
    return value


def dump_json(value: Any, depth: int = 0) -> str:
    """Return compact JSON; a Decimal is written digit by digit as it is."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{dump_json(item, depth + 1)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(dump_json(item, depth + 1) for item in value) + "]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


def join_path(path: str, step: str | int) -> str:
    """Return the path of a value inside the one at `path`: `$.line_items[2].amount`."""
    if isinstance(step, str) and step.isidentifier():
        return f"{path}.{step}"
    return f"{path}[{dump_json(step)}]"


def format_value(value: Any) -> str:
    """Return a value as a message shows it."""
    return truncate_text(dump_json(value), 80)


def truncate_text(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def suggest_word(word: str, known: Collection[str]) -> str:
    """Return the question that a misspelt word deserves."""
    close = get_close_matches(word, sorted(known), 1)
    return f"; did you mean '{close[0]}'?" if close else ""
