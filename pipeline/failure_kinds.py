"""Kinds of failure: `stage/kind` as records and reports count them in, what it means and what to do out.

`docs/failures.md` and `report.html` show these texts. `tests/unit/test_failure_kinds.py` compares them with the kinds that the code raises.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.records import Stage


@dataclass(frozen=True)
class FailureKind:
    """A kind of failure in plain words."""

    cause: str
    remedy: str
    """What to do; `--retry failed:KIND` asks again what failed so."""


RETRY = "then run again with `--retry failed:{kind}`"
"""How remedies end that change no answer: what failed is asked again by the same job."""
OTHER_OUTPUT = "and choose another output: this changes the answers of all documents"
INTERNAL = FailureKind("A defect of this package; the log has its traceback.", f"Report it, with the document if you may; {RETRY}.")
KINDS: dict[Stage, dict[str, FailureKind]] = {
    Stage.SOURCE: {
        "changed": FailureKind("The file was written to between listing and reading.", "Run again when nothing writes there any more."),
        "internal": INTERNAL,
        "outside": FailureKind(
            "A link leads out of the folder that the job names.", "Set `source.allow_outside: true` if that is intended."
        ),
        "refused": FailureKind(
            "A URL that must not be fetched: a private address, credentials in it, a redirect too many, an untrusted certificate.",
            "Correct the URL; `source.allow_private` lets private addresses in.",
        ),
        "timeout": FailureKind("The server of a URL did not answer in time.", f"Try the URL in a browser, {RETRY}."),
        "too_large": FailureKind("The file is larger than `limits.max_file_mib`.", f"Raise that limit, or leave the file out; {RETRY}."),
        "unreadable": FailureKind(
            "No permission, no regular file, or a server that answers with an error.", f"Correct permissions or server, {RETRY}."
        ),
        "vanished": FailureKind(
            "The file was listed, or named by a manifest, and is not there.", "Put it back or take it off the list, and run again."
        ),
    },
    Stage.RENDER: {
        "broken": FailureKind(
            "The file or the page is damaged: none of the renderers can draw it.",
            f"Open it in a viewer. If it opens there, save it anew from there; {RETRY}.",
        ),
        "crash": FailureKind(
            "The renderer's process died at this document.",
            "Save the document anew with another program, and run again: changed bytes are a new document.",
        ),
        "empty": FailureKind("The file has 0 bytes.", "Get it again from where it came from."),
        "encrypted": FailureKind("The PDF needs a password.", f"Name the variable that has it in `source.password_env`, {RETRY}."),
        "internal": INTERNAL,
        "memory": FailureKind("The renderer ran out of memory at this document.", f"Raise `limits.memory_mib`, {RETRY}."),
        "no_pages": FailureKind("The PDF opens and has no pages.", "Get it again from where it came from."),
        "timeout": FailureKind("A page took longer than `limits.timeout_s`.", f"Raise that limit, {RETRY}."),
        "too_large": FailureKind("The image has more pixels than `limits.max_image_megapixels` allows.", f"Raise that limit, {RETRY}."),
        "too_many_pages": FailureKind(
            "The document has more pages than `limits.max_pages`.", f"Raise that limit, or split the document; {RETRY}."
        ),
        "unrecognised": FailureKind(
            "The content is neither a PDF nor an image that can be read, whatever the name says.",
            "Unpack archives, convert office documents to PDF, leave other files out (a glob such as `in/**/*.pdf`).",
        ),
        "unsupported": FailureKind("A format that needs another package (HEIC, unusual TIFFs).", f"Install the extra `formats`, {RETRY}."),
    },
    Stage.GENERATE: {
        "busy": FailureKind("The server said that it has too much to do (429), each time.", f"Lower `model.concurrency`, {RETRY}."),
        "connection": FailureKind("The connection to the server broke, each time.", f"Look at the server and the network, {RETRY}."),
        "demo": FailureKind(
            "The demonstration model was not asked: it reads the samples of this package and nothing else.",
            f"Use a GPU, a server (`model.engine: openai`), or `model.without_gpu: cpu`, {OTHER_OUTPUT}.",
        ),
        "engine": FailureKind(
            "The engine failed on this request alone.",
            f"The message has its words; {RETRY}. Where numbers are not finite, another `model.dtype` helps, with another output.",
        ),
        "engine_died": FailureKind(
            "The engine died whenever it had this request; the others were asked without it.",
            f"{RETRY[0].upper()}{RETRY[1:]}. If memory ran out, lower `pages.max_pixels` or `pages.per_request`, {OTHER_OUTPUT}.",
        ),
        "garbled": FailureKind(
            "The server sent what is no answer of a Chat Completions server.",
            f"Check `model.base_url` (`pipeline check JOB` asks it), {RETRY}.",
        ),
        "grammar": FailureKind(
            "Decoding left the schema's grammar, or the grammar gave up.",
            f"Make the schema simpler (fewer patterns and alternatives), {OTHER_OUTPUT}.",
        ),
        "internal": INTERNAL,
        "length": FailureKind(
            "The answer was longer than `sampling.max_tokens`. It is never cut into a result.",
            f"Raise `sampling.max_tokens`, or lower `pages.per_request` for documents of many line items, {OTHER_OUTPUT}.",
        ),
        "loop": FailureKind(
            "The answer repeated itself and was stopped.",
            f"Raise `pages.max_pixels` if the print is small, or bound the answer in the schema (`maxItems`, `maxLength`), {OTHER_OUTPUT}.",
        ),
        "memory": FailureKind(
            "The GPU had no memory for this request.",
            f"Free the GPU of other programs, {RETRY}; or lower `pages.per_request` or `pages.max_pixels`, {OTHER_OUTPUT}.",
        ),
        "pixels": FailureKind(
            "An engine would resize the page: it is drawn for another checkpoint.",
            f"Set `model.cell_px` to what the server's checkpoint has (28, Qwen3-VL: 32), {OTHER_OUTPUT}.",
        ),
        "prompt": FailureKind("The checkpoint's chat template does not show the images.", "Use the checkpoint's own template."),
        "refused": FailureKind(
            "The server refuses the request, or the model declines to answer.",
            f"The message has its words; correct the section `model`, {RETRY}.",
        ),
        "schema": FailureKind(
            "The engine cannot decode by this schema.",
            f"`pipeline check JOB` names the keyword: leave it out of the schema, {OTHER_OUTPUT}.",
        ),
        "server": FailureKind("The server failed (5xx), each time.", f"Look at its log, {RETRY}."),
        "timeout": FailureKind(
            "Nothing came from the server for `model.idle_timeout_s`.", f"Raise it, or lower `model.concurrency`; {RETRY}."
        ),
        "too_long": FailureKind(
            "The pages and the prompt are more tokens than the model's context or `limits.max_request_tokens`.",
            f"Lower `pages.per_request` or `pages.max_pixels`, {OTHER_OUTPUT}.",
        ),
    },
    Stage.VALIDATE: {
        "disagreement": FailureKind(
            "Two parts of the document gave different values, and `limits.disagreements` is `invalid`.",
            "Look at `_disagreements` in `pipeline review`, or say in the schema which is right (`x-merge`).",
        ),
        "internal": INTERNAL,
        "invalid": FailureKind(
            "The answer breaks the schema, or lacks a required value.",
            "`_errors` says where. Correct it in `pipeline review`; if many do, allow null in the schema or describe the field better.",
        ),
    },
    Stage.SETTLE: {
        "pending": FailureKind("Not asked yet: the run broke off, or goes on.", "Run the same command again."),
    },
}
"""All kinds, by the stage in which they happen."""


def find_failure_kind(name: str) -> FailureKind | None:
    """Return what is known of `stage/kind`; None for a kind that this version does not have."""
    stage, _, kind = name.partition("/")
    found = KINDS.get(Stage(stage), {}).get(kind) if stage in set(Stage) else None
    return found and FailureKind(found.cause, found.remedy.format(kind=kind))
