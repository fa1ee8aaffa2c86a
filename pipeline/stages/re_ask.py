"""Asking again where a rule is broken: a request for the fields of the rule alone, and which of the two answers a record takes.

    {"number": "A-7", "net": 100.0, "tax": 19.0, "total": 1119.0}       total_adds_up: broken
      -> the pages, the part of a page where net, tax and total stand, the rule's message; a schema of these three
      -> {"net": 100.0, "tax": 19.0, "total": 119.0}                    total_adds_up: passed
      -> {"number": "A-7", "net": 100.0, "tax": 19.0, "total": 119.0}

The second answer is a request of its own in the ledger. Asking and settling decide by the same functions whether a record takes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import schema
from pipeline.evidence.match import match_values
from pipeline.evidence.page_index import Box
from pipeline.evidence.text_layer import PageWords
from pipeline.job import Job
from pipeline.records import LedgerRow, PageRow, Pixels, Status
from pipeline.render.crop import crop_page
from pipeline.schema import Schema, walk_in_place
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.request_schema import build_request_schema
from pipeline.schema.rules import CompiledRule, RuleResult, RuleSet
from pipeline.schema.validate import Validator

FieldPath = tuple[str, ...]
MARGIN = 0.06
"""Around the part of a page, of its longer side: the lines above and below, and more than a page is stretched to fill its canvas."""
KEPT_AT_ROOT = ("$schema", "$defs", "definitions", "title", "description")


@dataclass(frozen=True)
class RecordJudge:
    """Says of records which rules they break, and whether one takes the second answer for a rule's fields."""

    columns: ArrowPlan
    validator: Validator
    rules: RuleSet

    def judge(self, value: Any) -> dict[str, str]:
        """Return the result of each rule."""
        return {found["name"]: found["result"] for found in self.rules.judge_record(self.columns.build_row(value)[0])}

    def breaks(self, value: Any, rule: CompiledRule) -> bool:
        """Say whether a record breaks a rule."""
        return self.judge(value)[rule.rule.name] == RuleResult.BROKEN

    def take_fields(self, value: Any, second: LedgerRow, rule: CompiledRule) -> Any | None:
        """Return a record with the fields of a second answer; None where it stays as it is.

        It takes them if the record then satisfies the schema and this rule, and breaks no other rule that it did not break before.
        """
        if second["status"] != Status.EXTRACTED:
            return None
        try:
            return self.try_fields(value, second, rule)
        except Exception:  # any: what an answer makes the validator or a column raise has no common class; the first answer stays
            return None

    def try_fields(self, value: Any, second: LedgerRow, rule: CompiledRule) -> Any | None:
        """Do as `take_fields`; raises what a second answer makes the validator or a column raise."""
        taken = replace_fields(value, schema.parse_json(second["answer"] or ""), rule.paths)
        if self.columns.build_row(taken)[1] or any(self.validator.find_violations(taken)):
            return None
        before, after = self.judge(value), self.judge(taken)
        wrong = (RuleResult.BROKEN, RuleResult.ERROR)
        is_worse = any(result in wrong and before[name] not in wrong for name, result in after.items())
        return None if is_worse or after[rule.rule.name] != RuleResult.PASSED else taken


@dataclass(frozen=True)
class RuleQuestion:
    """What is asked again where a rule is broken."""

    rule: CompiledRule
    schema_text: str
    """By which an engine decodes the answer."""
    validator: Validator
    columns: ArrowPlan

    def list_errors(self, answer: str) -> list[str]:
        """Return why an answer has not the fields that it should have; nothing if it has."""
        try:
            value = schema.parse_json(answer)
        except ValueError as error:
            return [str(error)]
        return [*map(str, self.validator.find_violations(value))] or self.columns.build_row(value)[1]


def make_rule_questions(job: Job, judge: RecordJudge) -> list[RuleQuestion]:
    """Return the questions of a job's rules with `re_ask: true`, in the order of the rules."""
    questions = []
    for rule in judge.rules.programs:
        if rule.rule.asks_again:
            part = select_fields(job.schema, rule.paths)
            text = build_request_schema(part, absent=job.sections.extract.absent == "allow")
            questions.append(RuleQuestion(rule, text, Validator(schema.parse_json(text)), ArrowPlan(part)))
    return questions


def select_fields(given: Schema, paths: Collection[FieldPath]) -> Schema:
    """Return the schema of an object with these fields alone; an array that one of them is in is kept whole.

    Where what is left refers to something that is not, all of the schema is.
    """
    part = {key: given[key] for key in KEPT_AT_ROOT if key in given} | select_properties(given, given, paths)
    try:
        return schema.check_schema(part)
    except ValueError:
        return given


def select_properties(part: Schema, root: Schema, paths: Collection[FieldPath]) -> Schema:
    """Return an object's schema with these fields alone."""
    shapes = list(walk_in_place(part, root))
    declared = {name: inner for shape in shapes for name, inner in shape.get("properties", {}).items()}
    required = {name for shape in shapes for name in shape.get("required", ())}
    properties = {}
    for name, inside in group_paths(paths):
        inner = declared[name]
        is_plain = isinstance(inner, dict) and "properties" in inner and len(list(walk_in_place(inner, root))) == 1
        kept = {key: inner[key] for key in ("title", "description", "type") if key in inner} if is_plain else {}
        properties[name] = kept | select_properties(inner, root, inside) if is_plain and () not in inside else inner
    names = [name for name in properties if name in required]
    return {"type": part.get("type", "object"), "additionalProperties": False, "required": names, "properties": properties}


def replace_fields(value: Any, second: Any, paths: Collection[FieldPath]) -> Any:
    """Return a record in which the fields at these paths are those of a second answer; a list is replaced as a whole."""
    if () in paths or not isinstance(value, dict) or not isinstance(second, dict):
        return second
    return {
        **value,
        **{name: replace_fields(value.get(name), second[name], inside) for name, inside in group_paths(paths) if name in second},
    }


def pick_fields(value: Any, paths: Collection[FieldPath]) -> Any:
    """Return what a record has at these paths; a list as a whole."""
    if () in paths or not isinstance(value, dict):
        return value
    return {name: pick_fields(value[name], inside) for name, inside in group_paths(paths) if name in value}


def find_fields(value: Any, paths: Collection[FieldPath], in_lists: bool, path: str = "$") -> Iterator[str]:
    """Yield where a record has these fields, `$.line_items[2].amount`; without `in_lists` a list that they are in, `$.line_items`."""
    if () in paths or not isinstance(value, dict | list if in_lists else dict):
        yield path
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_fields(item, paths, in_lists, schema.join_path(path, index))
    else:
        for name, inside in group_paths(paths):
            if name in value:
                yield from find_fields(value[name], inside, in_lists, schema.join_path(path, name))


def is_inside(path: str, places: Collection[str]) -> bool:
    """Say whether a value is at one of these places or inside of one."""
    return path in places or path.startswith(tuple(f"{place}{mark}" for place in places for mark in ".["))


def group_paths(paths: Iterable[FieldPath]) -> Iterator[tuple[str, list[FieldPath]]]:
    """Yield the first name of paths, each with what follows it."""
    groups: dict[str, list[FieldPath]] = {}
    for path in paths:
        groups.setdefault(path[0], []).append(path[1:])
    yield from groups.items()


@dataclass(frozen=True, eq=False)
class Crop:
    """The enlarged part of a page."""

    name: str
    """Tells it from other parts of the document."""
    pixels: Pixels


def crop_evidence(
    job: Job, value: Any, rule: CompiledRule, words: Sequence[PageWords], pages: Sequence[PageRow], pixels: Sequence[Pixels]
) -> Crop | None:
    """Return the part of a page where a rule's values are printed; of several pages the one with most of them.

    None where no witness shows any, or the part is nearly the page.
    """
    places = {*find_fields(value, rule.paths, in_lists=True)}
    boxes: dict[int, list[Box]] = {}
    for found in match_values(job.schema, value, words) if words else []:
        if found.box and found.page and is_inside(found.path, places):
            boxes.setdefault(found.page, []).append(found.box)
    if not boxes:
        return None
    page_no = max(boxes, key=lambda page: len(boxes[page]))
    number = next(index for index, page in enumerate(pages) if page["page_no"] == page_no)
    x0, y0, x1, y1 = zip(*boxes[page_no], strict=True)
    scale = pages[number]["dpi"] / 72
    box_px = (min(x0) * scale, min(y0) * scale, max(x1) * scale, max(y1) * scale)
    margin = MARGIN * max(pixels[number].shape)
    crop = crop_page(pixels[number], box_px, (margin, margin), job.budget)
    return None if crop is None else Crop(f"{page_no}/{'-'.join(f'{edge:.0f}' for edge in box_px)}", crop)
