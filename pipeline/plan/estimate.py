"""Estimate of a run: measured documents and a job in, requests, tokens, GPU time, money, disk and memory out.

Counted: documents, duplicates, pages, visual tokens, requests. Estimated, each with how: prompt tokens where the model's tokenizer is not
here, output tokens, time. The time of a page is the work that its tokens are for the model, over what a GPU does at its best, of which
engines reach a share (`SHARES`):

    2 · P · (visual + prompt + output) + V · visual + attention     FLOP, P the parameters of the language model's linear layers
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engines.model_files import find_model_folder
from pipeline.errors import JobError, PipelineError
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import read_shards
from pipeline.plan.answers import AnswerCount, LineFacts, count_answer_tokens
from pipeline.plan.survey import MIN_X_HEIGHT_PX, MeasuredDocument
from pipeline.schema import Schema
from pipeline.schema.prompt import build_messages
from pipeline.stages.requests import split_pages
from pipeline.stages.reread import MOST_REQUESTS
from pipeline.storage.location import parse_location
from pipeline.wording import format_count

FULL_SIZE = 0.97
"""Of `pages.dpi`: a page with less is one that the budget shrinks, and not one that the grid of cells rounds."""
GPUS = {"h200": 790.0, "h100": 791.0, "a100": 250.0, "a10g": 56.0, "l4": 97.0}
"""TFLOP/s of large bf16 matrix products: measured on an H200, else 0.8 of the dense peak."""
SHARES = (0.15, 0.30)
"""Of that, what engines reach with pages of documents: published runs of 7B models lie between 16 and 29 %."""
SIZES = {"3b": 2.8e9, "7b": 7.07e9, "32b": 31.5e9, "72b": 70.6e9}
"""Parameters of a Qwen2.5-VL's linear layers and its head; a token costs two FLOP for each."""
VISION_FLOP = 5.6e9
"""Of one visual token: 7.16 TFLOP for a page of 1,280 in all sizes of Qwen2.5-VL."""
ATTENTION_FLOP = 4 * 28 * 3584
"""Of each pair of tokens that attend to each other, in a 7B."""
CONTEXT_TOKENS = 32_768
CHARACTERS_PER_TOKEN = 4.0
"""Of a prompt, for Qwen's tokenizer."""
READ_ITEMS, GUESSED_ITEMS = (0.85, 1.0, 1.2), (0.5, 1.0, 2.0)
"""Bounds of the items of lists, of what is expected: where pages were read, and where none has a text layer."""
DRIVER_MIB, DRIVER_BYTES_PER_REQUEST, MAX_REQUESTS_HELD = 250, 6000, 100_000
LEDGER_BYTES = (1500, 4)
"""Of a request in the ledger, compressed: at least, and for each token of its answer."""


class Range(TypedDict):
    """An estimate between two bounds."""

    low: float
    likely: float
    high: float
    source: str
    """What it is estimated from."""


class RunPlan(TypedDict):
    """What `pipeline plan` shows."""

    job: str
    documents: int
    failures: dict[str, int]
    """Documents that cannot be opened, by `stage/kind`."""
    duplicates: list[str]
    """Files with the bytes of another one: asked once."""
    pages: int
    unmeasured_pages: int
    visual_tokens: int
    requests: int
    reread_requests: int
    """Most requests of `evidence.model` beside these, of which all other figures know nothing; 0 where it is off."""
    prompt_tokens: Range
    """Of all requests, without visual tokens."""
    output_tokens: Range
    beyond_context: list[str]
    """Documents with a request that may not fit the model's context."""
    context_tokens: int
    dpi: dict[str, float]
    """Least, median and largest effective resolution of the pages."""
    small_print: dict[str, Any]
    """Pages that were sampled for it, the share of those with print of less than 8 px, and the job's key that makes it larger."""
    gpu: str
    gpu_hours: Range
    cost: Range | None
    earlier_run: dict[str, Any] | None
    disk_mib: float
    driver_mib: float


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run of a like job took."""

    place: str
    requests: int
    output_tokens: float
    """Of a request, on average."""
    spread: float
    """How far that may be from the mean of other documents, as a share of it: two standard errors, a tenth at the least."""
    pages_per_s: float
    model: str
    ledger_bytes: float
    """Of a request."""


def estimate_run(
    job: Job, documents: Sequence[MeasuredDocument], gpu: str = "h100", price: float | None = None, like: str | None = None
) -> RunPlan:
    """Return the plan of a run over these documents. `price` is for an hour of a GPU. Raises JobError for an unusable `like`."""
    earlier = read_earlier_run(like or str(job.output), is_wanted=like is not None)
    first: dict[str, MeasuredDocument] = {}
    duplicates = [one.source for one in documents if one.doc_id and first.setdefault(one.doc_id, one) is not one]
    asked = [one for one in first.values() if one.pages]
    pages = [page for one in asked for page in one.pages if page]
    requests = [one.pages[start - 1 : end] for one in asked for start, end in split_pages(len(one.pages), job.pages_per_request)]
    visual = sum(page.visual_tokens for page in pages)
    text_tokens, how = count_prompt_tokens(job)
    context = job.sections.model.max_model_len or CONTEXT_TOKENS
    beyond = [one.source for one in asked if exceeds_context(one, job, text_tokens, context)]
    count = AnswerCount(len(asked), len(requests) - len(asked), len(pages))
    if job.sections.extract.per == "page":
        count = AnswerCount(len(requests), 0, len(pages))
    output = estimate_output(job.schema, count, [page for one in asked for page in one.lines], earlier)
    prompt = scale_range((1.0, 1.0, 1.0) if how == TOKENIZER else (0.9, 1.0, 1.1), text_tokens * len(requests), how)
    ends = zip(list_values(prompt), list_values(output), (SHARES[1], math.sqrt(SHARES[0] * SHARES[1]), SHARES[0]), strict=True)
    seconds = [sum_seconds(job, visual, read, written, len(requests), GPUS[gpu] * share) for read, written, share in ends]
    hours = make_range([second / 3600 for second in seconds], f"roofline of one {gpu}, at {SHARES[0]:.0%} to {SHARES[1]:.0%} of its bound")
    dpis = sorted(page.dpi for page in pages)
    small_print = describe_small_print(documents, job.sections.pages.dpi)
    held = min(len(requests), MAX_REQUESTS_HELD)
    ledger = earlier.ledger_bytes if earlier else LEDGER_BYTES[0] + LEDGER_BYTES[1] * output["likely"] / max(1, len(requests))
    return {
        "job": job.sections.name,
        "documents": len(documents),
        "failures": dict(Counter(one.failure for one in documents if one.failure)),
        "duplicates": duplicates,
        "pages": sum(len(one.pages) for one in asked),
        "unmeasured_pages": sum(page is None for one in asked for page in one.pages),
        "visual_tokens": visual,
        "requests": len(requests),
        "reread_requests": MOST_REQUESTS * len(requests) if job.sections.evidence.model == "on" else 0,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "beyond_context": beyond,
        "context_tokens": context,
        "dpi": {"least": dpis[0], "median": dpis[len(dpis) // 2], "largest": dpis[-1]} if dpis else {},
        "small_print": small_print,
        "gpu": gpu,
        "gpu_hours": hours,
        "cost": None if price is None else make_range([hour * price for hour in list_values(hours)], f"{price:g} an hour"),
        "earlier_run": describe_earlier_run(earlier, sum(len(one.pages) for one in asked)),
        "disk_mib": round(ledger * len(requests) / 2**20, 1),
        "driver_mib": round(DRIVER_MIB + DRIVER_BYTES_PER_REQUEST * held / 2**20),
    }


TOKENIZER, CHARACTERS = "the model's tokenizer", "the number of characters: the model's tokenizer is not on this machine"


def make_range(values: Sequence[float], source: str) -> Range:
    low, likely, high = values
    return {"low": low, "likely": likely, "high": high, "source": source}


def list_values(found: Range) -> list[float]:
    """Return the low, likely and high value of an estimate."""
    return [found["low"], found["likely"], found["high"]]


def scale_range(factors: Sequence[float], value: float, source: str) -> Range:
    return make_range([round(value * factor) for factor in factors], source)


def sum_seconds(job: Job, visual: float, prompt: float, output: float, requests: int, tflops: float) -> float:
    """Return the seconds that one GPU needs for all tokens of a run at so many TFLOP/s."""
    tokens = visual + prompt + output
    linear = 2 * find_parameters(job.sections.model.name) * tokens + VISION_FLOP * visual
    attention = ATTENTION_FLOP * tokens * tokens / max(1, requests) / 2
    return (linear + attention) / (tflops * 1e12)


def find_parameters(model: str) -> float:
    """Return a model's parameters by the size in its name; those of a 7B without one."""
    return next((count for size, count in SIZES.items() if f"-{size}" in model.lower()), SIZES["7b"])


def exceeds_context(document: MeasuredDocument, job: Job, text_tokens: float, context: int) -> bool:
    """Say whether a request of a document may need more tokens than the model's context has."""
    longest = max(
        sum(page.visual_tokens for page in document.pages[start - 1 : end] if page)
        for start, end in split_pages(len(document.pages), job.pages_per_request)
    )
    return longest + text_tokens + job.sections.sampling.max_tokens > context


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def count_prompt_tokens(job: Job) -> tuple[float, str]:
    """Return the tokens of a request's texts, and by what they are counted: its model's tokenizer where that is on this machine."""
    folder = find_model_folder(job)
    if job.sections.model.engine != "openai" and (folder / "config.json").is_file():
        with suppress(PipelineError):
            return count_encoded_tokens(job, folder), TOKENIZER
    messages = build_messages(job.system_message, [])
    text = "".join(part for message in messages for part in message.parts if isinstance(part, str))
    return round(len(text) / CHARACTERS_PER_TOKEN) + 20, CHARACTERS


def count_encoded_tokens(job: Job, folder: Path) -> int:
    """Return the tokens of a request about one page, its page image left out. Raises JobError for a checkpoint that cannot be read."""
    import numpy as np

    from pipeline.engines.checkpoint import load_config, load_processor
    from pipeline.engines.encoding import Encoder

    config = load_config(folder, None)
    encoder = Encoder(load_processor(folder), config.image_token_id, cast(Any, "cpu"))
    side = job.budget.cell_px
    encoded = encoder.encode(build_messages(job.system_message, [np.zeros((side, side, 3), np.uint8)]))
    return len(encoded.ids) - 1


def estimate_output(schema: Schema, asked: AnswerCount, lines: Sequence[tuple[LineFacts, ...]], earlier: EarlierRun | None) -> Range:
    """Return the tokens of all answers: as many as in the earlier run, or as the schema and the pages let expect."""
    requests = asked.first + asked.later
    if earlier:
        factors = (1 - earlier.spread, 1.0, 1 + earlier.spread)
        return scale_range(factors, earlier.output_tokens * requests, f"{format_count(earlier.requests, 'request')} of the earlier run")
    known = sum(map(bool, lines))
    factors, source = (
        (READ_ITEMS, f"the schema, and the lines of {format_count(known, 'page')}") if known else (GUESSED_ITEMS, "the schema")
    )
    values = [count_answer_tokens(schema, asked, lines, factor) for factor in factors]
    spread = zip(values, (0.85, 1.0, 1.2), strict=True)
    return make_range([round(value * share) for value, share in spread], f"{source}; an earlier run says it better (--like OUTPUT)")


def describe_small_print(documents: Sequence[MeasuredDocument], dpi: float) -> dict[str, Any]:
    """Return how many sampled pages have small print, and the key that makes it larger: the budget where that shrinks the pages."""
    sampled = [one for one in documents if one.smallest_px is not None]
    small = [one for one in sampled if cast(float, one.smallest_px) < MIN_X_HEIGHT_PX]
    shrunk = sum(1 for one in small if one.pages[0] and one.pages[0].dpi < dpi * FULL_SIZE)
    key = "pages.max_pixels" if 2 * shrunk >= len(small) else "pages.dpi"
    return {"sampled": len(sampled), "share": len(small) / len(sampled) if sampled else 0.0, "key": key}


# ---- An earlier run -------------------------------------------------------------------------------------------------


def read_earlier_run(place: str, is_wanted: bool) -> EarlierRun | None:
    """Return what an output's run took; None where nothing was asked and none `is_wanted`. Raises JobError."""
    output = Output(parse_location(place))
    names = ["status", "asks", "completion_tokens", "model", "rule"]
    ledger = read_shards(output.requests, names, LEDGER_SCHEMA)
    answered = ledger.filter(pc.greater(pc.fill_null(ledger["asks"], 0), 0))
    if not answered.num_rows:
        if is_wanted:
            raise JobError(f"{place} has no answers: --like names the output of an earlier run", place, "--like")
        return None
    asked = (report := output.read_report()).get("last_asked") or report
    sizes = sum(output.requests.list_names(".parquet").values())
    pages_per_s = float(asked.get("pages_per_s") or 0) if asked.get("pages_asked") else 0.0
    requests = max(1, answered["rule"].null_count)  # what rules asked again is counted with the request that broke them
    tokens = (pc.sum(answered["completion_tokens"]).as_py() or 0) / requests
    deviation = pc.stddev(answered["completion_tokens"], ddof=1).as_py()  # None of one answer
    spread = min(1.0, max(0.1, 2 * (tokens / 2 if deviation is None else deviation) / math.sqrt(requests) / max(1.0, tokens)))
    models = pa.array(answered["model"].to_pylist()).drop_null()
    return EarlierRun(place, requests, tokens, spread, pages_per_s, str(models[0]) if len(models) else "?", sizes / requests)


def describe_earlier_run(earlier: EarlierRun | None, pages: int) -> dict[str, Any] | None:
    """Return what the earlier run says of this one."""
    if earlier is None:
        return None
    hours = round(pages / earlier.pages_per_s / 3600, 3) if earlier.pages_per_s else None
    about = {"output": earlier.place, "model": earlier.model, "requests": earlier.requests}
    return {**about, "output_tokens_per_request": round(earlier.output_tokens, 1), "pages_per_s": earlier.pages_per_s, "hours": hours}
