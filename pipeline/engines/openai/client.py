"""The body of a call -> its answer by a server, asked again while that helps. Knows no schema and no page; the only door to httpx2.

    429, 5xx, a connection lost, an answer cut or stalled   asked again, later and later; `Retry-After` is obeyed
    any other 4xx                                           this request's failure
    nobody there, for all its tries                         the engine is dead

No redirect is followed: the key must not travel to another host. The key is in no text that leaves this room.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from pipeline.engines.openai.chat import ChatAnswer, RetryableError, extract_error_message
from pipeline.errors import DocumentError, EngineDead
from pipeline.records import Completion
from pipeline.version import __version__

MAX_WAIT_S = 60.0
MAX_TOLD_S = 300.0
"""Longest wait, and longest that a server may ask for."""
CONNECT_S = 10.0
LINGER_S = 1.0
"""How long a connection may take to end after its answer has, so that it can be used again."""
MAX_ERROR_BYTES = 65_536
MAX_REPLY_BYTES = 64 * 2**20
AGAIN = {408, 409, 425, 429}
TOO_LONG = re.compile(r"context_length_exceeded|maximum (context|model) length|longer than the maximum", re.IGNORECASE)


@dataclass(frozen=True)
class RetryPolicy:
    """How much is asked at once, how long an answer may take, and how often it is asked for again."""

    concurrency: int = 16
    idle_timeout_s: float = 120.0
    timeout_s: float = 900.0
    max_retries: int = 6
    backoff_s: float = 1.0


class ChatClient:
    """A server's address. Lives in one event loop."""

    def __init__(self, base_url: str, key: str | None, patience: RetryPolicy) -> None:
        self.base_url, self.patience, self._key = base_url.rstrip("/"), patience, key
        headers = {
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"pipeline/{__version__}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=patience.concurrency)
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout, follow_redirects=False)
        self._heard = float("-inf")

    async def close(self) -> None:
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]] | None:
        """Return the models that the server lists, None if it has no such list.

        Raises DocumentError `refused` for a wrong key, Broken when there is no server.
        """
        once = self._client.stream("GET", f"{self.base_url}/models", headers={"Connection": "close"})
        try:  # a connection of its own: transformers serve fails here and then closes it, perhaps while the next call is under way
            async with asyncio.timeout(self.patience.idle_timeout_s), once as reply:
                data = await receive_reply(reply, MAX_REPLY_BYTES)
        except (httpx2.HTTPError, httpx2.StreamError, TimeoutError) as error:
            raise RetryableError("unreachable", f"{self.base_url} cannot be reached ({self._shown(error)})") from None
        if reply.status_code in (401, 403):
            raise DocumentError("refused", f"{self.base_url} answers {reply.status_code}: {self._said(data)}")
        try:
            return [card for card in json.loads(data)["data"] if isinstance(card, dict)] if reply.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    async def ask(self, body: bytes, max_tokens: int) -> Completion:
        """Return the answer to one call.

        Raises DocumentError when this call cannot be answered, EngineDead when nobody is there for all of its tries.
        """
        first_asked, attempt = time.monotonic(), 0
        while True:
            try:
                return await self._attempt(body, max_tokens)
            except RetryableError as fault:
                if attempt == self.patience.max_retries:
                    raise self._given_up(fault, attempt + 1, first_asked) from None
                await asyncio.sleep(compute_wait_s(attempt, fault.wait_s, self.patience.backoff_s))
                attempt += 1

    async def _attempt(self, body: bytes, max_tokens: int) -> Completion:
        """Ask once. Raises Broken when asking again may help."""
        answer, patience = ChatAnswer(max_tokens), self.patience
        try:
            async with asyncio.timeout(patience.timeout_s) as whole, asyncio.timeout(patience.idle_timeout_s) as idle:
                await self._read(body, answer, idle)
        except TimeoutError:
            if answer.finish_reason is None and whole.expired():
                message = f"the answer was still being written after {patience.timeout_s:g} s (model.timeout_s) and was cut"
                raise DocumentError("timeout", message) from None
            if answer.finish_reason is None:
                raise RetryableError("timeout", f"nothing came for {patience.idle_timeout_s:g} s (model.idle_timeout_s)") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise RetryableError("unreachable", f"{self.base_url} cannot be reached ({self._shown(error)})") from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise RetryableError("connection", f"the connection was lost ({self._shown(error)})") from None
        return answer.completion()

    async def _read(self, body: bytes, answer: ChatAnswer, idle: asyncio.Timeout) -> None:
        """Take an answer in as it comes; each event sets the clock anew, and one that runs away is cut."""
        now = asyncio.get_running_loop().time
        async with self._client.stream("POST", f"{self.base_url}/chat/completions", content=body) as reply:
            self._heard = time.monotonic()
            if reply.status_code != 200:
                raise self._refused(reply.status_code, await receive_reply(reply, MAX_ERROR_BYTES), reply.headers.get("Retry-After", ""))
            async for data in iterate_events(reply):
                ended = data == "[DONE]"
                if not idle.expired():
                    idle.reschedule(now() + (LINGER_S if ended else self.patience.idle_timeout_s))
                if not ended:
                    event = parse_event(data)
                    if status := find_late_status(event):
                        raise self._refused(status, data.encode())
                    answer.add(event)
                if answer.runs_away:
                    return

    def _refused(self, status: int, data: bytes, retry_after: str = "") -> RetryableError | DocumentError:
        """Return what an answer that is none means."""
        said = self._said(data)
        if status in AGAIN or status >= 500:
            return RetryableError(
                "busy" if status == 429 else "server", f"the server answers {status}: {said}", parse_retry_after(retry_after)
            )
        if 300 <= status < 400:
            return DocumentError("refused", f"the server answers {status}, a redirect, which is not followed: correct model.base_url")
        kind = "too_long" if TOO_LONG.search(data.decode("utf-8", "replace")) else "refused"
        return DocumentError(kind, f"the server answers {status}: {said}")

    def _given_up(self, fault: RetryableError, times: int, first_asked: float) -> DocumentError | EngineDead:
        """Return why a call is not asked again."""
        message = self._hidden(f"{fault.message}; asked {times} times")
        if fault.kind == "unreachable" and self._heard < first_asked:
            return EngineDead(message)
        return DocumentError("connection" if fault.kind == "unreachable" else fault.kind, message)

    def _said(self, data: bytes) -> str:
        """Return a server's own sentence, shortened."""
        text = data.decode("utf-8", "replace")
        try:
            return self._hidden(extract_error_message(json.loads(text)))
        except ValueError:
            return self._hidden(extract_error_message(re.sub(r"<[^>]*>", " ", text)))

    def _shown(self, error: BaseException) -> str:
        return self._hidden(f"{type(error).__name__}: {error}".removesuffix(": "))

    def _hidden(self, text: str) -> str:
        """Return a text without the key, which a server may repeat."""
        return text.replace(self._key, "***") if self._key else text


async def receive_reply(reply: httpx2.Response, most: int) -> bytes:
    """Return a reply's beginning, which is all of it unless it is huge."""
    data = b""
    async for block in reply.aiter_bytes():
        data += block
        if len(data) >= most:
            break
    return data[:most]


async def iterate_events(reply: httpx2.Response) -> AsyncIterator[str]:
    """Yield the data of each event; a server that does not stream sends one."""
    if reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        async for event in httpx2.EventSource(reply):
            yield event.data
    else:
        yield (await receive_reply(reply, MAX_REPLY_BYTES)).decode("utf-8", "replace")


def parse_event(data: str) -> Any:
    """Return an event's value."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RetryableError("garbled", f"the server sent what is no JSON: {data[:80]!r}") from None


def find_late_status(event: Any) -> int | None:
    """Return the 4xx that an event says it is. vLLM looks at a schema when its 200 has gone out, and says so in the stream."""
    error = event.get("error") if isinstance(event, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 500 else None


def compute_wait_s(attempt: int, told: float | None, backoff_s: float) -> float:
    """Return how long to wait after a failed attempt, counted from 0: as told, or longer each time; never all at once."""
    if told is not None:
        return min(told, MAX_TOLD_S) + random.uniform(0, backoff_s)
    return random.uniform(0.5, 1.0) * min(MAX_WAIT_S, backoff_s * 2.0**attempt)


def parse_retry_after(retry_after: str) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or a date; None if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
