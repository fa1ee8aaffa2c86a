"""Validation: takes a schema and a value, and returns the value's violations as sentences that a model can act on.

    Validator(schema).find_violations({"line_items": [{"amount": Decimal("19.995")}]})
    -> [Violation("$.line_items[0].amount", "19.995 is not a multiple of 0.01", "multipleOf")]

The request schema offers null for every value (`request_schema.py`). So null where the schema forbids it means that the pages do not
show the value: the property counts as left out, which is a violation only if it is required.

A `Validator` is compiled once and kept, which is 17 times as fast as `jsonschema.validate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any, cast

from jsonschema import validators
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.protocols import Validator as Draft
from referencing import Registry

from pipeline.schema import DRAFTS, FORMATS, Schema, dump_json, find_draft, format_value, join_path
from pipeline.wording import truncate_text

SENTENCES = {
    "type": "{value} is not of type {limit}",
    "enum": "{value} is not one of {limit}",
    "const": "{value} is not {limit}",
    "format": "{value} is not a valid {limit}",
    "pattern": "{value} does not match the pattern {limit}",
    "multipleOf": "{value} is not a multiple of {limit}",
    "minimum": "{value} is less than {limit}",
    "maximum": "{value} is greater than {limit}",
    "exclusiveMinimum": "{value} is not greater than {limit}",
    "exclusiveMaximum": "{value} is not less than {limit}",
    "minLength": "{value} is shorter than {limit} characters",
    "maxLength": "{value} is longer than {limit} characters",
    "minItems": "{value} has fewer than {limit} items",
    "maxItems": "{value} has more than {limit} items",
    "uniqueItems": "{value} has an item twice",
    "anyOf": "{value} fits none of {limit}",
    "oneOf": "{value} does not fit exactly one of {limit}",
    "not": "{value} is excluded by {limit}",
}
Path = list[str | int]
"""Names and indexes that lead to a value."""
NOT_FOUND = "is required and was not found"


@dataclass(frozen=True)
class Violation:
    """One rule of the schema that a value breaks, with the path in the value."""

    path: str
    message: str
    keyword: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class Validator:
    """A compiled schema that validates many values."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        # With an empty registry a remote reference is an error and never a download.
        self._draft = EXACT[find_draft(schema)](schema, registry=Registry(), format_checker=FORMATS)

    def __reduce__(self) -> tuple[type[Validator], tuple[Schema]]:
        """Pickle the schema alone; compiling it takes microseconds."""
        return Validator, (self.schema,)

    def find_violations(self, value: Any) -> list[Violation]:
        """Return all violations, sorted by path; the list is empty if the value is valid."""
        causes, holders = self._find_causes(value), list[Path]()
        while absent := [list(cause.absolute_path) for cause in causes if is_absent_value(cause)]:
            for path in absent:
                value = remove_property(value, path)
                holders.append(path[:-1])
            causes = self._find_causes(value)
        for path in [list(cause.absolute_path) for cause in causes if is_absent_object(cause) and list(cause.absolute_path) in holders]:
            without = self._find_causes(remove_property(value, path))
            if not any(is_required_by(cause, path) for cause in without):
                value, causes = remove_property(value, path), without
        causes.sort(key=lambda error: [(isinstance(step, str), step) for step in error.absolute_path])
        return list(dict.fromkeys(violation for cause in causes for violation in describe_violations(cause)))

    def _find_causes(self, value: Any) -> list[ValidationError]:
        return [cause for error in self._draft.iter_errors(value) for cause in select_errors(error)]


def select_errors(error: ValidationError) -> Iterator[ValidationError]:
    """Yield the relevant errors: in `anyOf` and `oneOf` those of the one alternative whose type the value has, if there is just one."""
    alternatives: dict[Any, list[ValidationError]] = {}
    for inner in error.context or ():
        alternatives.setdefault(next(iter(inner.relative_schema_path), None), []).append(inner)
    meant = [errors for errors in alternatives.values() if not any(is_type_mismatch(inner) for inner in errors)]
    if len(meant) == 1:
        for inner in meant[0]:
            yield from select_errors(inner)
    else:
        yield best_match([error]) or error


def is_type_mismatch(error: ValidationError) -> bool:
    """Return whether the value as a whole has another type than this alternative."""
    return error.validator in ("type", "const") and not error.relative_path


def is_absent_value(error: ValidationError) -> bool:
    """Return whether the error is about a property whose value is null."""
    return error.instance is None and bool(error.absolute_path) and isinstance(error.absolute_path[-1], str)


def is_absent_object(error: ValidationError) -> bool:
    """Return whether the error is about a property whose value is an object that lacks a required value and has no other."""
    path = error.absolute_path
    return bool(path) and isinstance(path[-1], str) and error.validator == "required" and is_blank(error.instance)


def is_required_by(error: ValidationError, path: Path) -> bool:
    """Return whether the error says that the property at `path`, which was removed, is required."""
    return list(error.absolute_path) == path[:-1] and path[-1] in list_missing_names(error)


def list_missing_names(error: ValidationError) -> list[str]:
    """Return the required properties that the value of this error lacks; none for an error of another keyword."""
    names, found = cast(Any, error.validator_value), cast(Any, error.instance)
    return [name for name in names if name not in found] if error.validator == "required" else []


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: null, "", or a list or object of such values."""
    if isinstance(value, (dict, list)):
        return all(is_blank(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


def remove_property(value: Any, path: Path) -> Any:
    """Return a copy of a value without the property at `path`, if it is still there."""
    step: Any
    step, *rest = path
    if not (step in value if isinstance(value, dict) else isinstance(value, list) and step < len(value)):
        return value
    if not rest:
        return {name: item for name, item in value.items() if name != step}
    inner = remove_property(value[step], rest)
    return {**value, step: inner} if isinstance(value, dict) else [*value[:step], inner, *value[step + 1 :]]


def describe_violations(error: ValidationError) -> Iterator[Violation]:
    """Yield an error as a sentence that is short enough for a prompt and free of Python's notation; one for each missing property."""
    keyword = str(error.validator or "false")
    if keyword == "required":
        path = reduce(join_path, error.absolute_path, "$")
        yield from (Violation(join_path(path, name), NOT_FOUND, keyword) for name in list_missing_names(error))
        return
    sentence = SENTENCES.get(keyword, "{message}")
    limit: Any = error.validator_value
    if not isinstance(limit, str):
        limit = " or ".join(limit) if keyword == "type" else truncate_text(dump_json(limit), 200)
    text = sentence.format(value=format_value(error.instance), limit=limit, message=truncate_text(error.message, 160))
    yield Violation(reduce(join_path, error.absolute_path, "$"), text, keyword)


def is_integer(_: Any, value: Any) -> bool:
    """Return whether a value is an integer in JSON Schema: 5, and also 5.0."""
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and Fraction(value).denominator == 1


def check_multiple_of(draft: Draft, step: Any, value: Any, _: Schema) -> Iterator[ValidationError]:
    """Check `multipleOf` in fractions: in floats 0.07 is no multiple of 0.01, and Decimal's % fails beyond 28 digits."""
    if draft.is_type(value, "number") and Fraction(str(value)) % Fraction(str(step)):
        yield ValidationError(f"{value} is not a multiple of {step}")


EXACT = {
    draft: validators.extend(  # type: ignore[no-untyped-call]  # its stub has no types
        draft, {"multipleOf": check_multiple_of}, type_checker=draft.TYPE_CHECKER.redefine("integer", is_integer)
    )
    for draft in DRAFTS.values()
}
"""The drafts, extended to accept a Decimal as a number."""
