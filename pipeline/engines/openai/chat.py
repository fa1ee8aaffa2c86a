"""Chat Completions format: builds a call's JSON body from a request, and a `Completion` from the events of the reply.

    Message("user", (page 1, page 2, "Return …"))
    -> {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}, …, {"type": "text", …}]}

    {"choices": [{"delta": {"content": "{\\"tot"}}]}, …, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"usage": {…}}
    -> Completion('{"total":…}', STOP, Usage(1310, 42))

Pages are sent as data URLs and never as addresses: a server that fetches addresses can be made to fetch any (CVE-2026-34753).
"""

from __future__ import annotations

import base64
import codecs
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.engines.completion import LOOP_CHARACTERS, LOOP_EVERY, LOOP_EVERY_CHARACTERS, find_loop, make_loop_error
from pipeline.engines.openai.images import ImageFormat, encode_page
from pipeline.errors import DocumentError
from pipeline.records import Completion, FinishReason, Message, Pixels, Request, Sampling, Token, Usage
from pipeline.schema.prompt import CONTROL_TOKEN

Structure = Literal["json_schema", "tool", "prompt"]
RECORD = "record"
"""The schema's name, where the API requires one."""
NO_WHITESPACE = {"x-guidance": {"whitespace_flexible": False}}
"""Forbids whitespace between JSON tokens. llguidance, vLLM's backend `guidance`, reads this key of the schema; others ignore it. With
whitespace allowed, a weak model can write newlines without end (vllm#38696)."""
FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "function_call": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}
MAX_TOKEN_CHARACTERS = 64
"""More than this for each token, or more than two events for each, means that the server ignores `max_tokens`."""


class RetryableError(Exception):
    """An answer did not come or is incomplete, and a retry may help. `wait_s` is the time that the server asked to wait."""

    def __init__(self, kind: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(kind, message, wait_s)
        self.kind, self.message, self.wait_s = kind, message, wait_s


@dataclass(frozen=True)
class ServerProfile:
    """What a server is and what it supports: decides how requests are written for it."""

    model: str
    structure: Structure = "prompt"
    vllm: bool = False
    """To vLLM every sampling value is sent: it replaces missing ones by the checkpoint's defaults, such as a repetition penalty of 1.05."""
    logprobs: bool = False
    image_format: ImageFormat = "png"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Overrides all other keys of the body; a null removes a key."""


def build_body(request: Request, profile: ServerProfile) -> bytes:
    """Return a request as JSON. Takes milliseconds for each page, so it must not run in an event loop."""
    conversation, mark = build_conversation(request, profile.structure), secrets.token_hex()
    body = {
        "model": profile.model,
        "messages": [build_turn(message, mark) for message in conversation],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": request.sampling.max_tokens,
        **build_sampling(request.sampling, profile.vllm),
        **(build_format(request.schema, profile) if request.schema else {}),
    }
    if profile.logprobs:
        body["logprobs"] = True
    body |= profile.extra
    text = json.dumps({name: value for name, value in body.items() if value is not None}, separators=(",", ":"))
    pages = [part for message in conversation for part in message.parts if not isinstance(part, str)]
    return insert_pages(text.encode().split(mark.encode()), pages, profile.image_format)


def insert_pages(pieces: list[bytes], pages: Sequence[Pixels], image_format: ImageFormat) -> bytes:
    """Return the pieces of a body with a page's data URL between each two of them: as part of the JSON it would be copied five times."""
    urls = (f"data:image/{image_format};base64,".encode() + base64.b64encode(encode_page(page, image_format)) for page in pages)
    between = [part for piece, url in zip(pieces[1:], urls, strict=True) for part in (url, piece)]
    return b"".join((pieces[0], *between))


def build_sampling(sampling: Sampling, everything: bool) -> dict[str, Any]:
    """Return the sampling keys. Defaults are left out unless `everything`, because some servers refuse keys that they do not know."""
    sent = {"temperature": sampling.temperature}
    optional = {"top_p": sampling.top_p, "top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty}
    default = Sampling()
    sent |= {name: value for name, value in optional.items() if everything or value != getattr(default, name)}
    return sent | ({"seed": sampling.seed} if sampling.temperature else {})


def build_format(schema: str, profile: ServerProfile) -> dict[str, Any]:
    """Return the keys that make a server follow a schema; none where only the prompt can ask for it."""
    parameters = json.loads(schema) | (NO_WHITESPACE if profile.vllm else {})
    if profile.structure == "json_schema":
        record = {"name": RECORD, "strict": True, "schema": parameters}
        return {"response_format": {"type": "json_schema", "json_schema": record}}
    if profile.structure == "tool":
        function = {"name": RECORD, "description": "Keeps what the document says.", "parameters": parameters}
        choice = {"type": "function", "function": {"name": RECORD}}
        return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
    return {}


def build_conversation(request: Request, structure: Structure) -> Sequence[Message]:
    """Return the conversation, with the schema in its system message where the body has no key for it."""
    if structure != "prompt" or not request.schema:
        return request.messages
    instruction = f"Answer with the JSON object alone, without a code fence. It must satisfy this JSON Schema:\n{request.schema}"
    first, *others = request.messages
    if first.role != "system":
        return (Message("system", (instruction,)), *request.messages)
    return (Message("system", (*first.parts, instruction)), *others)


def build_turn(message: Message, mark: str) -> dict[str, Any]:
    """Return a message as JSON, with `mark` in place of each image; one without images as plain text, which some servers want.

    Control tokens that a page or an answer spells are replaced by a space: the server would take them for real ones.
    """
    parts = [CONTROL_TOKEN.sub(" ", part) if isinstance(part, str) else part for part in message.parts]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        return {"role": message.role, "content": "\n".join(texts)}
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": mark}} for part in parts
    ]
    return {"role": message.role, "content": content}


class ChatAnswer:
    """An answer, assembled from the events of its stream; a server that does not stream sends one event."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.content, self.arguments, self.refusal = list[str](), list[str](), list[str]()
        self.tokens: list[Token] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._events, self._written, self._searched = 0, 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_too_long(self) -> bool:
        """Whether more events or characters have come than `max_tokens` tokens can have."""
        return self._events > 2 * self.max_tokens + 16 or self._written > MAX_TOKEN_CHARACTERS * (self.max_tokens + 16)

    def add_event(self, event: Any) -> None:
        """Add an event. Raises RetryableError for an error or an invalid event, DocumentError for an answer that loops."""
        try:
            if error := event.get("error"):
                raise RetryableError("server", f"the server broke off: {extract_error_message(error)}")
            self._set_usage(event.get("usage"))
            for choice in event.get("choices") or ():
                self._add_choice(choice)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RetryableError(
                "garbled", f"the server sent what is no Chat Completions event ({type(error).__name__}: {error})"
            ) from None
        self._check_loop()

    def build_completion(self) -> Completion:
        """Return the answer. Raises RetryableError for an incomplete one, DocumentError `refused` when the model declined."""
        if self.refusal or self.finish_reason == "content_filter":
            refusal = "".join(self.refusal) or "its content filter"
            raise DocumentError("refused", f"the model declines to answer: {refusal[:200]}")
        reason = "length" if self.is_too_long else self.finish_reason
        if reason is None:
            raise RetryableError("connection", "the answer ended before it was finished")
        if reason not in FINISH_REASONS:
            raise RetryableError("garbled", f"the answer ended with the finish_reason {reason[:40]!r}")
        text = self._join_text()
        usage = self.usage or Usage(0, len(self.tokens) or self._events)
        return Completion(text, FINISH_REASONS[reason], usage, select_spelling_tokens(text, self.tokens))

    def _join_text(self) -> str:
        return "".join(self.arguments or self.content)

    def _check_loop(self) -> None:
        """Raise DocumentError for an answer that repeats itself: in its tokens where the server reports them, else in its characters."""
        written, every = (len(self.tokens), LOOP_EVERY) if self.tokens else (self._written, LOOP_EVERY_CHARACTERS)
        if self.finish_reason is not None or written < self._searched + every:
            return
        self._searched = written
        if self.tokens and (repeated := find_loop([token.text for token in self.tokens])):
            raise make_loop_error("".join(repeated), len(repeated), written)
        if not self.tokens and (pattern := find_loop(self._join_text(), LOOP_CHARACTERS, LOOP_CHARACTERS)):
            raise make_loop_error(pattern, len(pattern), written, "characters")

    def _set_usage(self, usage: Any) -> None:
        """Set the token counts; later ones replace earlier ones."""
        if usage:
            self.usage = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))

    def _add_choice(self, choice: Any) -> None:
        """Add the text, log-probabilities and finish reason of one choice."""
        delta = choice.get("delta") or choice.get("message") or {}
        calls = [call["function"].get("arguments") or "" for call in delta.get("tool_calls") or ()]
        arguments = [call if isinstance(call, str) else json.dumps(call) for call in calls]
        for pieces, received in ([delta.get("content")], self.content), (arguments, self.arguments), ([delta.get("refusal")], self.refusal):
            for piece in filter(None, pieces):
                received.append(piece)
                self._written += len(piece)
                self._events += 1
        for token in (choice.get("logprobs") or {}).get("content") or ():
            utf8 = token.get("bytes")
            text = token["token"] if utf8 is None else self._decoder.decode(bytes(utf8))
            self.tokens.append(Token(text, float(token["logprob"])))
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


def select_spelling_tokens(text: str, tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Return the tokens that spell the text, without the end token; none at all if they spell another text."""
    at = 0
    for count, token in enumerate(tokens):
        if at == len(text):
            return tuple(tokens[:count])
        if not text.startswith(token.text, at):
            return ()
        at += len(token.text)
    return tuple(tokens) if at == len(text) else ()


def extract_error_message(error: Any) -> str:
    """Return the message, at most 200 characters, of an error in any of the shapes that servers use."""
    for name in ("error", "message", "detail", "msg"):
        if isinstance(error, dict) and error.get(name):
            return extract_error_message(error[name])
    if isinstance(error, list) and error:
        return extract_error_message(error[0])
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
