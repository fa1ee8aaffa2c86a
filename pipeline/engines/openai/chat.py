"""A request -> the body of a Chat Completions call, and the events that come back -> a `Completion`. Knows no network.

    Message("user", (page 1, page 2, "Return …"))
    -> {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}, …, {"type": "text", …}]}

    {"choices": [{"delta": {"content": "{\\"tot"}}]}, …, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"usage": {…}}
    -> Completion('{"total":…}', STOP, Usage(1310, 42))

Pages travel as data URLs, never as a document's address: a server that fetches addresses can be sent anywhere (CVE-2026-34753).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.engines.completion import LOOP_CHARACTERS, LOOP_EVERY, LOOP_EVERY_CHARACTERS, find_loop, make_loop_error
from pipeline.engines.openai.images import ImageFormat, build_data_url
from pipeline.errors import DocumentError
from pipeline.records import Completion, FinishReason, Message, Request, Sampling, Token, Usage
from pipeline.schema.prompt import CONTROL_TOKEN

Structure = Literal["json_schema", "tool", "prompt"]
RECORD = "record"
"""What the schema is called where it must have a name."""
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""No spaces between tokens: llguidance, which vLLM decodes by for `guidance`, reads it in the schema; others pass it over. With spaces
allowed a weak model writes newlines without end (vllm#38696)."""
FINISHED = {"stop": FinishReason.STOP, "tool_calls": FinishReason.STOP, "function_call": FinishReason.STOP, "length": FinishReason.LENGTH}
MAX_TOKEN_CHARACTERS = 64
"""More than this per token, or more than two events per token, and the server does not keep to `max_tokens`."""


class RetryableError(Exception):
    """An answer did not come, or not whole; asking again may help. `wait_s` is how long the server said to wait."""

    def __init__(self, kind: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(kind, message, wait_s)
        self.kind, self.message, self.wait_s = kind, message, wait_s


@dataclass(frozen=True)
class ServerProfile:
    """How one server is spoken to."""

    model: str
    structure: Structure = "prompt"
    vllm: bool = False
    """vLLM is told everything: what is left out it takes from the checkpoint's own defaults, a repetition penalty of 1.05 among them."""
    logprobs: bool = False
    image_format: ImageFormat = "png"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Goes over everything else; a null takes a key away."""


def build_body(request: Request, dialect: ServerProfile) -> bytes:
    """Return a request as JSON. Milliseconds for each page: not for an event loop."""
    asked = {
        "model": dialect.model,
        "messages": [build_turn(message, dialect.image_format) for message in build_conversation(request, dialect.structure)],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": request.sampling.max_tokens,
        **build_sampling(request.sampling, dialect.vllm),
        **(build_format(request.schema, dialect) if request.schema else {}),
    }
    if dialect.logprobs:
        asked["logprobs"] = True
    asked |= dialect.extra
    return json.dumps({name: value for name, value in asked.items() if value is not None}, separators=(",", ":")).encode()


def build_sampling(sampling: Sampling, everything: bool) -> dict[str, Any]:
    """Return how tokens are chosen; what changes nothing is left out, for servers that refuse keys they do not know."""
    given = {"temperature": sampling.temperature}
    chosen = {"top_p": sampling.top_p, "top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty}
    default = Sampling()
    given |= {name: value for name, value in chosen.items() if everything or value != getattr(default, name)}
    return given | ({"seed": sampling.seed} if sampling.temperature else {})


def build_format(schema: str, dialect: ServerProfile) -> dict[str, Any]:
    """Return what makes a server keep to a schema; nothing where only the prompt can ask for it."""
    kept = json.loads(schema) | (COMPACT if dialect.vllm else {})
    if dialect.structure == "json_schema":
        record = {"name": RECORD, "strict": True, "schema": kept}
        return {"response_format": {"type": "json_schema", "json_schema": record}}
    if dialect.structure == "tool":
        function = {"name": RECORD, "description": "Keeps what the document says.", "parameters": kept}
        choice = {"type": "function", "function": {"name": RECORD}}
        return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
    return {}


def build_conversation(request: Request, structure: Structure) -> Sequence[Message]:
    """Return the conversation, with the schema itself in its system message where nothing else carries it."""
    if structure != "prompt" or not request.schema:
        return request.messages
    words = f"Answer with the JSON object alone, without a code fence. It must satisfy this JSON Schema:\n{request.schema}"
    first, *others = request.messages
    if first.role != "system":
        return (Message("system", (words,)), *request.messages)
    return (Message("system", (*first.parts, words)), *others)


def build_turn(message: Message, image_format: ImageFormat) -> dict[str, Any]:
    """Return a message; one without images as plain text, which some servers' templates insist on.

    What a page or an answer says must not become a control token on the server, which knows no difference.
    """
    parts = [CONTROL_TOKEN.sub(" ", part) if isinstance(part, str) else part for part in message.parts]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        return {"role": message.role, "content": "\n".join(texts)}
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": build_data_url(part, image_format)}}
        for part in parts
    ]
    return {"role": message.role, "content": content}


class ChatAnswer:
    """An answer as its events come in; of a server that does not stream, one event."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.content, self.arguments, self.refusal = list[str](), list[str](), list[str]()
        self.tokens: list[Token] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._events, self._written, self._looked = 0, 0, 0
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def runs_away(self) -> bool:
        """Whether more has come than `max_tokens` allows, by any measure of a token."""
        return self._events > 2 * self.max_tokens + 16 or self._written > MAX_TOKEN_CHARACTERS * (self.max_tokens + 16)

    def add(self, event: Any) -> None:
        """Take an event in. Raises Broken for one that says or is an error, DocumentError when the answer will not end by itself."""
        try:
            if error := event.get("error"):
                raise RetryableError("server", f"the server broke off: {extract_error_message(error)}")
            self._count(event.get("usage"))
            for choice in event.get("choices") or ():
                self._choose(choice)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RetryableError(
                "garbled", f"the server sent what is no Chat Completions event ({type(error).__name__}: {error})"
            ) from None
        self._stop_loop()

    def completion(self) -> Completion:
        """Return the whole answer. Raises Broken when it is not whole, DocumentError when the server declines to give one."""
        if self.refusal or self.finish_reason == "content_filter":
            said = "".join(self.refusal) or "its content filter"
            raise DocumentError("refused", f"the model declines to answer: {said[:200]}")
        reason = "length" if self.runs_away else self.finish_reason
        if reason is None:
            raise RetryableError("connection", "the answer ended before it was finished")
        if reason not in FINISHED:
            raise RetryableError("garbled", f"the answer ended with the finish_reason {reason[:40]!r}")
        text = self._text()
        return Completion(
            text, FINISHED[reason], self.usage or Usage(0, len(self.tokens) or self._events), select_spelling_tokens(text, self.tokens)
        )

    def _text(self) -> str:
        return "".join(self.arguments or self.content)

    def _stop_loop(self) -> None:
        """Raise DocumentError for an answer that repeats itself: by its tokens where the server tells them, else by its characters."""
        written, every = (len(self.tokens), LOOP_EVERY) if self.tokens else (self._written, LOOP_EVERY_CHARACTERS)
        if self.finish_reason is not None or written < self._looked + every:
            return
        self._looked = written
        if self.tokens and (repeated := find_loop([token.text for token in self.tokens])):
            raise make_loop_error("".join(repeated), len(repeated), written)
        if not self.tokens and (pattern := find_loop(self._text(), LOOP_CHARACTERS, LOOP_CHARACTERS)):
            raise make_loop_error(pattern, len(pattern), written, "characters")

    def _count(self, usage: Any) -> None:
        """Keep the token counts; the last ones count."""
        if usage:
            self.usage = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))

    def _choose(self, choice: Any) -> None:
        """Take in what one event adds to the answer."""
        delta = choice.get("delta") or choice.get("message") or {}
        calls = [call["function"].get("arguments") or "" for call in delta.get("tool_calls") or ()]
        arguments = [call if isinstance(call, str) else json.dumps(call) for call in calls]
        for pieces, kept in ([delta.get("content")], self.content), (arguments, self.arguments), ([delta.get("refusal")], self.refusal):
            for piece in filter(None, pieces):
                kept.append(piece)
                self._written += len(piece)
                self._events += 1
        for token in (choice.get("logprobs") or {}).get("content") or ():
            known = token.get("bytes")
            text = token["token"] if known is None else self._characters.decode(bytes(known))
            self.tokens.append(Token(text, float(token["logprob"])))
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


def select_spelling_tokens(text: str, tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Return the tokens that spell the text: not the one that ended it, and none at all if they spell something else."""
    at = 0
    for count, token in enumerate(tokens):
        if at == len(text):
            return tuple(tokens[:count])
        if not text.startswith(token.text, at):
            return ()
        at += len(token.text)
    return tuple(tokens) if at == len(text) else ()


def extract_error_message(error: Any) -> str:
    """Return what a server says went wrong, from any of the shapes in which servers say it."""
    for name in ("error", "message", "detail", "msg"):
        if isinstance(error, dict) and error.get(name):
            return extract_error_message(error[name])
    if isinstance(error, list) and error:
        return extract_error_message(error[0])
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
