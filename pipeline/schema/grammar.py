"""Grammar for constrained decoding: takes a JSON Schema and the tokens of an answer so far, returns the tokens that may come next.

    '{"type": "object", "properties": {"total": {"type": "number", "multipleOf": 0.01}}, "required": ["total"], …}'
    -> {"total":            forced: no other bytes fit, so these tokens need no forward pass
    -> {"total":1           digits, a point or the closing brace may follow
    -> {"total":12.34}      nothing more fits: the answer is complete

The grammar allows compact JSON only, with no space or newline between tokens: a weak model that may write whitespace repeats it
until `max_tokens`. It bounds numbers and dates to what their columns hold (`bound_values`). llguidance refuses schemas that it cannot
express. Keywords that only forbid (`not`, `uniqueItems`, …) are then removed from the grammar, which widens it, and the validator checks
them afterwards; `Grammar.notes` lists what was removed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance import numpy as bitmasks
from numpy.typing import NDArray

from pipeline.errors import DocumentError, JobError
from pipeline.schema import DECIMAL_DIGITS, Schema, dump_json, list_types, parse_json, walk_schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Masks = NDArray[np.int32]
"""(rows, vocabulary / 32): bit t % 32 of word t // 32 is set if token t may come next."""

COMPACT_SYNTAX: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False}
GRAMMAR_LIMITS = LLParserLimits(verbose_errors=False)
"""The default limits on time and memory, with error messages that do not repeat the whole schema."""
KEPT_GRAMMARS = 64
ANY_TEXT = r"start: /(?s:.*)/"

CHECKED_LATER = {
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "minProperties", "maxProperties", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties", "contentSchema",
}  # fmt: skip
"""Keywords that only forbid: without them the grammar allows more answers, and the validator still rejects them."""

MAX_INTEGER = 2**63 - 1024
"""Bound of whole numbers: the largest below that of an int64 column that is a 64-bit float, as which llguidance reads a bound."""
MAX_NUMBER = 10**15
NUMBER_STEP = Decimal("1e-9")
"""Bound and step of numbers whose schema has no `multipleOf`: a 64-bit float always keeps 15 digits. A number is written out, without an
exponent: exact arithmetic computes for hours with 1e999999999, and a weak model repeats digits until `max_tokens`."""
YEAR_PATTERN = "^([1-9]|0[1-9]|00[1-9]|000[1-9])"
"""Python's and Arrow's years begin at 1."""
INSTANT_PATTERN = YEAR_PATTERN + r".*[Tt]..:..:[0-5].(\.[0-9]{1,6})?([Zz]|[+-]..:..)$"
"""No leap second, and no fraction finer than a microsecond."""
BOUNDED_FORMATS = {"date": YEAR_PATTERN, "date-time": INSTANT_PATTERN}

NOT_ENFORCED = "not enforced while decoding:"
REFUSED = "schema: decoding cannot be constrained by it:"

MAX_RELAXATIONS = 50


@dataclass(frozen=True)
class Grammar:
    """A schema in the form that llguidance compiles."""

    text: str
    notes: tuple[str, ...]
    """One sentence for each keyword that the grammar leaves to the validator."""


def check_grammar(schema_text: str) -> tuple[str, ...]:
    """Return one note for each keyword of the schema that decoding does not enforce; loads no model and no tokenizer.

    Raises JobError if decoding cannot be constrained by the schema at all.
    """
    grammar = compile_schema(schema_text)
    matcher = LLMatcher(build_byte_tokenizer(), grammar.text, log_level=0, limits=GRAMMAR_LIMITS)
    bitmasks.fill_next_token_bitmask(matcher, bitmasks.allocate_token_bitmask(1, build_byte_tokenizer().vocab_size))
    if matcher.is_error():
        raise JobError(f"{REFUSED} {extract_first_line(matcher.get_error())}")
    return grammar.notes


@lru_cache(maxsize=KEPT_GRAMMARS)
def compile_schema(schema_text: str) -> Grammar:
    """Return the grammar of a schema, without the keywords that llguidance refuses and the validator can check.

    The keywords are taken from llguidance's own error messages, so a version that supports more of them enforces more of them.
    Raises JobError if the schema cannot be compiled.
    """
    schema, one_of_as_any_of = bound_values(parse_schema_object(schema_text)), False
    notes: list[str] = []
    for _ in range(MAX_RELAXATIONS):
        try:
            text = LLMatcher.grammar_from_json_schema(dump_json(schema), overrides={**COMPACT_SYNTAX, "coerce_one_of": one_of_as_any_of})
        except ValueError as error:
            raise JobError(f"{REFUSED} {error}") from None
        refused, reasons = LLMatcher.validate_grammar_with_warnings(text, build_byte_tokenizer(), limits=GRAMMAR_LIMITS)
        if not refused:
            return Grammar(text, tuple(notes))
        if reasons[0].startswith("oneOf constraints") and not one_of_as_any_of:
            one_of_as_any_of = True
            notes += [f"{NOT_ENFORCED} exactly one of {path}/oneOf, any one is accepted" for path, _ in find_parts_with(schema, "oneOf")]
        else:
            schema, dropped = relax_schema(schema, reasons[0])
            notes += dropped
    raise JobError(f"{REFUSED} {extract_first_line(reasons[0])}")


def bound_values(schema: Schema) -> Schema:
    """Return a copy of the schema that allows no number, date or instant that its column cannot hold (`arrow.py`)."""
    bounded = copy.deepcopy(schema)
    for _, part in walk_schema(bounded, "", skip=CHECKED_LATER):
        types = set(list_types(part)) - {"null"}
        if part.keys() & {"enum", "const"}:
            continue
        if types and types <= {"integer", "number"}:
            bound_number(part, "number" in types)
        elif types == {"string"} and part.get("format") in BOUNDED_FORMATS:
            part.setdefault("pattern", BOUNDED_FORMATS[part["format"]])
    return bounded


def bound_number(part: Schema, is_fraction: bool) -> None:
    """Add the bounds of a number's column where the schema has no narrower ones."""
    step = Decimal(str(part.get("multipleOf", NUMBER_STEP if is_fraction else 1)))
    decimals = -int(step.normalize().as_tuple().exponent)
    if "multipleOf" not in part and is_fraction:
        part["multipleOf"], most = step, MAX_NUMBER
    elif 0 < decimals < DECIMAL_DIGITS:
        most = 10 ** (DECIMAL_DIGITS - decimals)
    else:
        most = MAX_INTEGER if decimals <= 0 else MAX_NUMBER
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        wide = [key for key in (inclusive, exclusive) if key in part and sign * part[key] >= most]
        if wide or not part.keys() & {inclusive, exclusive}:
            part.update({exclusive: sign * most})
            part.pop(inclusive, None)


def parse_schema_object(schema_text: str) -> Schema:
    """Return the schema in a JSON text. Raises JobError if the text is not a JSON object."""
    try:
        schema = parse_json(schema_text)
    except ValueError as error:
        raise JobError(f"schema: {error}") from None
    if not isinstance(schema, dict):
        raise JobError(f"schema: expected a JSON object, found {schema_text.strip()[:40]}")
    return schema


def relax_schema(schema: Schema, reason: str) -> tuple[Schema, list[str]]:
    """Return the schema without the keywords that llguidance gave as its reason, and one note for each keyword removed.

    Raises JobError if the reason names a keyword that the validator could not check in place of the grammar.
    """
    if found := re.match(r"Unimplemented keys: (\[.*\])", reason):
        keys = set(json.loads(found[1]))
        if unusable := sorted(keys - CHECKED_LATER):
            where = ", ".join(f"{path}/{key}" for key in unusable for path, _ in find_parts_with(schema, key))
            raise JobError(f"schema: decoding cannot follow {where}: write it without {' and '.join(unusable)} (a local $ref works)")
        return remove_keywords(schema, lambda key, _: key in keys)
    if found := re.match(r"Unknown format: (.*)", reason):
        name = found[1].strip()
        return remove_keywords(schema, lambda key, value: key == "format" and value == name)
    if "regex" in reason:
        relaxed, dropped = remove_keywords(schema, lambda key, value: key == "pattern" and not is_supported_pattern(value))
        if dropped:
            return relaxed, dropped
    raise JobError(f"{REFUSED} {extract_first_line(reason)}")


def remove_keywords(schema: Schema, unwanted: Callable[[str, Any], bool]) -> tuple[Schema, list[str]]:
    """Return a copy of the schema without the unwanted keywords, and one note for each that restricted anything."""
    relaxed, dropped = copy.deepcopy(schema), []
    for path, part in walk_schema(relaxed, "", skip=CHECKED_LATER):
        for key in [key for key, value in part.items() if unwanted(key, value)]:
            value = part.pop(key)
            if (key, value) != ("uniqueItems", False):
                dropped.append(f"{NOT_ENFORCED} {path}/{key}" + (f" {value!r}" if isinstance(value, str) else ""))
    return relaxed, dropped


def find_parts_with(schema: Schema, keyword: str) -> list[tuple[str, Schema]]:
    """Return the JSON pointer and value of each schema in this one that uses a keyword."""
    return [(path, part) for path, part in walk_schema(schema, "", skip=CHECKED_LATER) if keyword in part]


def is_supported_pattern(pattern: Any) -> bool:
    """Return whether llguidance supports this regular expression; it has no look-around and no back-references."""
    text = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern}, overrides=COMPACT_SYNTAX)
    return not LLMatcher.validate_grammar_with_warnings(text, build_byte_tokenizer(), limits=GRAMMAR_LIMITS)[0]


@cache
def build_byte_tokenizer() -> LLTokenizer:
    """Return a tokenizer whose tokens are the 256 bytes, which is enough to check a grammar."""
    return LLTokenizer("byte")


def extract_first_line(message: str) -> str:
    """Return a message of llguidance on one line, without the parser state and stack that follow it."""
    return message.strip().split("\n<state>")[0].replace("\n", " ").strip()


class Vocabulary:
    """A tokenizer in the form that llguidance reads, with the grammars compiled for it. Safe to use from several threads."""

    def __init__(self, tokenizer_json: str, *, size: int, eos_ids: Sequence[int], threads: int = 1) -> None:
        """`size` is the width of the model's logits; it may exceed the tokenizer's vocabulary (Qwen2.5-VL: 152,064 and 151,665)."""
        self.size = size
        self.eos_ids = frozenset(eos_ids)
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(eos_ids), slices=LLTokenizer.json_slices())
        self._workers = LLExecutor(num_threads=threads)
        self._prototype = lru_cache(maxsize=KEPT_GRAMMARS)(self._compile)

    def start_constraint(self, schema_text: str) -> Constraint:
        """Return the constraint of a new answer; "" allows any valid UTF-8 text without control tokens.

        Raises JobError for a schema that cannot constrain decoding.
        """
        return Constraint(self._prototype(schema_text).deep_copy(), self.eos_ids)

    def decode_token(self, token: int) -> bytes:
        """Return the bytes of a token; they may end inside a UTF-8 character."""
        return self._tokenizer.decode_bytes([token])

    def compute_masks(self, rows: Sequence[Constraint]) -> Masks:
        """Return which tokens may come next in each row; rows may follow different schemas.

        A constraint that failed raises nothing here: its message is in `Constraint.error`.
        """
        masks = bitmasks.allocate_token_bitmask(len(rows), self.size)
        if rows:  # llguidance refuses none
            bitmasks.fill_next_token_bitmask_par(self._workers, [(row.matcher, index) for index, row in enumerate(rows)], masks)
        return masks

    def _compile(self, schema_text: str) -> LLMatcher:
        grammar = compile_schema(schema_text).text if schema_text else LLMatcher.grammar_from_lark(ANY_TEXT)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=GRAMMAR_LIMITS)
        if matcher.is_error():
            raise JobError(f"{REFUSED} {extract_first_line(matcher.get_error())}")
        return matcher


class Constraint:
    """State of the grammar in one answer."""

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self._eos_ids = eos_ids

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete and no token can follow it."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def error(self) -> str:
        """Why the grammar failed (too complex, for example), or ""."""
        return extract_first_line(self.matcher.get_error()) if self.matcher.is_error() else ""

    def accept_token(self, token: int) -> None:
        """Advance by one token. Raises DocumentError if the grammar does not allow it."""
        if not self.matcher.consume_token(token):
            raise DocumentError("grammar", f"decoding left the schema's grammar: {self.error}")

    def take_forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, whatever the model's logits are, and advance past them."""
        tokens = [token for token in self.matcher.compute_ff_tokens() if token not in self._eos_ids]
        if tokens and not self.matcher.consume_tokens(tokens):
            raise DocumentError("grammar", f"decoding left the schema's grammar: {self.error}")
        return tokens
