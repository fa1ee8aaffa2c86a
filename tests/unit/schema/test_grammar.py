"""Grammar: what it allows, what it forces and what it leaves to the validator. Needs a tokenizer and no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from pipeline.errors import DocumentError, JobError
from pipeline.schema.grammar import GRAMMAR_LIMITS, Constraint, LLMatcher, Vocabulary, build_byte_tokenizer, check_grammar, compile_schema
from tests.support.tiny_tokenizer import CONTROL, ORDINARY, VOCABULARY, build_tokenizer

ROOT = Path(__file__).parents[3]
SHARED = Path(__file__).parents[4] / "shared"
INVOICE = (ROOT / "schemas" / "invoice.json").read_text()
RECEIPT = (ROOT / "schemas" / "receipt.json").read_text()
WORDS = build_tokenizer()
END = WORDS.token_to_id("<|im_end|>")
SHIPPED = [file.read_text() for file in sorted((ROOT / "schemas").glob("*.json"))]
AMOUNT = {"type": "number", "multipleOf": 0.01}
TOTAL = json.dumps({"type": "object", "properties": {"total": AMOUNT}, "required": ["total"], "additionalProperties": False})


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS.to_str(), size=VOCABULARY, eos_ids=[END])


def find_allowed_tokens(vocabulary: Vocabulary, constraint: Constraint) -> set[int]:
    masks = vocabulary.compute_masks([constraint])
    return set(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist())


def is_accepted(vocabulary: Vocabulary, schema: str, text: str) -> bool:
    """Return whether the grammar accepts a text, token by token, as a complete answer."""
    constraint = vocabulary.start_constraint(schema)
    for token in WORDS.encode(text).ids:
        if token not in find_allowed_tokens(vocabulary, constraint):
            return False
        constraint.accept_token(token)
    return constraint.is_done or END in find_allowed_tokens(vocabulary, constraint)


@pytest.mark.parametrize("text", ['{"total":1}', '{"total":-0.5}', '{"total":12.34}', '{"total":0}'])
def test_what_fits_can_be_written(vocabulary: Vocabulary, text: str) -> None:
    assert is_accepted(vocabulary, TOTAL, text)


@pytest.mark.parametrize("text", ['{"total":1.234}', '{"total":1e2}', '{"total":"1"}', '{"total":null}', "{}", '{"total":1,"x":2}'])
def test_what_does_not_fit_cannot_be_written(vocabulary: Vocabulary, text: str) -> None:
    assert not is_accepted(vocabulary, TOTAL, text)


@pytest.mark.parametrize("text", [' {"total":1}', '{"total": 1}', '{ "total":1}', '{"total":1\n}'])
def test_no_whitespace_can_be_written_between_tokens(vocabulary: Vocabulary, text: str) -> None:
    assert not is_accepted(vocabulary, TOTAL, text)


def test_a_schema_cannot_allow_itself_whitespace(vocabulary: Vocabulary) -> None:
    schema = json.dumps({**json.loads(TOTAL), "x-guidance": {"whitespace_flexible": True, "lenient": True}})
    assert not is_accepted(vocabulary, schema, '{"total": 1}')


def test_dates_are_dates(vocabulary: Vocabulary) -> None:
    days = {"2024-02-29": True, "2024-02-30": False, "2024-13-01": False, "29.02.2024": False}
    assert {day: is_accepted(vocabulary, '{"type": "string", "format": "date"}', f'"{day}"') for day in days} == days


BOUNDED = {"type": "object", "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("part", "allowed", "forbidden"),
    [
        ({"type": "integer"}, ["9223372036854774783", "-7"], ["9223372036854775807", "-9223372036854775809", "1e3"]),
        ({"type": "integer", "maximum": 9223372036854775807}, ["5"], ["9223372036854775808"]),
        ({"type": "integer", "minimum": 3}, ["3"], ["2", "9223372036854775808"]),
        ({"type": "number"}, ["0.000000001", "999999999999999.9"], ["1e400", "1e-5", "1000000000000000", "0.0000000001"]),
        ({"type": ["number", "null"], "multipleOf": 0.01}, ["9999999999999999.99", "null"], ["10000000000000000", "0.001", "1e2"]),
        ({"type": "number", "minimum": 0, "maximum": 5}, ["0.5"], ["-1", "6"]),
        ({"type": "string", "format": "date"}, ['"0001-01-01"', '"2024-02-29"'], ['"0000-01-01"']),
        (
            {"type": "string", "format": "date-time"},
            ['"2024-02-29T10:00:59.123456Z"'],
            ['"2024-02-29T10:00:60Z"', '"2024-02-29T10:00:59.1234567Z"'],
        ),
    ],
)
def test_nothing_can_be_written_that_its_column_cannot_hold(part: dict[str, object], allowed: list[str], forbidden: list[str]) -> None:
    vocabulary = Vocabulary(WORDS.to_str(), size=VOCABULARY, eos_ids=[END])
    schema = json.dumps({**BOUNDED, "properties": {"x": part}})
    assert [text for text in allowed if not is_accepted(vocabulary, schema, f'{{"x":{text}}}')] == []
    assert [text for text in forbidden if is_accepted(vocabulary, schema, f'{{"x":{text}}}')] == []


def test_forced_text_is_known_without_a_model_and_uses_the_longest_tokens(vocabulary: Vocabulary) -> None:
    schema = '{"type": "object", "properties": {"invoice_number": {"type": "string"}}, "required": ["invoice_number"]}'
    assert [WORDS.id_to_token(token) for token in vocabulary.start_constraint(schema).take_forced_tokens()] == ['{"invoice_number":', '"']


def test_a_complete_answer_is_done_without_an_end_token(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.start_constraint(TOTAL)
    for token in WORDS.encode('{"total":12.34}').ids:
        constraint.accept_token(token)
    assert constraint.is_done


def test_added_tokens_that_are_text_may_be_written_and_control_tokens_never(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.start_constraint('{"type": "string"}')
    constraint.take_forced_tokens()
    control, ordinary = ({WORDS.token_to_id(token) for token in tokens} for tokens in (CONTROL, ORDINARY))
    inside = find_allowed_tokens(vocabulary, constraint)
    assert not control & inside
    assert {WORDS.token_to_id(text) for text in ("null", "Return the JSON object for this document.")} <= ordinary & inside


def test_free_text_may_be_anything_but_control_tokens_and_padding(vocabulary: Vocabulary) -> None:
    real = set(range(WORDS.get_vocab_size()))
    control = {WORDS.token_to_id(token) for token in CONTROL}
    assert find_allowed_tokens(vocabulary, vocabulary.start_constraint("")) == real - control | {END}


def test_token_ids_beyond_the_tokenizer_are_never_allowed(vocabulary: Vocabulary) -> None:
    assert WORDS.get_vocab_size() < VOCABULARY
    for schema in ("", TOTAL, "{}"):
        assert max(find_allowed_tokens(vocabulary, vocabulary.start_constraint(schema))) < WORDS.get_vocab_size()


def test_a_batch_mixes_schemas(vocabulary: Vocabulary) -> None:
    rows = [vocabulary.start_constraint(schema) for schema in (INVOICE, "", TOTAL, RECEIPT)]
    together = vocabulary.compute_masks(rows)
    assert all((together[at] == vocabulary.compute_masks([row])[0]).all() for at, row in enumerate(rows))


def test_answers_to_one_schema_do_not_move_each_other(vocabulary: Vocabulary) -> None:
    one, other = vocabulary.start_constraint(TOTAL), vocabulary.start_constraint(TOTAL)
    before = find_allowed_tokens(vocabulary, other)
    one.accept_token(WORDS.token_to_id("{"))
    assert find_allowed_tokens(vocabulary, other) == before


def test_a_token_that_does_not_fit_fails_the_answer(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.start_constraint(TOTAL)
    with pytest.raises(DocumentError, match="grammar"):
        constraint.accept_token(WORDS.token_to_id("]"))
    assert constraint.error


@pytest.mark.parametrize("schema", SHIPPED)
def test_random_answers_to_the_shipped_schemas_validate(vocabulary: Vocabulary, schema: str) -> None:
    chance = np.random.default_rng(7)
    for _ in range(3):
        constraint, written = vocabulary.start_constraint(schema), []
        while not constraint.is_done:
            written += constraint.take_forced_tokens()
            if not constraint.is_done:
                options = sorted(find_allowed_tokens(vocabulary, constraint))
                short = [token for token in options if WORDS.decode([token]) in ('"', "null", "]", "}", ".")]
                written.append(int(chance.choice(short or options)))
                constraint.accept_token(written[-1])
        value = json.loads(WORDS.decode(written))
        assert [error.message for error in Draft202012Validator(json.loads(schema)).iter_errors(value)] == []


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "/uniqueItems"),
        ({"type": "object", "properties": {"a/b": {"not": {"type": "null"}}}}, "/properties/a~1b/not"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "/dependentRequired"),
        ({"type": "string", "format": "iban"}, "/format 'iban'"),
        ({"type": "string", "pattern": "^(?!x)y$"}, "/pattern '^(?!x)y$'"),
        ({"oneOf": [{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 5}]}, "exactly one of /oneOf"),
    ],
)
def test_what_only_forbids_is_left_to_the_validator_and_said(schema: dict[str, object], left: str) -> None:
    assert [note for note in check_grammar(json.dumps(schema)) if left in note]


def test_leaving_a_keyword_out_allows_more_and_keeps_the_rest(vocabulary: Vocabulary) -> None:
    schema = '{"type": "array", "items": {"type": "integer", "not": {"const": 3}}, "uniqueItems": true}'
    assert is_accepted(vocabulary, schema, "[1,2]")
    assert is_accepted(vocabulary, schema, "[3,3]")
    assert not is_accepted(vocabulary, schema, '["1"]')


def test_unique_items_that_need_not_be_unique_are_no_news() -> None:
    assert check_grammar('{"type": "array", "uniqueItems": false}') == ()


@pytest.mark.parametrize("schema", [*SHIPPED, TOTAL, "{}"])
def test_the_grammar_enforces_all_of_the_shipped_schemas(schema: str) -> None:
    assert check_grammar(schema) == ()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": ', "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"type": "strang"}', "strang"),
        ('{"$dynamicRef": "#a"}', r"/\$dynamicRef"),
        ('{"$ref": "https://example.org/schema.json"}', "example.org"),
        ('{"type": "string", "enum": [1]}', "Unsatisfiable"),
        ('{"patternProperties": {"(?=a)": {}}}', "look-around"),
    ],
)
def test_a_schema_that_cannot_constrain_is_refused_with_llguidances_reason(schema: str, reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        check_grammar(schema)


def test_checking_a_schema_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from pipeline.schema.grammar import check_grammar\n"
        "check_grammar('{}'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.skipif(not (SHARED / "corpora").is_dir(), reason="needs ../shared/corpora")
def test_of_real_schemas_none_lets_an_invalid_instance_pass_unsaid() -> None:
    passed = []
    for file in sorted((SHARED / "corpora" / "schemas" / "maskbench").glob("*.json"))[::12]:
        case = json.loads(file.read_text())
        if check_grammar(json.dumps(case["schema"])):
            continue
        grammar = compile_schema(json.dumps(case["schema"])).text
        for instance in case["tests"]:
            text = json.dumps(instance["data"], ensure_ascii=False, separators=(",", ":")).encode()
            matcher = LLMatcher(build_byte_tokenizer(), grammar, log_level=0, limits=GRAMMAR_LIMITS)
            if (matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()) != instance["valid"]:
                passed.append(file.name)
    assert passed == []
