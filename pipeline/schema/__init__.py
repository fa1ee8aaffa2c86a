"""JSON Schema: a schema file comes in and a checked `Schema` goes out, from which prompt, grammar, validation and columns are built.
The text of an answer comes in and its JSON value goes out, with exact numbers.

Numbers with a fraction are `Decimal`s in both, so that 19.99 is a multiple of 0.01 and stays 19.99:

    schemas/invoice.json --load_schema--> {"properties": {"total": {"type": "number", "multipleOf": Decimal("0.01")}, …}, …}
    '{"total": 19.99}'   --parse_json---> {"total": Decimal("19.99")}

The root of a schema from `load_schema` is an object with properties. The schema is valid by its draft, has no misspelt keywords,
and all its `$ref`s are local.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker
from jsonschema.exceptions import FormatError, best_match
from jsonschema.protocols import Validator

from pipeline.errors import JobError
from pipeline.schema.iri import is_iri, is_iri_reference
from pipeline.wording import suggest_word, truncate_text

Schema = dict[str, Any]
LOCAL_DATE_TIME = "x-local-date-time"
"""This package's format of a date and time as documents print it: 2024-05-31T14:05:00, without an offset from UTC."""
LOCAL_DATE_TIME_PATTERN = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?$"


def is_local_date_time(text: object) -> bool:
    """Say whether a text, or any other value, is a date and time of the format `LOCAL_DATE_TIME`."""
    if not isinstance(text, str):
        return True
    try:
        return bool(re.fullmatch(LOCAL_DATE_TIME_PATTERN, text) and datetime.fromisoformat(text))
    except ValueError:  # the 30th of February
        return False


class LenientFormatChecker(FormatChecker):
    """Format checker with the formats of 2020-12 in both drafts; a text on which the check of a format raises is invalid."""

    checkers = Draft202012Validator.FORMAT_CHECKER.checkers | {
        "iri": (is_iri, ()),
        "iri-reference": (is_iri_reference, ()),
        LOCAL_DATE_TIME: (is_local_date_time, ()),
    }

    def check(self, instance: object, format: str) -> None:
        try:
            super().check(instance, format)
        except (ValueError, OverflowError, RecursionError) as error:  # a regex such as a{99999999999}
            raise FormatError(f"{instance!r} is not a {format!r}", cause=error) from None


LATEST_DRAFT = "json-schema.org/draft/2020-12/schema"
DRAFTS: dict[str, type[Validator]] = {LATEST_DRAFT: Draft202012Validator, "json-schema.org/draft-07/schema": Draft7Validator}
FORMATS = LenientFormatChecker()
UNCHECKED_FORMATS = set(
    "base64url binary byte color decimal directory-path double email-name file-path float int32 int64 ipv4interface ipv4network "
    "ipv6interface ipv6network ipvanyaddress ipvanyinterface ipvanynetwork json-string multi-host-uri name-email password path phone "
    "uuid1 uuid3 uuid4 uuid5 uuid6 uuid7 uuid8".split()
)
"""Formats that pydantic and OpenAPI write and JSON Schema does not define: they restrict nothing here."""
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
PASSIVE = {*ANNOTATIONS, "$schema", "$id", "$anchor", "$defs", "definitions", "then", "else", "contentEncoding", "contentMediaType"}
"""Keywords that are known but have no rule of their own in a validator."""
OMITTED = ("$schema", "$id", "$comment")
"""Keywords that have no effect in a schema that passed `check_schema`; `dump_compact_schema` omits them and those that begin with x-."""
MERGE_RULE = "x-merge"
MERGE_RULES = {"first": {"any"}, "last": {"any"}, "concat": {"string", "array"}, "longest": {"string", "array"}}
"""How the values that the parts of a long document have for a property become one, and the types that each rule can join."""
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
"""Keywords whose schemas apply to the same value as the schema that contains them."""

DECIMAL_DIGITS = 18
"""Precision of a decimal column: cents up to 10^16, in 8 bytes."""
MAX_DEPTH = 100
"""Most levels of nesting in a JSON text: more than documents have, few enough for a recursion over the value."""
MAX_EXPONENT = 1100
"""Largest power of ten in a JSON number, and least one: a little more than those of a 64-bit float, so that a number which no column
holds costs its own cell alone. Exact arithmetic on 1e999999999 would fill the memory."""


def load_schema(path: str | Path) -> Schema:
    """Return the schema in a file.

    Raises JobError with one sentence that names the file, the JSON pointer, what was found and what is allowed.
    """
    try:
        return check_schema(parse_json(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise JobError(f"schema {path} cannot be read: {error.strerror}", path, "extract.schema") from None
    except UnicodeDecodeError as error:
        raise JobError(
            f"schema {path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}", path, "extract.schema"
        ) from None
    except ValueError as error:
        raise JobError(f"schema {path}: {error}", path, "extract.schema") from None


def check_schema(schema: Any) -> Schema:
    """Return the schema with a `$ref` at its root resolved. Raises ValueError with the JSON pointer and what is wrong there."""
    if not isinstance(schema, dict):
        raise ValueError(f"the root is {format_value(schema)}; it must be an object with 'type' and 'properties'")
    draft = find_draft(schema)
    check_draft(schema, draft)
    check_keywords(schema, draft)
    check_references(schema, draft)
    check_merge_rules(schema)
    root, _ = resolve_reference(schema, schema)
    check_root(root)
    return root


def find_draft(schema: Schema) -> type[Validator]:
    """Return the draft that `$schema` names, by default 2020-12. Raises ValueError for another draft."""
    given = schema.get("$schema", "https://" + LATEST_DRAFT)
    name = given.partition("://")[2].rstrip("#") if isinstance(given, str) else ""
    if name not in DRAFTS:
        raise ValueError(f"#/$schema is {format_value(given)}; allowed are " + " and ".join(f"'https://{known}'" for known in DRAFTS))
    return DRAFTS[name]


def check_draft(schema: Schema, draft: type[Validator]) -> None:
    """Raise ValueError if the schema violates its draft's meta-schema."""
    error = best_match(draft(draft.META_SCHEMA, format_checker=FORMATS).iter_errors(schema))
    if error:
        message = re.sub(r"Decimal\('(.*?)'\)", r"\1", error.message)
        raise ValueError(f"{format_pointer(error.absolute_path)}: {truncate_text(message, 200)}")


def check_keywords(schema: Schema, draft: type[Validator]) -> None:
    """Raise ValueError for an unknown keyword or format: `requried` would silently require nothing."""
    for pointer, part in walk_schema(schema):
        for key in part:
            if key not in KEYWORDS[draft] and not key.startswith("x-"):
                guess = suggest_word(key, KEYWORDS[draft])
                raise ValueError(f"{pointer}: '{key}' is not a keyword of its draft{guess}; your own keywords must begin with 'x-'")
        name = part.get("format", "date")
        if name not in FORMATS.checkers and name not in UNCHECKED_FORMATS:
            allowed = ", ".join(sorted(FORMATS.checkers))
            raise ValueError(f"{pointer}/format is '{name}'{suggest_word(name, FORMATS.checkers)}; allowed are {allowed}")


def check_references(schema: Schema, draft: type[Validator]) -> None:
    """Raise ValueError for a `$ref` that is remote, dangling or circular, and for a nested `$id`, which changes what `$ref`s mean."""
    pointers = {pointer for pointer, _ in walk_schema(schema)}
    for pointer, part in walk_schema(schema):
        if "$dynamicRef" in part or (pointer != "#" and not part.get("$id", "#").startswith("#")):
            raise ValueError(f"{pointer}: '$dynamicRef' and a nested '$id' are not supported; use '$ref' to '#/$defs/…'")
        if "$ref" not in part:
            continue
        if not part["$ref"].startswith("#"):
            raise ValueError(f"{pointer}/$ref is '{part['$ref']}'; only references within this file are allowed, '#/…'")
        if unquote(part["$ref"]) not in pointers:
            guess = suggest_word(part["$ref"], pointers)
            raise ValueError(f"{pointer}/$ref is '{part['$ref']}', which is not a schema in this file{guess}")
        if any("$ref" in loop for loop in walk_in_place(part, schema)):
            raise ValueError(f"{pointer}/$ref is '{part['$ref']}', which refers back to itself with no property or item in between")
        beside = [key for key in part if key not in PASSIVE | {"$ref"} and not key.startswith("x-")]
        if beside and draft is Draft7Validator:
            raise ValueError(f"{pointer}: draft-07 ignores '{beside[0]}' beside '$ref'; move it, or use draft 2020-12")


def check_merge_rules(schema: Schema) -> None:
    """Raise ValueError for an unknown `x-merge`, and for one that cannot join values of the type beside it."""
    for pointer, part in walk_schema(schema):
        rule = part.get(MERGE_RULE, "first")
        if not isinstance(rule, str) or rule not in MERGE_RULES:
            guess = suggest_word(str(rule), MERGE_RULES)
            raise ValueError(f"{pointer}/{MERGE_RULE} is {format_value(rule)}{guess}; allowed are {', '.join(MERGE_RULES)}")
        types = {name for inner in walk_in_place(part, schema) for name in list_types(inner)} - {"null"}
        if types and "any" not in MERGE_RULES[rule] and not types <= MERGE_RULES[rule]:
            joins = " or ".join(sorted(MERGE_RULES[rule]))
            found = " or ".join(sorted(types))
            raise ValueError(f"{pointer}/{MERGE_RULE} is '{rule}', which joins values of type {joins}; the type here is {found}")


def list_types(part: Schema) -> list[str]:
    """Return the types that the keyword `type` of a schema names."""
    given = part.get("type", [])
    return [given] if isinstance(given, str) else list(given)


def find_decimal_number(part: Schema) -> Schema | None:
    """Return the schema of the number in pydantic's form of a `Decimal`, `anyOf` of a number and of the same number as a string.

    None for any other schema. Some versions of pydantic give the string a pattern, none gives it another keyword; an optional Decimal
    has null as a third alternative.
    """
    options = part.get("anyOf")
    if not isinstance(options, list) or "type" in part or not all(isinstance(option, dict) for option in options):
        return None
    kinds = [option.get("type") for option in options]
    if kinds not in (["number", "string"], ["number", "string", "null"]) or options[1].keys() - {"type", "pattern"}:
        return None
    pattern = options[1].get("pattern")
    return options[0] if pattern is None or ("[+-]?0*" in pattern and "\\d" in pattern) else None


def check_root(root: Schema) -> None:
    """Raise ValueError for a root without properties, or with a property whose column could clash with a provenance column."""
    if root.get("type") != "object":
        raise ValueError(
            f"#/type is {format_value(root.get('type'))}; the root must be of type 'object', because its properties become columns"
        )
    if not root.get("properties"):
        raise ValueError("#/properties is missing or empty; the root must declare the properties that become columns")
    for name in root["properties"]:
        if name.startswith("_"):
            raise ValueError(
                f"{format_pointer(['properties', name])}: a column's name must not begin with '_', which is reserved for provenance columns"
            )


def walk_schema(schema: Any, pointer: str = "#", skip: Collection[str] = ()) -> Iterator[tuple[str, Schema]]:
    """Yield the JSON pointer and value of every schema inside a schema, itself first; true and false count as {}.

    Schemas under the keywords in `skip` are left out.
    """
    part = schema if isinstance(schema, dict) else {}
    yield pointer, part
    for path, sub in list_subschemas(part):
        if path[0] not in skip:
            yield from walk_schema(sub, format_pointer(path, pointer), skip)


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

    If the result still has its `$ref`, that reference is already in `seen`: the schema is recursive. The keywords beside a
    `$ref` apply too; if both sides have the same keyword, the result is an `allOf`.
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
    """Yield every schema that applies to the same value, this one first, with references resolved."""
    part, path = resolve_reference(schema, root, seen)
    yield part
    for (key, *_), sub in list_subschemas(part):
        if key in IN_PLACE:
            yield from walk_in_place(sub, root, path)


def dump_compact_schema(schema: Schema) -> str:
    """Return the schema as compact JSON without keywords that have no effect on an answer.

    The keys keep the order of the file, in which the model generates them.
    """
    plain = copy.deepcopy(schema)
    for _, part in walk_schema(plain):
        for key in [key for key in part if key in OMITTED or key.startswith("x-")]:
            part.pop(key)
    return dump_json(plain)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, with exact numbers.

    Raises ValueError with a sentence for anything that JSON parsers read differently: a duplicate key, NaN, a number
    with an exponent beyond `MAX_EXPONENT`, a lone surrogate, more than `MAX_DEPTH` levels of nesting.
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
    """Return a number with a fraction or an exponent. Raises ValueError for an exponent beyond `MAX_EXPONENT`."""
    try:
        number = Decimal(digits)
    except ArithmeticError:  # an exponent of more digits than Decimal takes
        number = Decimal("Infinity")
    if not number.is_finite() or abs(number.adjusted()) > MAX_EXPONENT:
        raise ValueError(f"the number {truncate_text(digits, 40)} has more than {MAX_EXPONENT:,} digits before or after the point")
    return number


def parse_integer(digits: str) -> int:
    """Return a whole number. Raises ValueError if it has more than `MAX_EXPONENT` digits."""
    if len(digits) > MAX_EXPONENT:
        raise ValueError(f"the number {truncate_text(digits, 40)} has more than {MAX_EXPONENT:,} digits before or after the point")
    return int(digits)


def refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"not JSON: {constant} is not a number")


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError for a duplicate key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {format_value(max(names, key=names.count))} occurs twice in one object")
    return value


def dump_json(value: Any, depth: int = 0) -> str:
    """Return compact JSON; a Decimal is written with exactly its digits. Raises RecursionError beyond `MAX_DEPTH`."""
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
    """Return a value as compact JSON for a message, cut to 80 characters."""
    return truncate_text(dump_json(value), 80)
