"""A JSON Schema and what was written so far -> the tokens that may come next. Knows no model; the only door to llguidance.

    '{"type": "object", "properties": {"total": {"type": "number", "multipleOf": 0.01}}, "required": ["total"], …}'
    -> {"total":            forced: no other bytes fit, so no model need be asked
    -> {"total":1           digits, a point or the closing brace
    -> {"total":12.34}      nothing more fits: the answer is done

The language is compact JSON: no space and no newline between tokens, because a weak model that may write them loops in them
until `max_tokens`. What llguidance cannot express it refuses; keywords that only forbid (`not`, `uniqueItems`, …) are then left out
of the grammar, which widens it, and the validator checks them afterwards. Whoever calls learns which (`Grammar.notes`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance import numpy as bitmasks
from numpy.typing import NDArray

from pipeline.errors import DocumentError, JobError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


SchemaObject = dict[str, Any]
Masks = NDArray[np.int32]
"""(rows, vocabulary / 32): bit t % 32 of word t // 32 says whether token t may come next."""

COMPACT_SYNTAX: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False}
GRAMMAR_LIMITS = LLParserLimits(verbose_errors=False)
"""Default limits on time and memory; errors that do not repeat the whole schema."""
KEPT_GRAMMARS = 64
ANY_TEXT = r"start: /(?s:.*)/"

CHECKED_LATER = {
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "minProperties", "maxProperties", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties", "contentSchema",
}  # fmt: skip
"""Keywords that only take answers away: without them the grammar allows more, and the validator still says no."""

LATER = "not enforced while decoding:"
REFUSED = "schema: decoding cannot be constrained by it:"

IN_VALUES = ("items", "additionalItems", "additionalProperties")
IN_LISTS = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
IN_MAPS = ("properties", "patternProperties", "$defs", "definitions")
MAX_RELAXATIONS = 50


@dataclass(frozen=True)
class Grammar:
    """A schema as llguidance reads it."""

    text: str
    notes: tuple[str, ...]
    """What the grammar leaves to the validator, one sentence each."""


def check_grammar(schema_text: str) -> tuple[str, ...]:
    """Return what decoding does not enforce of this schema; loads no model and no tokenizer.

    Raises JobError when decoding cannot be constrained by it at all.
    """
    grammar = compile_schema(schema_text)
    matcher = LLMatcher(build_byte_tokenizer(), grammar.text, log_level=0, limits=GRAMMAR_LIMITS)
    bitmasks.fill_next_token_bitmask(matcher, bitmasks.allocate_token_bitmask(1, build_byte_tokenizer().vocab_size))
    if matcher.is_error():
        raise JobError(f"{REFUSED} {extract_first_line(matcher.get_error())}")
    return grammar.notes


@lru_cache(maxsize=KEPT_GRAMMARS)
def compile_schema(schema_text: str) -> Grammar:
    """Return the grammar of a schema, leaving out step by step what llguidance refuses and the validator can check.

    llguidance itself says what it refuses, so that a newer one that can do more is asked to do more.
    """
    schema, one_of_as_any_of = parse_schema_text(schema_text), False
    notes: list[str] = []
    for _ in range(MAX_RELAXATIONS):
        try:
            text = LLMatcher.grammar_from_json_schema(schema, overrides={**COMPACT_SYNTAX, "coerce_one_of": one_of_as_any_of})
        except ValueError as error:
            raise JobError(f"{REFUSED} {error}") from None
        refused, reasons = LLMatcher.validate_grammar_with_warnings(text, build_byte_tokenizer(), limits=GRAMMAR_LIMITS)
        if not refused:
            return Grammar(text, tuple(notes))
        if reasons[0].startswith("oneOf constraints") and not one_of_as_any_of:
            one_of_as_any_of = True
            notes += [f"{LATER} exactly one of {path}/oneOf, any one is accepted" for path, _ in find_parts_with(schema, "oneOf")]
        else:
            schema, dropped = relax_schema(schema, reasons[0])
            notes += dropped
    raise JobError(f"{REFUSED} {extract_first_line(reasons[0])}")


def parse_schema_text(schema_text: str) -> SchemaObject:
    """Return the schema as a mapping."""
    try:
        schema = json.loads(schema_text)
    except ValueError as error:
        raise JobError(f"schema: not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise JobError(f"schema: expected a JSON object, found {schema_text.strip()[:40]}")
    return schema


def relax_schema(schema: SchemaObject, reason: str) -> tuple[SchemaObject, list[str]]:
    """Return the schema without what llguidance gave as its reason, and a note on each thing left out."""
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


def remove_keywords(schema: SchemaObject, unwanted: Callable[[str, Any], bool]) -> tuple[SchemaObject, list[str]]:
    """Return a copy of the schema without the unwanted keywords, and a note for each that asked for something."""
    relaxed, dropped = copy.deepcopy(schema), []
    for path, part in walk_parts(relaxed):
        for key in [key for key, value in part.items() if unwanted(key, value)]:
            value = part.pop(key)
            if (key, value) != ("uniqueItems", False):
                dropped.append(f"{LATER} {path}/{key}" + (f" {value!r}" if isinstance(value, str) else ""))
    return relaxed, dropped


def walk_parts(schema: Any, path: str = "") -> Iterator[tuple[str, SchemaObject]]:
    """Yield every schema inside a schema with its JSON pointer, itself first."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for word in IN_VALUES:
        yield from walk_parts(schema.get(word), f"{path}/{word}")
    for word in IN_LISTS:
        if isinstance(inner := schema.get(word), list):
            for position, part in enumerate(inner):
                yield from walk_parts(part, f"{path}/{word}/{position}")
    for word in IN_MAPS:
        if isinstance(inner := schema.get(word), dict):
            for name, part in inner.items():
                yield from walk_parts(part, f"{path}/{word}/{name.replace('~', '~0').replace('/', '~1')}")


def find_parts_with(schema: SchemaObject, keyword: str) -> list[tuple[str, SchemaObject]]:
    """Return the schemas that use a keyword."""
    return [(path, part) for path, part in walk_parts(schema) if keyword in part]


def is_supported_pattern(pattern: Any) -> bool:
    """Say whether llguidance's regular expressions, which have no look-around and no back-references, know this one."""
    text = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern}, overrides=COMPACT_SYNTAX)
    return not LLMatcher.validate_grammar_with_warnings(text, build_byte_tokenizer(), limits=GRAMMAR_LIMITS)[0]


@cache
def build_byte_tokenizer() -> LLTokenizer:
    """Return the tokenizer whose tokens are the 256 bytes: enough to check a grammar."""
    return LLTokenizer("byte")


def extract_first_line(message: str) -> str:
    """Return a message without the state and stack that follow it."""
    return message.strip().split("\n<state>")[0].replace("\n", " ").strip()


class Vocabulary:
    """A tokenizer as llguidance reads it, with the grammars compiled for it. Safe to use from several threads."""

    def __init__(self, tokenizer_json: str, *, size: int, eos_ids: Sequence[int], threads: int = 1) -> None:
        """`size` is the width of the model's logits, which may exceed the tokenizer's real vocabulary (152,064 and 151,665)."""
        self.size = size
        self.eos_ids = frozenset(eos_ids)
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(eos_ids), slices=LLTokenizer.json_slices())
        self._workers = LLExecutor(num_threads=threads)
        self._prototype = lru_cache(maxsize=KEPT_GRAMMARS)(self._compile)

    def start_constraint(self, schema_text: str) -> Constraint:
        """Return the constraint of a new answer; "" allows any text, but no control token and no broken UTF-8.

        Raises JobError for a schema that cannot constrain.
        """
        return Constraint(self._prototype(schema_text).deep_copy(), self.eos_ids)

    def decode_token(self, token: int) -> bytes:
        """Return what a token writes; part of a character, perhaps."""
        return self._tokenizer.decode_bytes([token])

    def compute_masks(self, rows: Sequence[Constraint]) -> Masks:
        """Return which tokens may come next in each row; rows may follow different schemas.

        Raises nothing: a constraint that failed says so in `Constraint.error`.
        """
        masks = bitmasks.allocate_token_bitmask(len(rows), self.size)
        bitmasks.fill_next_token_bitmask_par(self._workers, [(row.matcher, at) for at, row in enumerate(rows)], masks)
        return masks

    def _compile(self, schema_text: str) -> LLMatcher:
        grammar = compile_schema(schema_text).text if schema_text else LLMatcher.grammar_from_lark(ANY_TEXT)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=GRAMMAR_LIMITS)
        if matcher.is_error():
            raise JobError(f"{REFUSED} {extract_first_line(matcher.get_error())}")
        return matcher


class Constraint:
    """What may still be written in one answer."""

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self._eos_ids = eos_ids

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete and nothing can follow it."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def error(self) -> str:
        """Why the grammar gave up (too complex), "" while it has not."""
        return extract_first_line(self.matcher.get_error()) if self.matcher.is_error() else ""

    def accept_token(self, token: int) -> None:
        """Move on by one token. Raises DocumentError when the grammar does not allow it."""
        if not self.matcher.consume_token(token):
            raise DocumentError("grammar", f"decoding left the schema's grammar: {self.error}")

    def take_forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, whatever the model thinks, and move on past them."""
        tokens = [token for token in self.matcher.compute_ff_tokens() if token not in self._eos_ids]
        if tokens and not self.matcher.consume_tokens(tokens):
            raise DocumentError("grammar", f"decoding left the schema's grammar: {self.error}")
        return tokens
